# SPDX-License-Identifier: Apache-2.0
"""AWP: the step it takes, written out; pruned weights stay out of it."""

import copy
from functools import partial

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.nn import functional as F

from harprune.methods.base import Budget
from harprune.methods.oneshot import Magnitude
from harprune.robustness.awp import AWP
from harprune.sparsity import masks
from harprune.sparsity.layers import prunable_layers
from harprune.training.batches import Batches
from harprune.training.loop import fit
from harprune.training.schedules import constant
from harprune.training.splits import from_arrays

RATE, RADIUS = 0.3, 0.2
X, Y = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def loss(model, x, y):
    return F.cross_entropy(model(x), y)


def weights_of(model):
    return [layer.parameter for layer in prunable_layers(model).values()]


def train(model, nearby):
    fit(
        model,
        Batches(from_arrays(X, Y), 8, seed=0),
        loss=loss,
        optimiser=torch.optim.SGD(model.parameters(), lr=RATE),
        schedule=constant,
        epochs=1,
        fabric=Fabric(accelerator="cpu", devices=1),
        seed=0,
        nearby=nearby,
    )


def test_the_gradient_is_taken_at_the_worst_weights_nearby_and_applied_here():
    model = network()
    literal = copy.deepcopy(model)
    train(model, partial(AWP(RADIUS).nearby, weights_of(model)))

    start = [p.detach().clone() for p in literal.parameters()]
    weights = weights_of(literal)
    for w, g in zip(weights, torch.autograd.grad(loss(literal, X, Y), weights)):
        w.data += RADIUS * w.data.norm() / g.norm() * g
    gradients = torch.autograd.grad(loss(literal, X, Y), list(literal.parameters()))
    for p, before, g in zip(model.parameters(), start, gradients):
        assert torch.allclose(p, before - RATE * g, atol=1e-7)


def test_only_kept_weights_are_perturbed():
    """Dense under a mask and compacted to the kept values it is the same step."""
    model, budget = network(), Budget(0.4)
    method = Magnitude()
    method.attach(model, budget)
    method.settle(model)
    compacted, plain = copy.deepcopy(model), copy.deepcopy(model)
    for each in (model, compacted):
        layers = prunable_layers(each).values()
        if each is compacted:
            masks.compact(compacted)
        train(each, partial(AWP(RADIUS).nearby, [layer.parameter for layer in layers]))
    train(plain, lambda progress: None)
    masks.expand(compacted)
    networks = [masks.bake(each).state_dict() for each in (model, compacted, plain)]
    for name, tensor in networks[0].items():
        assert torch.allclose(tensor, networks[1][name], atol=1e-6)
    assert any(not torch.allclose(t, networks[2][n], atol=1e-4) for n, t in networks[0].items())
    assert all(
        int((networks[0][name] != 0).sum()) == count
        for name, count in budget.counts(network(), budget.allocate(network(), 0.4)).items()
    )


def test_after_an_error_every_weight_is_back():
    model = network()
    loss(model, X, Y).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="inside"), AWP(0.5).nearby(weights_of(model), 1.0):
        assert not torch.equal(model[1].weight, before["1.weight"])
        assert torch.equal(model[1].bias, before["1.bias"])
        raise RuntimeError("inside")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("options", [{"radius": 0.0}, {"warm_up": 1.0}, {"warm_up": -0.1}])
def test_a_value_outside_its_range_is_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        AWP(**options)
