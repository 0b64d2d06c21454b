# SPDX-License-Identifier: Apache-2.0
"""Flying Bird, RigL, SET and Robust Bird, each rule against itself written out."""

from itertools import pairwise
from math import cos, pi

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from harprune.methods.base import Budget
from harprune.methods.flying_bird import FlyingBird, Growth
from harprune.methods.robust_bird import RobustBird
from harprune.sparsity import allocation, masks
from harprune.sparsity.execution import training_twin
from harprune.sparsity.granularity import Granularity

X, Y = torch.rand(8, 2, 5, 5, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
BUDGET = Budget(0.3, allocation=allocation.uniform)


def network():
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Flatten(), nn.Linear(54, 3),
    )  # fmt: skip


def kept_of(model):
    return {name: mask.kept.clone() for name, (_, mask) in masks.installed(model).items()}


def parameters_of(model):
    parts = masks.installed(model).items()
    return {name: layer.parameter.detach().clone() for name, (layer, _) in parts}


def counts_of(kept):
    return {name: int(mask.sum()) for name, mask in kept.items()}


# --- Flying Bird ------------------------------------------------------------------------------


def test_it_starts_with_random_masks_of_the_allocation():
    model, dense = network(), network()
    FlyingBird().attach(model, Budget(0.3, allocation=allocation.igq))
    expected = Budget(0.3).counts(
        dense, allocation.igq({n: p for n, p in dense.named_parameters() if p.dim() > 1}, 0.3)
    )
    assert counts_of(kept_of(model)) == expected
    other = network()
    FlyingBird().attach(other, Budget(0.3, allocation=allocation.igq))
    assert not torch.equal(kept_of(model)["4.weight"], kept_of(other)["4.weight"])


def test_the_updates_come_less_often_in_the_second_half():
    """The authors' numbers: every 900 steps of 78,200, every 1,200 in the second half."""
    method = FlyingBird()
    method.begin(200, 391)
    due = [step for step in range(1, 78_201) if method._due(step)]
    assert 73 <= len(due) <= 76
    gaps = [b - a for a, b in pairwise(due)]
    assert gaps[0] == pytest.approx(912, abs=1) and gaps[-1] == pytest.approx(1216, abs=1)
    assert due[-1] < 78_200


def test_the_fraction_falls_by_a_cosine():
    method = FlyingBird(drop=0.4, until=0.5)
    method.begin(10, 10)
    rates = [method._rate(t) for t in (0, 25, 50)]
    assert rates == pytest.approx([0.4, (0.4 + 0.005) / 2, 0.005])
    assert method._rate(10) == pytest.approx(0.005 + 0.395 * (1 + cos(pi * 0.2)) / 2)
    assert not any(method._due(t) for t in range(51, 101))


def updated(model, method, step=0):
    """One update, forced at `step`."""
    method._due = lambda done: True
    method.step_ended(model, step)
    return kept_of(model)


@pytest.mark.parametrize("growth", list(Growth))
def test_an_update_drops_the_smallest_and_grows_as_many_from_zero(growth):
    model, method = network(), FlyingBird(growth, drop=0.5)
    method.attach(model, BUDGET)
    method.begin(10, 10)
    F.cross_entropy(model(X), Y).backward()
    before, weights = kept_of(model), parameters_of(model)
    after = updated(model, method, step=19)
    rate = 0.005 + 0.495 * (1 + cos(pi * 0.2)) / 2
    for name, (layer, _) in masks.installed(model).items():
        count = int(before[name].sum())
        gone = int(rate * count)
        sizes = weights[name].abs()[before[name]].sort().values
        stay = before[name] & (weights[name].abs() >= sizes[gone])
        assert int(after[name].sum()) == count
        assert (after[name] & stay).equal(stay)
        grown = after[name] & ~stay
        assert int(grown.sum()) == gone > 0
        assert layer.weight[stay].equal(weights[name][stay])
        assert layer.parameter[~stay].eq(0).all()


