# SPDX-License-Identifier: Apache-2.0
"""Shrinking changes sizes and nothing else."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from harprune.deploy import shrink as module
from harprune.deploy.network import Network
from harprune.deploy.shrink import shrink
from harprune.kernels import graph as g
from harprune.kernels.lists import sift
from harprune.models import create_model
from harprune.sparsity.extraction import extract

from .networks import (
    Branching,
    by_torch,
    deployed,
    drawn,
    logits,
    normalised,
    pruned,
    without_filters,
)


def images_for(network: Network, count: int = 4) -> np.ndarray:
    return np.random.default_rng(0).random((count, *network.input_shape), np.float32)


@given(st.integers(0, 10**9))
@settings(max_examples=150)
def test_random_networks_stay_what_they_are(seed):
    network = drawn(seed, nodes=12)
    smaller, report = shrink(network)
    x = images_for(network)
    expected = by_torch(network, x)
    assert np.allclose(by_torch(smaller, x), expected, rtol=1e-4, atol=1e-5)
    found = smaller.runner().forward([x])[0]
    assert np.allclose(found, expected, rtol=1e-3, atol=1e-3)
    assert report.weights_removed >= 0 and report.channels_removed >= 0
    assert (smaller.classes, smaller.metadata) == (network.classes, network.metadata)
    again, second = shrink(smaller)
    assert second.weights_removed == second.channels_removed == 0
    assert len(again.graph.nodes) == len(smaller.graph.nodes)


@pytest.mark.parametrize(
    "name, density",
    [("resnet18", 0.01), ("resnet18", 0.001), ("vgg16_bn", 0.02), ("preact_resnet18", 0.02)],
)
def test_sparse_networks_lose_channels_and_no_outputs(name, density):
    model = normalised(without_filters(pruned(create_model(name, 10, width=16), density), 0.2))
    network = deployed(model)
    smaller, report = shrink(network)
    x = images_for(network)
    wanted = model(torch.from_numpy(x)).detach().numpy()
    assert np.allclose(logits(smaller, x), wanted, atol=1e-4 * np.abs(wanted).max())
    assert report.channels_removed > 20 and report.weights_removed > 0
    sizes = [sum(s.channels for s in n.graph.shapes) for n in (network, smaller)]
    assert sizes[1] < sizes[0] - report.channels_removed


def test_filters_set_to_zero_go_through_groups_concatenation_and_flattening():
    model = pruned(Branching(), 1.0)
    with torch.no_grad():
        for layer, filters in (
            (model.stem[0], [1, 5]),
            (model.grouped[0], [8, 9, 10, 11, 12, 13, 14, 15]),
            (model.mix, [3, 4]),
        ):
            layer.weight[filters] = 0
            if layer.bias is not None:
                layer.bias[filters] = -1.0
        model.grouped[1].bias[8:16] = -5.0
    network = deployed(model, side=20)
    smaller, report = shrink(network)
    shapes = {name: pattern.shape for name, pattern in smaller.patterns.items()}
    # A group goes whole with its inputs; here others read the inputs, so the group stays empty.
    before, after = report.weights["grouped_0"]
    assert before == 24 * 4 * 9 and after == before - 2 * 8 * 9 + 8 * 9
    assert shapes["mix"][0] == 14
    assert shapes["head"] == (5, 14 * 4, 1, 1)
    x = images_for(network)
    expected = model(torch.from_numpy(x)).detach().numpy()
    assert np.allclose(logits(smaller, x), expected, atol=1e-5)


def test_whole_groups_go():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=4),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
    )
    with torch.no_grad():
        model[4].weight[:, 2:6] = 0
    smaller, _ = shrink(deployed(model, side=6))
    (node,) = (n for n in smaller.graph.nodes if getattr(n, "groups", 1) > 1)
    assert node.groups == 2
    assert [p.shape[0] for p in smaller.patterns.values()] == [4, 4, 4]


def sequence(padding: int, bias: float) -> Network:
    """A filter without weights, ReLU, and a 3 x 3 convolution that reads its constant."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=padding), nn.Flatten()
    )
    with torch.no_grad():
        model[0].weight[2] = 0
        model[0].bias[2] = bias
    return deployed(model, side=5)


@pytest.mark.parametrize(
    "padding, bias, channels", [(0, -1.0, 3), (0, 1.0, 3), (1, -1.0, 3), (1, 1.0, 4)]
)
def test_a_constant_moves_unless_zero_padding_spoils_it(padding, bias, channels):
    network = sequence(padding, bias)
    smaller, _ = shrink(network)
    x = images_for(network)
    assert smaller.graph.shapes[1].channels == channels
    assert np.allclose(by_torch(smaller, x), by_torch(network, x), atol=1e-6)


def test_a_constant_moves_where_no_kept_weight_meets_the_padding():
    network = sequence(1, 1.0)
    weight = network.weight("_2").copy()
    centre = np.zeros_like(weight[:, 2])
    centre[:, 1, 1] = weight[:, 2, 1, 1]
    weight[:, 2] = centre
    network.patterns["_2"], network.values["_2"] = sift(weight)
    smaller, _ = shrink(network)
    assert smaller.graph.shapes[1].channels == 3


def test_what_goes_goes_for_images_of_any_size():
    """With a stride of 2 the lowest taps meet padding in maps of odd sides alone."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, 2, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    with torch.no_grad():
        model[0].weight[:3] = 0
        model[0].bias[:3] = 1.0
        model[2].weight[:, 0, 0] = model[2].weight[:, 0, :, 0] = 0
        model[2].weight[:, 1] = 0
    smaller, _ = shrink(deployed(model, side=8))
    assert smaller.graph.shapes[1].channels == 5
    for side in (8, 9, 11, 14):
        x = np.random.default_rng(0).random((2, 3, side, side), np.float32)
        found = logits(smaller.resized(side, side), x)
        assert np.allclose(found, model(torch.from_numpy(x)).detach().numpy(), atol=1e-6)


@pytest.mark.parametrize("bias, kind", [(0.0, None), (0.5, g.Affine)])
def test_a_branch_without_weights_is_no_branch(bias, kind):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            x = self.first(x)
            return x + self.second(torch.relu(x))

    model = Block()
    with torch.no_grad():
        model.second.weight.zero_()
        model.second.bias.fill_(bias)
    network = deployed(model, side=6)
    smaller, report = shrink(network)
    kinds = [type(n) for n in smaller.graph.nodes]
    assert kinds == [g.Convolution] if kind is None else [g.Convolution, kind]
    assert report.filters["second"] == (4, 0)
    x = images_for(network)
    assert np.allclose(by_torch(smaller, x), by_torch(network, x), atol=1e-6)


def test_a_network_without_any_weight_is_its_biases():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    with torch.no_grad():
        model[0].weight.zero_()
    network = Network(*extract(model, torch.rand(1, 3, 4, 4)))
    smaller, report = shrink(network)
    x = images_for(network)
    assert report.weights_removed == 4 * 27 * 0 + 64 * 3
    assert np.allclose(by_torch(smaller, x), by_torch(network, x), atol=1e-5)


def test_a_difference_is_refused(monkeypatch):
    network = sequence(0, 1.0)
    monkeypatch.setattr(module, "TOLERANCE", 0.0)
    assert shrink(drawn(0, nodes=0))
    monkeypatch.setattr(module, "_never_in_padding", lambda window: np.ones(9, bool))
    monkeypatch.setattr(module, "TOLERANCE", 1e-5)
    shrink(network)
    with pytest.raises(ValueError, match="differs by"):
        shrink(sequence(1, 1.0))
