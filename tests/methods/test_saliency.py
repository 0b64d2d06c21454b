# SPDX-License-Identifier: Apache-2.0
"""SNIP, GraSP and SynFlow against their formulas, taken literally."""

import copy
from math import floor

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from harprune.methods.base import Budget
from harprune.methods.grasp import GraSP
from harprune.methods.snip import SNIP
from harprune.methods.synflow import SynFlow
from harprune.sparsity import masks
from harprune.sparsity.granularity import Granularity

SEEDED = torch.Generator().manual_seed(0)
BATCHES = [
    (torch.rand(6, 2, 5, 5, dtype=torch.float64, generator=SEEDED), torch.arange(6) % 3)
    for _ in range(2)
]


@pytest.fixture
def model():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Softplus(),
        nn.Flatten(), nn.Linear(27, 3),
    ).double().eval()  # fmt: skip


def kept_by(method, model, budget, batches=BATCHES):
    method.attach(model, budget)
    method.observe(model, batches)
    method.settle(model)
    return masks.kept_masks(model)


def top_of_all(scores, count):
    """The `count` highest of all layers, with no floor in the way."""
    everything = torch.cat([s.flatten() for s in scores.values()])
    threshold = everything.sort(descending=True).values[count - 1]
    return {name: s >= threshold for name, s in scores.items()}


def require_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_snip_keeps_what_the_loss_would_miss_most(model):
    names = ["0.weight", "4.weight"]
    parameters = dict(model.named_parameters())
    factors = {n: torch.ones_like(parameters[n], requires_grad=True) for n in names}
    loss = sum(
        F.cross_entropy(
            functional_call(model, {n: parameters[n] * factors[n] for n in names}, x), y
        )
        for x, y in BATCHES
    )
    loss.backward()
    expected = top_of_all({n: c.grad.abs() for n, c in factors.items()}, int(0.3 * 135))
    assert 0 < expected["0.weight"].sum() < 54
    require_same(kept_by(SNIP(), model, Budget(0.3, floor=0.0)), expected)


def test_snip_of_filters_is_the_sensitivity_to_a_factor_on_each(model):
    factor = torch.ones(3, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    x, y = BATCHES[0]
    weight = {"0.weight": model[0].weight * factor}
    F.cross_entropy(functional_call(model, weight, x), y).backward()
    method = SNIP()
    method.attach(model, Budget(0.5, granularity=Granularity.FILTER))
    method.observe(model, BATCHES[:1])
    assert torch.allclose(method._scores["0.weight"], factor.grad.abs())


def test_grasp_keeps_what_the_gradient_flow_would_lose(model):
    weights = [model[0].weight, model[4].weight]
    sizes = [w.numel() for w in weights]

    def loss(flat):
        parts = [p.view_as(w) for p, w in zip(flat.split(sizes), weights)]
        override = {"0.weight": parts[0], "4.weight": parts[1]}
        return sum(
            F.cross_entropy(functional_call(model, override, x) / 200.0, y) for x, y in BATCHES
        ) / len(BATCHES)

    flat = torch.cat([w.detach().flatten() for w in weights])
    gradient = torch.autograd.functional.jacobian(loss, flat)
    change = -flat * (torch.autograd.functional.hessian(loss, flat) @ gradient)
    importance = {
        name: (-part).view_as(w)
        for name, part, w in zip(("0.weight", "4.weight"), change.split(sizes), weights)
    }
    expected = top_of_all(importance, int(0.3 * 135))
    require_same(kept_by(GraSP(), model, Budget(0.3, floor=0.0)), expected)


def test_synflow_follows_its_rounds(model):
    first, last = (w.detach().abs() for w in (model[0].weight, model[4].weight))
    scale = model[1].weight.detach() / (model[1].running_var + model[1].eps).sqrt()
    model[2] = nn.ReLU()
    rounds, density = 4, 0.2
    kept = {"0.weight": torch.ones_like(first), "4.weight": torch.ones_like(last)}
    for k in range(1, rounds + 1):
        a, b = first * kept["0.weight"], last * kept["4.weight"]
        # On ones every position of a channel holds the sum of its filter; each feeds 9 inputs.
        channel = a.sum(dim=(1, 2, 3)) * scale
        into = b.sum(dim=0).view(3, 9).sum(dim=1)
        scores = {
            "0.weight": a * (scale * into).view(3, 1, 1, 1),
            "4.weight": b * channel.repeat_interleave(9),
        }
        count = floor(density ** (k / rounds) * 135 + 1e-9)
        kept = {n: m.double() for n, m in top_of_all(scores, count).items()}
    budget = Budget(density, floor=0.0)
    found = kept_by(SynFlow(rounds=rounds), model, budget)
    require_same(found, {n: m.bool() for n, m in kept.items()})


def test_synflow_sees_no_images_no_shifts_and_no_signs(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.neg_()
        other[1].bias.add_(3.0)
        other[1].running_mean.add_(1.0)
        other[4].bias.sub_(2.0)
    budget = Budget(0.2)
    first = kept_by(SynFlow(rounds=3), model, budget)
    second = kept_by(SynFlow(rounds=3), other, budget, [(-x, y) for x, y in BATCHES])
    require_same(first, second)


def test_synflow_empties_no_layer_where_magnitude_would():
    """The point of the paper, at 20 of 3,400 weights: every layer still has paths through it."""
    deep = nn.Sequential(*(nn.Linear(n, m) for n, m in ((40, 40), (40, 40), (40, 5))))
    budget = Budget(20 / 3400, floor=0.0)
    kept = kept_by(SynFlow(), deep, budget, [(torch.rand(1, 40), torch.zeros(1).long())])
    masks.bake(deep)
    with torch.no_grad():
        reach = torch.ones(1, 40)
        for layer in deep:
            reach = reach @ layer.weight.abs().t()
    assert sum(int(m.sum()) for m in kept.values()) == 20
    assert reach.max() > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda: SNIP(batches=0), "batches = 0"), (lambda: GraSP(batches=-1), "batches = -1"),
     (lambda: GraSP(temperature=0.0), "temperature 0"), (lambda: SynFlow(rounds=0), "rounds = 0")],
)  # fmt: skip
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
