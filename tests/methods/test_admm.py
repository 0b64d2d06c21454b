# SPDX-License-Identifier: Apache-2.0
"""Robust-ADMM against its iteration, written out with sorts."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from harprune.methods.admm import ADMM
from harprune.methods.base import Budget
from harprune.sparsity import allocation, masks
from harprune.sparsity.granularity import Granularity

X, Y = (
    torch.rand(6, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    torch.arange(6) % 3,
)
RATE = 0.1


def network():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)).double()


def projected(w, share, axes):
    """`w` where its norm over `axes` is among the largest `share`, else zero."""
    norms = w.square().sum(dim=axes, keepdim=True) if axes else w.square()
    ranked = norms.flatten().sort(descending=True).values
    return w * (norms >= ranked[round(share * norms.numel()) - 1])


@pytest.mark.parametrize(
    ("grain", "axes"), [(Granularity.WEIGHT, ()), (Granularity.FILTER, (1, 2, 3))]
)
def test_training_follows_the_iteration(grain, axes):
    """Six epochs of one step with three updates: W, Z and U as the paper's equations have them."""
    share, rho, growth = 0.5, 0.7, 1.5
    model, literal = network(), network()
    literal.load_state_dict(model.state_dict())
    method = ADMM(rho, growth, updates=3)
    budget = Budget(share, allocation=allocation.uniform, granularity=grain, exclude=("3",))
    method.attach(model, budget)
    method.begin(epochs=6, steps=1)
    optimiser = torch.optim.SGD(method.trainable(model), lr=RATE)

    z, u = projected(literal[0].weight.detach(), share, axes), torch.zeros(4, 2, 3, 3).double()
    for epoch in range(6):
        (F.cross_entropy(model(X), Y) + method.penalty(model)).backward()
        optimiser.step()
        optimiser.zero_grad()
        method.epoch_ended(model, epoch)

        literal.zero_grad()
        F.cross_entropy(literal(X), Y).backward()
        with torch.no_grad():
            w = literal[0].weight
            w.grad += rho * (w - z + u)
            for p in literal.parameters():
                p -= RATE * p.grad
            if epoch % 2 == 1:
                rho *= growth
                z = projected(w + u, share, axes)
                u = u + w - z

        layer, mask = masks.installed(model)["0.weight"]
        assert torch.allclose(layer.weight, literal[0].weight, atol=1e-12)
        assert torch.allclose(mask.z, z, atol=1e-12)
        assert torch.allclose(mask.u, u, atol=1e-12)
        assert method.metrics(model)["rho"] == pytest.approx(rho)
    method.settle(model)
    expected = projected(literal[0].weight, share, axes)
    assert torch.allclose(model[0].weight, expected, atol=1e-12)
    assert masks.kept_masks(model)["0.weight"].float().mean() == share


def test_the_penalty_draws_the_weights_to_the_pruned_network():
    model, method = network(), ADMM(rho=5.0, updates=5)
    budget = Budget(0.3, allocation=allocation.uniform)
    method.attach(model, budget)
    method.begin(epochs=50, steps=1)
    optimiser = torch.optim.SGD(method.trainable(model), lr=0.05)
    for epoch in range(50):
        (F.cross_entropy(model(X), Y) + method.penalty(model)).backward()
        optimiser.step()
        optimiser.zero_grad()
        method.epoch_ended(model, epoch)
    before = model(X)
    assert method.doubt(model) is None
    method.settle(model)
    assert (model(X) - before).abs().max() < 0.005 < 0.03 < _moved_by_magnitude_alone(budget)


def test_weights_that_were_not_drawn_are_doubted():
    model, method = network(), ADMM()
    method.attach(model, Budget(0.3, allocation=allocation.uniform))
    whole = sum(m.weight.square().sum() for m in (model[0], model[3]))
    left = sum(projected(m.weight, 0.3, ()).square().sum() for m in (model[0], model[3]))
    assert method.doubt(model).startswith(f"{100 * (1 - left / whole):.0f} % of the squared norm")


def _moved_by_magnitude_alone(budget):
    model, method = network(), ADMM()
    before = model(X)
    method.attach(model, budget)
    method.settle(model)
    return (model(X) - before).abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rho": 0.0}, "rho 0"), ({"growth": 0.9}, "growth 0.9"), ({"updates": 0}, "updates = 0")],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ADMM(**options)


def test_no_epoch_before_the_last_is_selected():
    method = ADMM()
    method.attach(model := network(), Budget(0.5, allocation=allocation.uniform))
    assert not method.budget_met(model)  # of epochs that do not meet it, the latest counts
