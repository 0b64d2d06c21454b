# SPDX-License-Identifier: Apache-2.0
"""AutoAttack: the reference's result bit for bit, which part did what, and a quiet console."""

import logging
import random
import sys
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

from harprune.robustness.autoattack import SQUARE_TOLERANCE, AutoAttack, square_gain
from harprune.robustness.threat import L2, Linf


def images(model, count=16):
    x = torch.rand(count, 3, 6, 6)
    with torch.no_grad():
        y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 4
    return x, y


@pytest.fixture
def short_square(monkeypatch):
    """Square asks 300 times instead of 5000, whoever runs it: the walk there is the same."""
    from pyautoattack.square import SquareAttack

    perturb = SquareAttack.perturb

    def fewer(self, x, y):
        assert self.n_queries == 5000
        self.n_queries = 300
        try:
            return perturb(self, x, y)
        finally:
            self.n_queries = 5000

    monkeypatch.setattr(SquareAttack, "perturb", fewer)


@pytest.mark.parametrize("threat", [Linf(0.02), L2(0.15)], ids=repr)
def test_the_result_is_the_references_bit_for_bit(make_network, threat, short_square):
    from pyautoattack import AutoAttack as Reference

    model = make_network(4, width=8).eval()
    x, y = images(model)
    outcome = AutoAttack(threat, batch_size=6, seed=3).attack(model, x, y)
    options = {"norm": type(threat).__name__, "eps": threat.epsilon, "seed": 3}
    reference = Reference(model, version="standard", **options)
    reference.apgd_targeted.n_target_classes = reference.fab.n_target_classes = 3
    expected, _ = reference.run_standard_evaluation(x, y, batch_size=6)
    assert torch.equal(outcome.x_adv, expected)
    assert list(outcome.survivors) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    counts = [int(s.sum()) for s in (outcome.clean, *outcome.survivors.values())]
    assert counts == sorted(counts, reverse=True) and counts[0] == 15
    assert 0 < counts[-1] < 15
    last = outcome.survivors["square"]
    assert torch.equal(outcome.x_adv[last], x[last])
    assert torch.equal(model(outcome.x_adv).argmax(1) == y, last)
    assert (threat.distance(outcome.x_adv, x) <= threat.epsilon * (1 + 1e-5)).all()


def test_it_leaves_no_trace(make_network, capfd):
    model = make_network(4)
    model[0].weight.requires_grad_(False)
    model[4].weight.grad = torch.ones_like(model[4].weight)
    x, y = images(model.eval())
    model.train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    logger, tracer, random = logging.getLogger("auto-attack"), sys.gettrace(), torch.get_rng_state()
    before = (list(logger.handlers), logger.propagate, logger.level)
    AutoAttack(Linf(0.2))(model, x, y)
    assert torch.equal(torch.get_rng_state(), random)
    assert (list(logger.handlers), logger.propagate, logger.level) == before
    assert sys.gettrace() is tracer
    assert all(m.training for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 7
    assert torch.equal(model[4].weight.grad, torch.ones_like(model[4].weight))
    assert sum(p.grad is not None for p in model.parameters()) == 1
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert capfd.readouterr() == ("", "")


def test_a_forward_that_draws_meets_no_interruption(make_network, brief):
    def drawing(model, x):
        return model(x + 0.1 * (random.random() + np.random.rand() + torch.rand(())))

    model, attack, places = Wrapped(make_network(4).eval(), drawing), AutoAttack(Linf(0.02)), []
    x, y = images(model)
    whole = attack.attack(model, x, y, after_part=lambda place: places.append(deepcopy(place)))
    assert len(places) == 4 and whole.survivors["square"].any()
    for begun in places:
        again = attack.attack(model, x, y, begun=begun)
        assert torch.equal(again.x_adv, whole.x_adv)
        assert all(torch.equal(again.survivors[p], s) for p, s in whole.survivors.items())


@pytest.mark.parametrize(
    ("classes", "parts"),
    [
        (2, ["apgd-ce", "fab-t", "square"]),
        (3, ["apgd-ce", "apgd-dlr", "fab-t", "square"]),
        (6, ["apgd-ce", "apgd-t", "fab-t", "square"]),
    ],
)
def test_few_classes_are_handled_and_labelled(make_network, classes, parts):
    model = make_network(classes).eval()
    x = torch.rand(8, 3, 6, 6)
    y = model(x).argmax(1)
    outcome = AutoAttack(Linf(0.3)).attack(model, x, y)
    assert list(outcome.survivors) == parts
    assert not outcome.survivors["square"].any()
    assert any("not standard AutoAttack" in flag for flag in outcome.flags) == (classes < 4)


class Wrapped(nn.Module):
    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, x):
        return self.change(self.model, x)


