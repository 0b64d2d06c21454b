# SPDX-License-Identifier: Apache-2.0
"""HARP against its literal implementation: loss, gradients, gamma, ablations."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F
from torch.nn.utils import parametrize

from harprune.methods.base import Budget
from harprune.methods.harp import HARP
from harprune.models import create_model
from harprune.robustness.attacks import PGD
from harprune.robustness.objectives import PGDAT
from harprune.robustness.threat import Linf
from harprune.sparsity import allocation, masks, selection
from harprune.sparsity.audit import audit
from harprune.sparsity.execution import twin
from tests.oracles.literal_harp import (
    literal_gamma,
    literal_layers,
    literal_network,
    literal_penalty,
    literal_pgd,
)

TARGET, GAMMA, EPSILON, STEP, STEPS = 0.01, 0.01, 8 / 255, 2 / 255, 3


def small():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 9, 10),
    )  # fmt: skip


@pytest.mark.parametrize(("name", "batch"), [("resnet18", 2), ("vgg16_bn", 2)])
@pytest.mark.parametrize("on_twin", [False, True])
def test_loss_and_gradients_equal_the_literal_twin(name, batch, on_twin):
    torch.manual_seed(1)
    plain = create_model(name, 10).double()
    x, y = torch.rand(batch, 3, 32, 32, dtype=torch.float64), torch.arange(batch) % 10
    noise = (2 * torch.rand_like(x) - 1) * EPSILON
    model, budget = copy.deepcopy(plain), Budget(TARGET)
    method = HARP(gamma=GAMMA, train_weights=True)
    method.attach(model, budget)
    model.double()
    parts = masks.installed(model)
    scores = {n: m.scores.detach() for n, (_, m) in parts.items()}
    logits = {n: m.density.logit.detach() for n, (_, m) in parts.items()}
    literal = literal_network(plain, scores, logits, 0.1 * TARGET)

    literal.train()
    x_adv = literal_pgd(literal, x, y, epsilon=EPSILON, step=STEP, steps=STEPS, noise=noise)
    expected = F.cross_entropy(literal(x_adv), y) + literal_penalty(literal, TARGET, GAMMA, 0)
    expected.backward()

    attack = PGD(Linf(EPSILON), STEPS, STEP, start=lambda threat, x: (x + noise).clamp(0, 1))
    function = twin(model) if on_twin else None
    objective = PGDAT((lambda m, x, y: attack(function.current(), x, y)) if on_twin else attack)
    model.train()
    with parametrize.cached():
        loss = objective(model, x, y) + method.penalty(model)
        loss.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    for key, layer in literal_layers(literal).items():
        mask = parts[key][1]
        scale = layer.scores.grad.abs().max()
        assert torch.allclose(mask.scores.grad, layer.scores.grad, rtol=1e-9, atol=1e-9 * scale)
        assert mask.density.logit.grad.item() == pytest.approx(layer.logit.grad.item(), rel=1e-9)
        weight, expected = parts[key][0].parameter.grad, layer.layer.weight.grad
        assert torch.allclose(weight, expected, rtol=1e-9, atol=1e-9 * expected.abs().max())


def test_the_network_itself_is_trained_only_where_asked():
    model, budget = small(), Budget(0.1)
    for method in (HARP(), HARP(train_weights=True)):
        pruned = copy.deepcopy(model)
        network = {id(p) for p in pruned.parameters()}
        method.attach(pruned, budget)
        groups = method.trainable(pruned)
        decayed = {id(p) for g in groups if "weight_decay" not in g for p in g["params"]}
        assert decayed == (network if method.train_weights else set())
        assert len([p for g in groups for p in g["params"]]) == len(decayed) + 6


def test_a_density_thrown_to_one_comes_back():
    model, budget = small(), Budget(0.01)
    method = HARP(gamma=1.0)
    method.attach(model, budget)
    logits = [mask.density.logit for _, mask in masks.installed(model).values()]
    optimiser = torch.optim.SGD(logits, lr=0.1)
    with torch.no_grad():
        logits[0].fill_(200.0)
    for step in range(200):
        optimiser.zero_grad()
        method.penalty(model).backward()
        optimiser.step()
        method.step_ended(model, step)
    assert method.budget_met(model)


def hold_hardware_loss(method, monkeypatch, losses):
    remaining = iter(losses)
    current = {}

    def hardware_loss(model):
        return torch.tensor(current["loss"])

    monkeypatch.setattr(method, "hardware_loss", hardware_loss)
    return remaining, current


@pytest.mark.parametrize(
    "losses",
    [
        [9.0, 3.0, 0.5, 0.0, 0.2, 0.0],
        [0.0, 0.0],
        [1.0] * 5,
        [0.1, 0.00004, 0.3],
        [0.1, 0.00006, 0.0],
    ],
)
def test_gamma_grows_by_steps_until_an_epoch_ends_within_the_budget(losses, monkeypatch):
    method = HARP(gamma=0.03)
    remaining, current = hold_hardware_loss(method, monkeypatch, losses)
    weights = []
    for epoch, loss in enumerate(remaining):
        weights.append(method.weight)
        current["loss"] = loss
        method.epoch_ended(nn.Module(), epoch)
    assert weights == pytest.approx(literal_gamma(0.03, losses))


def test_gamma_goes_on_where_its_state_was_saved():
    first = HARP(gamma=0.5)
    first._steps, first._reached = 4, True
    second = HARP(gamma=0.5)
    second.load_state_dict(first.state_dict())
    assert (second.weight, second._reached) == (2.0, True)


def overrun_at(layers, logits, target):
    """The hardware loss and its slopes, written out: cost is sum n_l g(r_l) over sum n_l."""
    floor, total = 0.1 * target, sum(layer.size for layer in layers)
    sigmas = [torch.sigmoid(r) for r in logits]
    cost = sum(n.size * ((1 - floor) * s + floor) for n, s in zip(layers, sigmas)) / total
    slopes = [n.size * (1 - floor) * s * (1 - s) / total for n, s in zip(layers, sigmas)]
    return float(cost / target - 1), torch.stack(slopes) / target


def attached(target, **options):
    """A small network under HARP, its layers and logits."""
    torch.manual_seed(0)
    model, method = small().double(), HARP(**options)
    method.attach(model, Budget(target, allocation=allocation.uniform))
    model.double()
    parts = masks.installed(model).values()
    return model, method, [layer for layer, _ in parts], [m.density.logit for _, m in parts]


def test_an_enforced_budget_is_met_along_the_gradient_of_the_penalty():
    """As if gamma were the multiplier that meets it: no density is cut for another reason."""
    model, method, layers, logits = attached(0.1, enforce_after=0, start_density=0.1002)
    before = torch.stack([r.detach().clone() for r in logits])
    over, slopes = overrun_at(layers, before, 0.1)
    assert over == pytest.approx(0.002, rel=1e-3) and not method.budget_met(model)
    method.step_ended(model, 0)
    moved = before - torch.stack([r.detach() for r in logits])
    assert torch.allclose(moved, over * slopes / slopes.square().sum(), rtol=1e-2)
    assert method.budget_met(model)


@pytest.mark.parametrize("start", [0.02, 0.1, 0.5, 1.0])
def test_an_enforced_budget_is_met_from_anywhere_and_hardly_undercut(start):
    model, method, layers, logits = attached(0.01, enforce_after=0, start_density=start)
    method.step_ended(model, 0)
    over, _ = overrun_at(layers, [r.detach() for r in logits], 0.01)
    assert -1e-3 < over <= 5e-5
    held = [r.detach().clone() for r in logits]
    method.step_ended(model, 1)  # what is within the budget stays as it is
    assert all(torch.equal(a, b) for a, b in zip(held, logits))


def test_a_budget_is_enforced_after_so_many_epochs_and_after_a_resume():
    model, method, _, _ = attached(0.05, enforce_after=2)
    seen = []
    for epoch in range(3):
        method.step_ended(model, epoch)
        seen.append(method.budget_met(model))
        method.epoch_ended(model, epoch)
    assert seen == [False, False, True]
    resumed = HARP(enforce_after=2)
    resumed.load_state_dict(method.state_dict())
    other, _, _, _ = attached(0.05)
    resumed._budget, resumed._cost, resumed._overrun = method._budget, method._cost, method._overrun
    resumed.step_ended(other, 0)
    assert resumed.budget_met(other)
    earlier = HARP(enforce_after=2)
    earlier.load_state_dict({"steps": 1, "reached": False})  # as an earlier version wrote it
    assert not earlier._enforced


def test_by_default_gamma_alone_brings_the_densities_down():
    model, method, _, logits = attached(0.05)
    before = [r.detach().clone() for r in logits]
    for epoch in range(3):
        method.step_ended(model, epoch)
        method.epoch_ended(model, epoch)
    assert all(torch.equal(a, b) for a, b in zip(before, logits))


@pytest.mark.parametrize("density", [0.3, 0.05])
@pytest.mark.parametrize("share", [allocation.uniform, allocation.erk, allocation.lamp])
def test_settling_meets_the_budget_to_the_unit_whatever_was_learned(density, share):
    torch.manual_seed(0)
    model, method, budget = small(), HARP(), Budget(density, allocation=share)
    method.attach(model, budget)
    for _, mask in masks.installed(model).values():
        nn.init.normal_(mask.density.logit, std=3.0)
        nn.init.normal_(mask.scores)
    method.settle(model)
    x = torch.rand(2, 3, 8, 8)
    logits = model.eval()(x)
    masks.bake(model)
    counts = audit(budget.layers(model), density)
    assert counts.kept == counts.budget
    assert torch.equal(model(x), logits)


def test_training_moves_scores_and_densities_and_nothing_else():
    torch.manual_seed(0)
    model, method = small(), HARP()
    method.attach(model, Budget(0.1))
    held = {id(p) for g in method.trainable(model) for p in g["params"]}
    names = {n.rpartition(".")[2] for n, p in model.named_parameters() if id(p) in held}
    assert names == {"scores", "logit"}
    assert all(group["weight_decay"] == 0.0 for group in method.trainable(model))


def test_parity_switches_widen_what_is_trained_and_decayed():
    model = small()
    method = HARP(train_batch_norm=True, decay_scores=True, decay_densities=True)
    method.attach(model, Budget(0.1))
    groups = method.trainable(model)
    assert [len(g["params"]) for g in groups] == [3, 3, 2]
    assert all("weight_decay" not in g for g in groups)


@pytest.mark.parametrize(
    ("options", "trained"),
    [({"learn_densities": False}, "scores"), ({"learn_scores": False}, "logit")],
)
def test_ablations_train_one_kind_only(options, trained):
    model, method = small(), HARP(**options)
    method.attach(model, Budget(0.1))
    held = {id(p) for g in method.trainable(model) for p in g["params"]}
    names = {n.rpartition(".")[2] for n, p in model.named_parameters() if id(p) in held}
    assert names == {trained}


def test_densities_start_at_ten_times_the_target_or_where_told():
    # Nearly dense is 0.99, where the sigmoid still has a slope.
    for wanted, start in [(None, 0.2), (0.1, 0.1), (0.02, 0.02), (1.0, 0.99 * 0.998 + 0.002)]:
        model, method = small(), HARP(start_density=wanted)
        method.attach(model, Budget(0.02, allocation=allocation.uniform))
        assert method.metrics(model)["density"] == pytest.approx(start, rel=1e-4)
    for factor, start in [(1.0, 0.02), (3.0, 0.06)]:
        model, method = small(), HARP(start_factor=factor)
        method.attach(model, Budget(0.02, allocation=allocation.uniform))
        assert method.metrics(model)["density"] == pytest.approx(start, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"gamma": -1.0}, "gamma -1"), ({"enforce_after": -1}, "enforce_after -1"),
     ({"start_density": 2.0}, "start_density 2"),
     ({"start_factor": 0.0}, "start_factor 0 must be above 0"),
     ({"learn_scores": False, "learn_densities": False}, "trains nothing")],
)  # fmt: skip
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HARP(**options)


@pytest.mark.parametrize("on_host", [False, True])
def test_a_step_on_an_accelerator_asks_for_no_value(on_host, monkeypatch):
    # A fake tensor has no values: whoever asks for one, as the selection on the host does, fails.
    monkeypatch.setattr(selection, "_on_host", lambda scores: on_host)
    objective, method = PGDAT(PGD(Linf(EPSILON), STEPS, STEP)), HARP()
    with FakeTensorMode():
        model = small()
        method.attach(model, Budget(0.1, allocation=allocation.erk))
        x, y = torch.empty(4, 3, 8, 8), torch.empty(4, dtype=torch.int64)
        if on_host:
            with pytest.raises(DataDependentOutputException):
                objective(model, x, y)
        else:
            with parametrize.cached():
                (objective(model, x, y) + method.penalty(model)).backward()
            assert all(m.scores.grad is not None for _, m in masks.installed(model).values())
