# SPDX-License-Identifier: Apache-2.0
"""Methods in a run: what each asks of the stages, a method of one's own, and deaths on the way."""

import os
import random
import runpy
import sys
from pathlib import Path

import pytest

from harprune.methods.base import Method
from harprune.methods.flying_bird import FlyingBird
from harprune.methods.snip import SNIP
from harprune.recipe import checks
from harprune.recipe.materials import gather
from harprune.recipe.text import make_recipe, read_recipe
from harprune.reporting.records import read_run
from harprune.run.opening import open_run
from harprune.run.stages import run_until
from harprune.training import checkpoint

from .test_resume import EVERY_STEP, Fate, Killed, require_same

ROOT = Path(__file__).parents[2]
SHORT = (
    "pretrain.epochs=0", "prune.epochs=6", "execution.threads=1",
)  # fmt: skip


def attempt(folder, recipe):
    with open_run(recipe, folder, command="test") as run:
        run_until(run, "prune")


def ran(folder, *settings):
    """A run of the tiny recipe up to pruning; the epochs of that."""
    attempt(folder, read_recipe("tiny.toml", (*SHORT, *settings)))
    return checkpoint.load(folder / "pruned.safetensors")[1]["history"]


# Each of them keeps more between two steps than its masks and scores.
MEMORIES = {
    "flying-bird": ("method.adaptive=true", "method.growth=gradient", "method.updates=12"),
    "robust-bird": ("method.window=3",),
    "bcs": ("method.noise=1e-2",),
    "twinrep": ("method.prune_at=0.5",),
    "admm": ("method.updates=3",),
    "harp+s2ap": ("method.warm_up=0.2",),
}


@pytest.mark.parametrize("name", MEMORIES)
def test_a_run_that_dies_while_pruning_ends_like_one_that_does_not(name, here, monkeypatch):
    monkeypatch.setenv("GIT_DIR", os.devnull)
    settings = (*SHORT, *EVERY_STEP, f"method.name={name}", *MEMORIES[name])
    recipe = read_recipe("tiny.toml", (*settings, "prune.epochs=3"))
    attempt(here / "whole", recipe)
    fate = Fate(random.Random(name))
    monkeypatch.setattr("os.replace", fate)
    for _ in range(100):
        fate.live_again()
        fate.allowed = fate.dice.randint(1, 5)
        try:
            attempt(here / "killed", recipe)
            break
        except Killed:
            continue
    assert fate.deaths >= 2
    require_same(here / "killed", here / "whole")


@pytest.mark.parametrize("adversarial", [False, True])
def test_a_sample_is_shown_once_in_eval_mode_and_attacked_where_asked(
    adversarial, here, monkeypatch
):
    shown = []

    def observe(self, model, batches):
        assert not model.training
        shown.append(list(batches))
        self._scores = {
            n: layer.parameter.detach().abs() for n, layer in self._budget.layers(model).items()
        }

    monkeypatch.setattr(SNIP, "observe", observe)
    setting = f"method.adversarial={str(adversarial).lower()}"
    ran(here / "run", "method.name=snip", "method.batches=2", setting)
    ((first, second),) = shown
    clean = gather(read_recipe("tiny.toml")).train.images
    for x, y in (first, second):
        assert len(x) == len(y) == 20
        nearest = (clean[None] - x[:, None]).abs().flatten(2).amax(2).amin(1)
        assert nearest.max() == pytest.approx(8 / 255 if adversarial else 0.0, abs=1e-6)
    # Its gradient for each of 40 images, and before it one step of the attack.
    assert read_run(here / "run").scoring == 40 * (2 if adversarial else 1)