def optimised(model, x):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).sum(), x)
    return model((x - 1e-4 * gradient).detach())


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        (lambda model, x: model(x).softmax(1), "probabilities instead of logits"),
        (lambda model, x: model(x + 0.01 * torch.randn_like(x)), "randomised output"),
        (lambda model, x: model((8 * x).round() / 8), "zero gradients"),
        (optimised, "optimisation at inference"),
    ],
    ids=["softmax", "noise", "rounding", "dynamic"],
)
def test_the_references_warnings_become_flags(make_network, change, flag, short_square):
    model = make_network(4).eval()
    bad = Wrapped(model, change)
    if flag == "optimisation at inference":
        # Only the check is wanted: no gradient passes such a forward, so the attacks cannot run.
        x, y = images(model)
        y = (bad(x).argmax(1) + 1) % 4
    else:
        x, y = images(bad, 4)
    assert flag in AutoAttack(Linf(0.02)).attack(bad, x, y).flags


def test_a_plain_model_has_no_flags_and_any_layout_or_precision_works(make_network):
    model = make_network(4).eval()
    x, y = images(model)
    attack = AutoAttack(Linf(0.2))
    outcome = attack.attack(model, x.contiguous(memory_format=torch.channels_last), y)
    assert outcome.flags == ()
    model.to(memory_format=torch.channels_last)
    assert attack(model, x, y).dtype == torch.float32
    assert attack(model.double(), x.double(), y).dtype == torch.float64


def test_all_images_wrong_already_is_no_error(make_network):
    model = make_network(4).eval()
    x, _ = images(model, 5)
    outcome = AutoAttack(Linf(0.1)).attack(model, x, (model(x).argmax(1) + 1) % 4)
    assert torch.equal(outcome.x_adv, x) and not outcome.clean.any()
    assert not any(s.any() for s in outcome.survivors.values())


def test_what_it_cannot_attack_is_refused(make_network):
    model = make_network(4).eval()
    x, y = images(model)
    with pytest.raises(ValueError, match=r"\(N, C, H, W\)"):
        AutoAttack(Linf(0.1))(model, x.flatten(1), y)
    with pytest.raises(ValueError, match="5 x 5"):
        AutoAttack(L2(0.1))(model, x[..., :4], y)
    with pytest.raises(ValueError, match="2 classes"):
        AutoAttack(Linf(0.1))(Wrapped(model, lambda m, x: m(x)[:, :1]), x, y * 0)
    with pytest.raises(ValueError, match="finite"):
        AutoAttack(Linf(0.1))(Wrapped(model, lambda m, x: m(x) / 0), x, y)
    with pytest.raises(ValueError, match="version"):
        AutoAttack(Linf(0.1), version="strong")
    with pytest.raises(ValueError, match="batch_size"):
        AutoAttack(Linf(0.1), batch_size=0)
    assert model[0].weight.requires_grad


def test_passes_add_up_the_parts():
    assert AutoAttack(Linf(0.1)).passes == 101 + 9 * 101 + 9 * 100


def test_squares_gain_is_what_the_gradients_had_left():
    def standing(count):
        return torch.arange(1000) < count

    honest = {"apgd-ce": standing(600), "fab-t": standing(500), "square": standing(498)}
    masked = {"apgd-ce": standing(600), "fab-t": standing(500), "square": standing(400)}
    assert square_gain(honest, 1000) == pytest.approx(0.002) and square_gain({}, 10) == 0
    assert (
        square_gain(masked, 1000) == pytest.approx(0.1)
        and square_gain(masked, 1000) > SQUARE_TOLERANCE
    )
