# SPDX-License-Identifier: Apache-2.0
"""What every method owes: the table of methods x promises."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from harprune.methods.admm import ADMM
from harprune.methods.base import Budget, Limit
from harprune.methods.bcs import BCS
from harprune.methods.flying_bird import FlyingBird, Growth
from harprune.methods.grasp import GraSP
from harprune.methods.harp import HARP
from harprune.methods.hydra import HYDRA
from harprune.methods.li20 import Li20
from harprune.methods.mad import MAD
from harprune.methods.oneshot import Magnitude, Random
from harprune.methods.robust_bird import RobustBird
from harprune.methods.rst import RST
from harprune.methods.snip import SNIP
from harprune.methods.synflow import SynFlow
from harprune.methods.twinrep import TwinRep
from harprune.sparsity import allocation, masks
from harprune.sparsity.costs import multiply_add_prices
from harprune.sparsity.density import LARGEST_LOGIT
from harprune.sparsity.granularity import Granularity
from harprune.training.loop import training_only

METHODS = [HARP(gamma=0.1), HARP(enforce_after=1), HARP(learn_densities=False),
           HARP(learn_scores=False), HARP(train_weights=True), HYDRA(), Magnitude(), Random(),
           SNIP(), GraSP(), SynFlow(rounds=5),
           Li20(),
           RST(),
           TwinRep(), TwinRep(inherit=True),
           FlyingBird(updates=3), FlyingBird(Growth.GRADIENT, updates=3),
           FlyingBird(adaptive=True, updates=3),
           RobustBird(window=2),
           ADMM(updates=2),
           MAD(mask_steps=3),
           BCS()]  # fmt: skip

GROWING = (FlyingBird, BCS)
WEIGHTS_ONLY = (BCS,)


@pytest.fixture(params=METHODS, ids=repr)
def method(request):
    return copy.deepcopy(request.param)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 9, 10),
    )  # fmt: skip


X, Y = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 10


def attach(method, model, budget):
    """As the pruning stage does it."""
    method.check(model, budget)
    method.attach(model, budget)
    if method.sample:
        method.observe(model.eval(), [(X, Y)])
        model.train()


def train(model, method, steps=3):
    groups = method.trainable(model)
    if not groups:
        return
    method.begin(5, 1)
    optimiser = torch.optim.SGD(groups, lr=0.5, momentum=0.9)
    with training_only(model, optimiser):
        for step in range(steps):
            (F.cross_entropy(model(X), Y) + method.penalty(model)).backward()
            optimiser.step()
            optimiser.zero_grad()
            method.step_ended(model, step)
            method.judged(0.1 * step, 0.1 * step)
            method.epoch_ended(model, step)


def settled(method, model, budget):
    """Settle and bake; the audit, by the masks, for what grew from zero may still be zero."""
    method.settle(model)
    assert all(isinstance(m, masks.FixedMask) for _, m in masks.installed(model).values())
    kept = {
        name: int(mask.kept.expand(layer.shape).sum())
        for name, (layer, mask) in masks.installed(model).items()
    }
    logits = model.eval()(X)
    masks.bake(model)
    assert torch.equal(model(X), logits)
    counts = budget.audit(model)
    for name, count in counts.layers.items():
        assert count.kept == kept[name] or (count.kept < kept[name] and type(method) in GROWING)
    layers = {name: replace(count, kept=kept[name]) for name, count in counts.layers.items()}
    return replace(counts, layers=layers)


@pytest.mark.parametrize("density", [0.3, 0.05])
def test_masks_are_of_zeros_and_ones_and_only_what_is_trainable_moves(method, model, density):
    attach(method, model, Budget(density))
    held = {id(p) for g in method.trainable(model) for p in g["params"]}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, method)
    for _, mask in masks.installed(model).values():
        assert set(mask.mask().unique().tolist()) <= {0.0, 1.0}
    for name, parameter in model.named_parameters():
        if name.endswith("density.logit") and parameter == torch.tensor(LARGEST_LOGIT):
            continue  # held at its bound
        assert torch.equal(parameter, before[name]) != (id(parameter) in held), name


@pytest.mark.parametrize(
    "share", [allocation.uniform, allocation.erk, allocation.lamp, allocation.igq]
)
def test_settling_is_exact_and_neither_it_nor_baking_changes_the_logits(method, model, share):
    budget = Budget(0.1, allocation=share)
    attach(method, model, budget)
    train(model, method)
    counts = settled(method, model, budget)
    assert counts.kept == counts.budget


def test_a_method_uses_the_allocation_if_it_says_so(method, model):
    asked = []

    def spy(weights, density):
        asked.append(density)
        return allocation.erk(weights, density)

    budget = Budget(0.3, allocation=spy)
    attach(method, model, budget)
    train(model, method)
    method.settle(model)
    assert bool(asked) is method.uses_allocation


@pytest.mark.parametrize("grain", [Granularity.FILTER, Granularity.CHANNEL])
def test_filters_and_channels_are_kept_within_the_budget(method, model, grain):
    budget = Budget(0.4, granularity=grain)
    if type(method) in WEIGHTS_ONLY:
        with pytest.raises(ValueError, match="set granularity to weight"):
            method.check(model, budget)
        return
    attach(method, model, budget)
    train(model, method)
    counts = settled(method, model, budget)
    largest = max(grain.unit_size(layer) for layer in budget.layers(model).values())
    assert counts.budget - largest < counts.kept <= counts.budget


def test_a_budget_in_multiply_adds_is_met(method, model):
    budget = Budget(0.2, prices=lambda model, layers: multiply_add_prices(model, layers, X[:1]))
    attach(method, model, budget)
    train(model, method)
    counts = settled(method, model, budget)
    dearest = max(layer.price for layer in counts.layers.values())
    assert counts.budget - dearest < counts.spent <= counts.budget


@pytest.mark.parametrize("share", [0.3, 0.05])
def test_a_second_bound_is_met_beside_the_first(method, model, share):
    prices = lambda model, layers: multiply_add_prices(model, layers, X[:1])  # noqa: E731
    budget = Budget(0.2, limit=Limit(share, prices))
    price = prices(model, budget.layers(model))
    attach(method, model, budget)
    train(model, method)
    counts = settled(method, model, budget).layers
    spent = sum(price[n] * c.kept for n, c in counts.items())
    dense = sum(price[n] * c.total for n, c in counts.items())
    kept, total = (sum(getattr(c, n) for c in counts.values()) for n in ("kept", "total"))
    assert spent <= share * dense and kept <= 0.2 * total
    # One of the two is used up, to a unit of every layer at most.
    assert spent > share * dense - sum(price.values()) or kept > 0.2 * total - len(counts)


def test_a_second_bound_outside_its_range_is_refused():
    with pytest.raises(ValueError, match=r"1\.5.*\(0, 1\]"):
        Limit(1.5, lambda model, layers: {})


def test_a_resumed_stage_ends_where_the_undisturbed_one_does(method, model):
    other = copy.deepcopy(model)
    attach(method, model, Budget(0.1))
    train(model, method, steps=2)
    state, values = copy.deepcopy(model.state_dict()), json.loads(json.dumps(method.state_dict()))
    resumed = copy.deepcopy(method)
    resumed.__init__(**{n: getattr(method, n) for n in _options(method)})
    attach(resumed, other, Budget(0.1))
    other.load_state_dict(state)
    resumed.load_state_dict(values)
    for each, its in ((model, method), (other, resumed)):
        train(each, its)
        its.settle(each)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values())
    )


def _options(method):
    return [n for n, f in method.__dataclass_fields__.items() if f.init]


@pytest.mark.parametrize("density", [0.0, 1.0, 1.5, -0.1])
def test_a_budget_outside_its_range_is_refused(density):
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        Budget(density)


def test_a_collapsed_allocation_is_refused_unless_a_floor_is_set(model):
    with torch.no_grad():
        model[0].weight.mul_(1e-6)
    with pytest.raises(ValueError, match=r"layer collapse.*0\.weight"):
        HYDRA().attach(model, Budget(0.05, allocation=allocation.global_magnitude, floor=0.0))
    method = HYDRA()
    method.attach(model, Budget(0.05, allocation=allocation.global_magnitude))
    method.settle(model)
