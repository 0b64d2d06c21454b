# SPDX-License-Identifier: Apache-2.0
"""S2AP: the step it takes, written out; and where it may be used."""

import copy
from functools import partial

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.nn import functional as F

from harprune.methods.base import Budget
from harprune.methods.hydra import HYDRA
from harprune.methods.s2ap import S2AP
from harprune.recipe import adversarial, checks, pruning
from harprune.recipe.text import make_recipe
from harprune.robustness.attacks import PGD
from harprune.robustness.objectives import PGDAT
from harprune.robustness.threat import Linf
from harprune.sparsity import masks
from harprune.training.batches import Batches
from harprune.training.loop import fit
from harprune.training.schedules import constant
from harprune.training.splits import from_arrays

RATE, RADIUS = 0.3, 0.2
X, Y = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


def scored():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
    HYDRA().attach(model, Budget(0.3))
    return model


def scores_of(model):
    return [mask.scores for _, mask in masks.installed(model).values()]


def train(model, *, loss, nearby, epochs=1):
    fit(
        model,
        Batches(from_arrays(X, Y), 8, seed=0),
        loss=loss,
        optimiser=torch.optim.SGD(scores_of(model), lr=RATE),
        schedule=constant,
        epochs=epochs,
        fabric=Fabric(accelerator="cpu", devices=1),
        seed=0,
        nearby=nearby,
    )


def natural(model, x, y):
    return F.cross_entropy(model(x), y)


def test_the_gradient_is_taken_at_the_worst_scores_nearby_and_applied_here():
    model = scored()
    literal = copy.deepcopy(model)
    train(model, loss=natural, nearby=partial(S2AP(RADIUS, warm_up=0.0).nearby, model))

    start = [s.detach().clone() for s in scores_of(literal)]
    ascent = torch.autograd.grad(natural(literal, X, Y), scores_of(literal))
    for s, g in zip(scores_of(literal), ascent):
        s.data += RADIUS * s.data.norm() / g.norm() * g
    gradients = torch.autograd.grad(natural(literal, X, Y), scores_of(literal))
    differing = 0
    for s, before, g, plain in zip(scores_of(model), start, gradients, ascent):
        assert torch.allclose(s, before - RATE * g, atol=1e-7)
        differing += not torch.allclose(g, plain)
    assert differing


def test_without_a_gradient_nothing_moves_and_after_an_error_everything_is_back():
    model = scored()
    before = [s.detach().clone() for s in scores_of(model)]
    for s in scores_of(model):
        s.grad = torch.zeros_like(s)
    scores_of(model)[0].grad += 1.0
    with pytest.raises(RuntimeError, match="inside"), S2AP(0.5).nearby(model, 1.0):
        assert not torch.equal(scores_of(model)[0], before[0])
        assert torch.equal(scores_of(model)[1], before[1])
        raise RuntimeError("inside")
    assert all(torch.equal(s, b) for s, b in zip(scores_of(model), before))


def test_the_warm_up_is_plain_training():
    plain, warming = scored(), scored()
    warming.load_state_dict(plain.state_dict())
    calls = []

    def nearby(progress):
        calls.append(progress)
        return S2AP(RADIUS, warm_up=0.99).nearby(warming, progress)

    train(plain, loss=natural, nearby=lambda progress: None, epochs=3)
    train(warming, loss=natural, nearby=nearby, epochs=3)
    assert calls == pytest.approx([0, 1 / 3, 2 / 3])
    assert all(torch.equal(a, b) for a, b in zip(scores_of(plain), scores_of(warming)))


def test_both_passes_meet_the_same_adversarial_images_found_once():
    seen, attacks = [], []

    def attack(model, x, y):
        attacks.append(x)
        return PGD(Linf(0.1), 1)(model, x, y)

    objective = adversarial.attacked_once(PGDAT(attack))
    model = scored()

    def loss(model, x, y):
        hook = model.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
        value = objective(model, x, y)
        hook.remove()
        return value

    train(model, loss=loss, nearby=partial(S2AP(RADIUS, warm_up=0.0).nearby, model), epochs=2)
    assert len(attacks) == 2
    # Per epoch: one forward pass of the attack, then one in each of the two passes.
    first, second = seen[1:3], seen[4:6]
    assert torch.equal(*first) and torch.equal(*second) and not torch.equal(first[0], second[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"method": {"name": "magnitude+s2ap"}}, "s2ap perturbs scores"),
        ({"method": {"name": "harp+s2ap", "learn_scores": False}}, "s2ap perturbs scores"),
        ({"method": {"name": "harp+s3ap"}}, "'s3ap' is no plug-in; choose one of s2ap"),
        ({"method": {"name": "harp+s2ap", "radius": 0}}, "radius"),
        ({"method": {"name": "harp", "radius": 0.1}}, "unknown key 'method.radius' of harp"),
        ({"method": {"name": "harp+s2ap", "radios": 1}}, "nearest known is 'method.radius'"),
        ({"method": {"name": "hydra+s2ap"}, "objective": {"name": "free"}}, "second pass"),
        ({"method": {"name": "harp+s2ap", "warm_up": 1.0}}, "warm_up 1"),
    ],
)
def test_a_wrong_use_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        checks.check(make_recipe(content))


def test_a_method_of_ones_own_says_whether_it_trains_scores(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "methods_of_s2ap_tests.py").write_text(
        "from dataclasses import dataclass\n"
        "from harprune.methods.hydra import HYDRA\n"
        "from harprune.methods.oneshot import Magnitude\n"
        "@dataclass(eq=False)\nclass Scored(HYDRA): ...\n"
        "@dataclass(eq=False)\nclass Unscored(Magnitude): ...\n"
    )
    checks.check(make_recipe({"method": {"name": "methods_of_s2ap_tests:Scored+s2ap"}}))
    with pytest.raises(ValueError, match="this method trains none"):
        checks.check(make_recipe({"method": {"name": "methods_of_s2ap_tests:Unscored+s2ap"}}))


def test_options_reach_the_method_and_the_plug_in():
    content = {"method": {"name": "harp+s2ap", "gamma": 0.3, "radius": 0.05, "warm_up": 0.5}}
    recipe = make_recipe(content)
    checks.check(recipe)
    assert pruning.method(recipe).gamma == 0.3
    assert pruning.sharpness(recipe) == S2AP(0.05, 0.5)
    assert pruning.sharpness(make_recipe({})) is None