@pytest.mark.parametrize("on_kernels", [False, True])
def test_rigl_grows_where_the_dense_gradient_is_largest(on_kernels):
    model, method = network(), FlyingBird(Growth.GRADIENT, drop=0.5)
    method.attach(model, BUDGET)
    method.begin(1, 100)
    plain = network()
    plain[1].load_state_dict(model[1].state_dict())
    with torch.no_grad():
        for mine, its in ((plain[0], model[0]), (plain[4], model[4])):
            mine.weight.copy_(its.weight)
        plain[4].bias.copy_(model[4].bias)
    F.cross_entropy(plain(X), Y).backward()
    trained = training_twin(model) if on_kernels else model
    F.cross_entropy((trained or model)(X), Y).backward()
    weights, before = parameters_of(model), kept_of(model)
    after = updated(model, method)
    for name, layer in (("0.weight", plain[0]), ("4.weight", plain[4])):
        count = int(before[name].sum())
        gone = int(method._rate(1) * count)
        stay = before[name] & (
            weights[name].abs() >= weights[name].abs()[before[name]].sort().values[gone]
        )
        score = layer.weight.grad.abs().masked_fill(stay, -1.0)
        expected = score >= score.flatten().sort(descending=True).values[gone - 1]
        assert torch.equal(after[name] & ~stay, expected)


def test_filters_are_dropped_and_grown_whole():
    model, method = network(), FlyingBird(drop=0.5)
    method.attach(model, Budget(0.5, granularity=Granularity.FILTER, exclude=("4",)))
    method.begin(1, 100)
    before = kept_of(model)["0.weight"]
    norms = parameters_of(model)["0.weight"].abs().sum(dim=(1, 2, 3), keepdim=True)
    after = updated(model, method)["0.weight"]
    assert before.shape == after.shape == (6, 1, 1, 1) and int(after.sum()) == 3
    largest = norms == norms.where(before, torch.tensor(-1.0)).max()
    assert (after & largest).any()


def test_random_growth_is_a_function_of_seed_and_step():
    first, second = network(), network()
    methods = FlyingBird(), FlyingBird()
    second.load_state_dict(first.state_dict())
    for model, method in zip((first, second), methods):
        torch.manual_seed(3)
        method.attach(model, BUDGET)
        method.begin(1, 100)
    torch.manual_seed(99)
    one, two = updated(first, methods[0], 4), updated(second, methods[1], 4)
    assert all(torch.equal(one[n], two[n]) for n in one)
    three = updated(second, methods[1], 5)
    assert any(not torch.equal(two[n], three[n]) for n in two)


# --- Flying Bird+ -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gaps", "losses", "dropped", "grown"),
    [
        ([0, 0, 0, 0, 0, 0], [5, 4, 3, 2, 1, 0], 500, 500),
        ([0, 0, 1, 1, 2, 2], [5, 4, 3, 2, 1, 0], 700, 500),
        ([0, 0, 0, 0, 0, 0], [0, 0, 1, 2, 3, 4], 500, 525),
        ([0, 0, 0, 0, 0, 0], [3, 2, 1, 0, 0, 0], 500, 525),
        ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], 700, 525),
        ([0, 1, 2, 2, 2, 2], [9, 8, 7, 6, 5, 6], 500, 500),
        ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], 500, 500),
    ],
)
def test_plus_drops_more_under_a_growing_gap_and_grows_more_under_a_growing_loss(
    gaps, losses, dropped, grown
):
    """The last four changes count, and only in the second half of ten epochs.

    More grows in proportion to what is regrown, and a loss that stays the same counts as growing.
    """
    method = FlyingBird(adaptive=True)
    method.begin(10, 1)
    for gap, loss in zip(gaps, losses):
        method.judged(float(gap), float(loss))
    assert method._exchange(1000, 0.5) == (dropped, grown)
    plain = FlyingBird()
    plain.begin(10, 1)
    plain._gaps, plain._losses = gaps, losses
    assert plain._exchange(1000, 0.5) == (500, 500)


