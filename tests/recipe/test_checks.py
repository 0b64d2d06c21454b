# SPDX-License-Identifier: Apache-2.0
"""What a recipe is refused for before anything is loaded; those of the repository are not."""

import tomllib
from pathlib import Path

import pytest

from harprune.recipe import checks, pruning
from harprune.recipe.text import describe, make_recipe, read_recipe
from harprune.run.opening import check

ROOT = Path(__file__).parents[2]
GRIDS = (ROOT / "recipes" / "compare").glob("*.toml")
RECIPES = sorted(set((ROOT / "recipes").rglob("*.toml")) - set(GRIDS))
BENCHES = sorted((ROOT / "bench").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES + BENCHES, ids=lambda path: path.stem)
def test_every_recipe_of_the_repository_is_accepted(path, tmp_path):
    (tmp_path / "dense.safetensors").touch()  # most prune what another recipe has trained
    recipe = read_recipe(path, [f"model.weights={tmp_path / 'dense.safetensors'}"])
    checks.check(recipe)
    checks.require_effect(recipe)


def test_methods_are_compared_at_the_same_cost():
    """All recipes of a family but the dense one spend the same epochs after it."""
    families = {}
    for path in RECIPES:
        recipe = read_recipe(path)
        if recipe.model.weights is not None:
            families.setdefault(recipe.model.weights, []).append(recipe)
    assert len(families) == 2
    for family in families.values():
        assert len({r.prune.epochs + r.finetune.epochs for r in family}) == 1 < len(family)
        assert len({(r.prune.batch_size, r.data, r.objective, r.attack.size) for r in family}) == 1


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"method": {"name": "harpp"}}, "method.name = 'harpp' is unknown; choose one of harp, "),
        ({"method": {"gama": 1}}, "unknown key 'method.gama' of harp; the nearest known is 'me"),
        ({"method": {"gamma": -1}}, "method"),
        ({"method": {"gamma": "x"}}, "method.gamma = 'x': must be a number"),
        ({"method": {"name": "harp+s2ap+s2ap"}}, "method.name = 'harp+s2ap+s2ap' names a plug-in "),
        ({"method": {"name": "magnitude", "gamma": 1}}, "unknown key 'method.gamma' of magnitude"),
        ({"budget": {"allocation": "erkk"}}, "budget.allocation = 'erkk' is unknown; choose one"),
        ({"budget": {"allocation": "none.json"}}, "none.json is not an allocation"),
        ({"attack": {"attacks": ["autoatack"]}}, "attack 'autoatack' is unknown; choose among fg"),
        ({"attack": {"attacks": ["pgd-0"]}}, "attack 'pgd-0' is unknown; choose among"),
        ({"attack": {"attacks": ["pgd-"]}}, "attack 'pgd-' is unknown; choose among"),
        ({"model": {"weights": "none.pt"}}, "model.weights = 'none.pt': no such file; name a ch"),
        (
            {"parity": {"cosine_offset": True}, "finetune": {"schedule": "steps"}},
            "parity.cosine_offset is a form of the cosine, not of 'steps'",
        ),
        ({"parity": {"epsilon": True}, "threat": {"norm": "l2"}}, "parity.epsilon is a radius of"),
        (
            {"parity": {"epsilon": True}, "threat": {"epsilon": "4/255"}},
            "parity.epsilon has an epsilon and a step of its own, but threat.epsilon = '4/255'; le",
        ),
        (
            {"parity": {"epsilon": True}, "objective": {"step_size": 0.01}},
            "parity.epsilon has an epsilon and a step of its own, but objective.step_size = 0.01; ",
        ),
        (
            {"parity": {"epsilon": True}, "prune": {"objective": {"step_size": "2/255"}}},
            "parity.epsilon has an epsilon and a step of its own, but prune.objective.step_size =",
        ),
    ],
)
def test_the_check_refuses_what_a_later_stage_would(content, text):
    recipe = make_recipe(content)
    with pytest.raises(ValueError) as caught:
        checks.check(recipe)
    assert str(caught.value).startswith(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (
            {"objective": {"beta": 3}},
            "objective.beta = 3.0 has no effect with objective.name = 'pg",
        ),
        (
            {"finetune": {"optimiser": "adamw", "momentum": 0.8}},
            "finetune.momentum = 0.8 has no effect with finetune.optimiser = 'adamw'; leave it out",
        ),
        (
            {"finetune": {"epochs": 0, "averaging": 0.9}},
            "finetune.averaging has no effect with finetune.epochs = 0; leave it out",
        ),
        ({"prune": {"epochs": 0, "distillation": {}}}, "prune.distillation has no effect with pru"),
        (
            {"budget": {"multiply_add_share": 0.3}},
            "budget.multiply_add_share = 0.3 has no effect with budget.cost = 'parameters'; leave",
        ),
        (
            {"attack": {"dense": False, "dense_size": 10}},
            "attack.dense_size = 10 has no effect with attack.dense = false; leave it out",
        ),
        (
            {"method": {"learn_densities": False, "gamma": 0.1}},
            "method.gamma = 0.1 has no effect with learn_densities = false; leave it out",
        ),
        (
            {"method": {"start_density": 0.3, "start_factor": 2}},
            "method.start_factor = 2.0 has no effect beside start_density = 0.3; leave it out",
        ),
        (
            {"method": {"enforce_after": 5}, "prune": {"epochs": 5}},
            "method.enforce_after = 5 has no effect in 5 epochs; leave it out",
        ),
        (
            {"method": {"learn_scores": False, "decay_scores": True}},
            "method.decay_scores = True has no effect with learn_scores = false; leave it out",
        ),
        (
            {"method": {"train_weights": True, "train_batch_norm": True}},
            "method.train_batch_norm = True has no effect with train_weights = true, which trains",
        ),
    ],
)
def test_what_nothing_will_use_is_refused_in_a_new_run_alone(content, text, tmp_path):
    recipe = make_recipe(content)
    with pytest.raises(ValueError) as caught:
        check(recipe, tmp_path)
    assert str(caught.value).startswith(text)
    (tmp_path / "dense.safetensors").touch()
    check(recipe, tmp_path)


def test_defaults_that_are_written_down_pass():
    text = "\n".join(describe(notes={}))
    for more in (
        {"method": {"learn_densities": False, "gamma": 0.01}},
        {"finetune": {"epochs": 0}, "prune": {"optimiser": "adamw"}},
    ):
        checks.require_effect(make_recipe({**tomllib.loads(text), **more}))


def test_the_check_lets_parity_stand_beside_the_usual_epsilon():
    checks.check(make_recipe({"parity": {"epsilon": True}, "threat": {"epsilon": 8 / 255}}))


def test_the_check_lets_every_known_name_pass():
    for method in pruning.METHODS:
        for allocation in pruning.ALLOCATIONS:
            content = {"method": {"name": method}, "budget": {"allocation": allocation}}
            checks.check(make_recipe(content))