def test_a_sample_is_attacked_as_the_stage_attacks(here, monkeypatch):
    """TRADES starts near the image, and one step of 2/255 leads no further away."""
    shown = []
    monkeypatch.setattr(SNIP, "settle", lambda self, model: 1 / 0)
    monkeypatch.setattr(SNIP, "observe", lambda self, model, batches: shown.extend(batches))
    for name in ("pgd-at", "trades"):
        with pytest.raises(ZeroDivisionError):
            ran(here / name, "method.name=snip", "method.adversarial=true", "prune.epochs=0",
                f"objective.name={name}", "pretrain.epochs=0")  # fmt: skip
    clean = gather(read_recipe("tiny.toml")).train.images
    for (x, _), near in zip(shown, (False, True), strict=True):
        distance = (clean[None] - x[:, None]).abs().flatten(2).amax(2).amin(1)
        assert bool(distance.max() < 4 / 255) is near


def test_robust_bird_ends_its_search_early(here):
    history = ran(here / "run", "method.name=robust-bird", "method.window=2")
    assert len(history) == 2


def test_flying_bird_plus_is_told_how_the_network_overfits(here, monkeypatch):
    told = []
    monkeypatch.setattr(FlyingBird, "judged", lambda self, gap, loss: told.append((gap, loss)))
    plain = ran(here / "plain", "method.name=flying-bird")
    assert not told
    validation = ("validation.size=10", "validation.steps=3")
    plus = ran(here / "plus", "method.name=flying-bird", "method.adaptive=true", *validation)
    assert len(told) == 6
    assert plus[-1]["passes"] - plain[-1]["passes"] == 6 * 2 * 10 * 3
    assert all(-1.0 <= gap <= 1.0 and loss > 0.0 for gap, loss in told)


def test_the_second_pass_of_s2ap_is_counted(here):
    """One attack step and one pass, and from half of the training on one pass more."""
    passes = [
        ran(here / name, f"method.name={name}", *options)[-1]["passes"]
        for name, options in {"hydra": (), "hydra+s2ap": ("method.warm_up=0.5",)}.items()
    ]
    assert passes[1] / passes[0] == pytest.approx(1.25)


def test_pwoa_learns_from_the_dense_network(here):
    settings = ("pretrain.epochs=2", "pretrain.objective.name=natural", 'objective={name="pwoa"}')
    history = ran(here / "run", *settings, "method.name=admm", "prune.epochs=4")
    assert history[-1]["loss"] < history[0]["loss"]
    recipe = make_recipe({"objective": {"name": "pwoa"}})
    with pytest.raises(ValueError, match="pretraining has yet to make"):
        checks.check(recipe)


def test_the_example_of_a_method_of_ones_own_runs(monkeypatch, capsys):
    example = ROOT / "examples" / "add_a_method.py"
    monkeypatch.setattr(sys, "argv", [str(example), "1"])
    runpy.run_path(str(example), run_name="__main__")
    assert "kept 2580 of 25808 prunable weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_methods:Nothing", "defines no function 'Nothing'"),
        ("own_methods:function", "must be a dataclass derived from"),
        ("own_methods:Bare", "must be a dataclass derived from"),
        ("nowhere:Method", "cannot import 'nowhere'"),
        ("own_method", "choose one of harp, "),
    ],
)
def test_what_is_no_method_is_refused(name, message, here):
    (here / "own_methods.py").write_text("def function(): ...\nclass Bare: ...\n")
    with pytest.raises(ValueError, match=message):
        checks.check(make_recipe({"method": {"name": name}}))


def test_the_guide_names_every_verb_of_the_interface():
    guide = (ROOT / "docs" / "extending.md").read_text()
    verbs = [name for name in vars(Method) if not name.startswith("_")]
    assert len(verbs) > 10
    assert not [name for name in verbs if f"`{name}" not in guide]


def test_what_a_method_cannot_prune_is_refused_before_any_training(here):
    with pytest.raises(ValueError, match="set granularity to weight"):
        ran(here / "run", "method.name=bcs", "budget.granularity=filter", "pretrain.epochs=2")
    assert not (here / "run" / "dense.safetensors").exists()