@pytest.mark.parametrize("extra", [-10, 0, 10])
def test_plus_is_brought_to_the_budget_in_the_end(extra):
    model, method = network(), FlyingBird(adaptive=True)
    method.attach(model, BUDGET)
    with torch.no_grad():
        _, mask = masks.installed(model)["4.weight"]
        flat = mask.kept.view(-1)
        flat[(flat == (extra < 0)).nonzero().flatten()[: abs(extra)]] = extra > 0
    before = kept_of(model)
    # What would be cut without training is not selected, and said if there is nothing else.
    assert method.budget_met(model) is (extra <= 0)
    assert ("10 units of the last one are cut" in (method.doubt(model) or "")) is (extra > 0)
    method.settle(model)
    after = masks.kept_masks(model)
    assert sum(counts_of(after).values()) == int(0.3 * 270)
    moved = sum(int((after[n] ^ before[n]).sum()) for n in after)
    assert moved == abs(extra)


def test_what_plus_revives_in_the_end_starts_from_zero():
    model, method = network(), FlyingBird(adaptive=True)
    method.attach(model, BUDGET)
    before = kept_of(model)
    with torch.no_grad():
        for _, mask in masks.installed(model).values():
            mask.kept.view(-1)[mask.kept.flatten().nonzero().flatten()[:5]] = False
    method.settle(model)
    for name, (layer, mask) in masks.installed(model).items():
        revived = mask.kept & ~before[name]
        assert not layer.parameter[revived].any()
    assert any((m.kept & ~before[n]).any() for n, (_, m) in masks.installed(model).items())


# --- Robust Bird ------------------------------------------------------------------------------


def end_epochs(model, method, changes):
    """Ends an epoch after each change of the weights; whether the ticket was drawn, by epoch."""
    drawn = []
    for epoch, change in enumerate(changes):
        with torch.no_grad():
            change(model)
        method.epoch_ended(model, epoch)
        drawn.append(method.done(model))
    return drawn


def shuffle(model):
    for module in (model[0], model[4]):
        module.parametrizations.weight.original.normal_()


def stay(model):
    pass


def test_the_ticket_is_drawn_when_a_whole_window_of_masks_is_alike():
    model, method = network(), RobustBird(window=3)
    method.attach(model, BUDGET)
    changes = [shuffle, stay, shuffle, stay, stay, stay]
    assert end_epochs(model, method, changes) == [False, False, False, False, True, True]


def test_the_distance_is_the_share_of_units_that_differ():
    model, method = network(), RobustBird(window=2)
    method.attach(model, Budget(0.3, floor=0.0))
    weights = parameters_of(model)

    def top(values):
        ranked = torch.cat([v.abs().flatten() for v in values.values()])
        return ranked >= ranked.sort(descending=True).values[int(0.3 * 270) - 1]

    first = top(weights)
    end_epochs(model, method, [stay, shuffle])
    second = top(parameters_of(model))
    assert method.distance(model) == pytest.approx(float((first != second).float().mean()))


def test_the_newest_mask_is_compared_with_the_earlier_ones_and_they_not_with_each_other():
    model, method = nn.Sequential(nn.Linear(10, 1, bias=False)), RobustBird(0.3, window=3)
    method.attach(model, Budget(0.2))
    weight = model[0].parametrizations.weight.original
    drawn = []
    for kept in ([0, 1], [2, 3], [0, 2]):  # 0.4 apart, and each 0.2 from the last
        with torch.no_grad():
            weight.zero_()[:, kept] = 1.0
        method.epoch_ended(model, len(drawn))
        drawn.append(method.done(model))
    assert drawn == [False, False, True]
    assert method.distance(model) == pytest.approx(0.2)


def test_the_mask_of_the_last_epoch_is_the_ticket():
    model, method = network(), RobustBird(window=2)
    method.attach(model, BUDGET)
    end_epochs(model, method, [shuffle, shuffle])
    recent = {n: mask.recent[1].clone() for n, (_, mask) in masks.installed(model).items()}
    method.settle(model)
    for name, kept in masks.kept_masks(model).items():
        assert torch.equal(kept, recent[name])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlyingBird(drop=1.0), "drop 1"),
        (lambda: FlyingBird(updates=0), "updates = 0"),
        (lambda: FlyingBird(until=0.0), "until 0"),
        (lambda: RobustBird(tolerance=0.0), "tolerance 0"),
        (lambda: RobustBird(window=1), "window = 1"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
