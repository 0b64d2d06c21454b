# SPDX-License-Identifier: Apache-2.0
"""Counts from final tensors, and what is refused."""

import pytest
import torch
from torch import nn

from harprune.sparsity.audit import audit, budget_of, connected
from harprune.sparsity.layers import prunable_layers


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(16, 3))


def zero(model, layer, kept):
    with torch.no_grad():
        model[layer].weight.flatten()[kept:] = 0.0


@pytest.mark.parametrize(
    ("density", "total", "budget"),
    [
        (0.01, 11_164_352, 111_643),
        (0.001, 15_302_848, 15_302),
        (0.1, 30, 3),
        (0.3, 10, 3),
        (0.29, 100, 29),
    ],
)
def test_the_budget_is_the_floor_of_the_share(density, total, budget):
    assert budget_of(density, total) == budget


def test_counts_come_from_the_tensors(model):
    zero(model, 0, 5)
    zero(model, 2, 7)
    counts = audit(prunable_layers(model), 0.2)
    assert (counts.kept, counts.total, counts.budget) == (12, 36 + 48, 16)
    assert counts.as_dict()["layers"]["0.weight"] == {"shape": [4, 1, 3, 3], "total": 36, "kept": 5}
    assert counts.require_within_budget() is counts


def test_prices_weigh_the_count(model):
    zero(model, 0, 5)
    zero(model, 2, 7)
    counts = audit(prunable_layers(model), 0.2, {"0.weight": 4, "2.weight": 1})
    assert (counts.spent, counts.budget) == (27, int(0.2 * (36 * 4 + 48)))


def test_more_than_the_budget_is_refused(model):
    with pytest.raises(ValueError, match="above the budget of 16"):
        audit(prunable_layers(model), 0.2).require_within_budget()


def test_an_empty_layer_is_a_collapse(model):
    zero(model, 0, 0)
    with pytest.raises(ValueError, match=r"layer collapse: 0.weight keeps no weight"):
        audit(prunable_layers(model), 0.99).require_within_budget()


def test_layers_with_constant_outputs_are_named(model):
    zero(model, 0, 3)
    assert audit(prunable_layers(model)).thin == ["0.weight"]


def test_outputs_of_a_transposed_convolution_lie_in_its_second_axis():
    grouped = nn.Sequential(nn.ConvTranspose2d(2, 8, 1, groups=2))
    zero(grouped, 0, 3)
    assert audit(prunable_layers(grouped)).thin == ["0.weight"]
    whole = nn.Sequential(nn.ConvTranspose2d(8, 2, 1))
    zero(whole, 0, 3)
    assert audit(prunable_layers(whole)).thin == []


def test_a_mask_that_cuts_the_image_off_is_noticed(model):
    x = torch.rand(1, 1, 2, 2)
    assert connected(model, x)
    with torch.no_grad():
        model[0].weight[:2] = 0.0
        model[2].weight[:, 8:] = 0.0
    assert not connected(model, x)
