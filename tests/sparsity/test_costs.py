# SPDX-License-Identifier: Apache-2.0
"""Costs read off a forward pass against counts by hand."""

import pytest
import torch
from torch import nn

from harprune.models import create_model
from harprune.sparsity import masks
from harprune.sparsity.costs import (
    mixed_prices,
    multiply_add_prices,
    parameter_prices,
    weighted_cost,
)
from harprune.sparsity.density import LearnedDensity
from harprune.sparsity.layers import prunable_layers


def test_multiply_adds_of_each_kind_of_layer():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),  # 16 x 16 -> 8 x 8
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.ConvTranspose2d(8, 4, 2, stride=2),  # 8 x 8 -> 16 x 16
        nn.Flatten(),
        nn.Linear(4 * 256, 5),
    )
    prices = multiply_add_prices(model, prunable_layers(model), torch.rand(3, 3, 16, 16))
    assert prices == {"0.weight": 64, "1.weight": 64, "2.weight": 64, "4.weight": 1}


def test_a_layer_on_tokens_and_attention_projections_count_each_token():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    prices = multiply_add_prices(layer, prunable_layers(layer), torch.rand(2, 7, 8))
    assert set(prices.values()) == {7}


def test_prices_are_the_same_under_masks():
    model, x = create_model("small_cnn", 10, width=8), torch.rand(2, 3, 16, 16)
    before = multiply_add_prices(model, prunable_layers(model), x)
    for layer in prunable_layers(model).values():
        masks.install(layer, masks.LearnedMask(layer.parameter, LearnedDensity(0.5, 0.01)))
    assert multiply_add_prices(model, prunable_layers(model), x) == before


def test_resnet18_costs_what_the_field_says():
    model = create_model("resnet18", 10)
    layers = prunable_layers(model)
    prices = multiply_add_prices(model, layers, torch.rand(1, 3, 32, 32))
    assert sum(prices[n] * layer.size for n, layer in layers.items()) == 555_422_720


def test_mixed_prices_lie_between_parameters_and_multiply_adds():
    model, x = create_model("resnet18", 10, width=8), torch.rand(1, 3, 32, 32)
    layers = prunable_layers(model)
    work = multiply_add_prices(model, layers, x)
    assert set(mixed_prices(model, layers, x, 0.0).values()) == {1000}
    alone, half = mixed_prices(model, layers, x, 1.0), mixed_prices(model, layers, x, 0.5)
    mean = sum(work[n] * layers[n].size for n in layers) / sum(p.size for p in layers.values())
    for name in layers:
        assert alone[name] == pytest.approx(1000 * work[name] / mean, abs=1)
        assert half[name] == pytest.approx((1000 + alone[name]) / 2, abs=1)


def test_the_cost_is_differentiable_with_the_share_as_its_slope():
    model = create_model("small_cnn", 10, width=8)
    layers = prunable_layers(model)
    for prices in (
        parameter_prices(layers),
        multiply_add_prices(model, layers, torch.rand(1, 3, 16, 16)),
    ):
        densities = {n: torch.tensor(0.3, dtype=torch.float64, requires_grad=True) for n in layers}
        cost = weighted_cost(layers, prices)(densities)
        assert cost.item() == pytest.approx(0.3)
        cost.backward()
        total = sum(prices[n] * layer.size for n, layer in layers.items())
        for name, layer in layers.items():
            assert densities[name].grad.item() == pytest.approx(prices[name] * layer.size / total)


def test_a_layer_that_takes_no_part_is_refused():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            return self.used(x)

    model = Spare()
    with pytest.raises(ValueError, match=r"spare.weight takes no part"):
        multiply_add_prices(model, prunable_layers(model), torch.rand(1, 4))
