# SPDX-License-Identifier: Apache-2.0
"""Recipes as text: what is refused, in which words; what a recipe prints reads back."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harprune.methods.base import Budget
from harprune.models import create_model
from harprune.recipe import pruning
from harprune.recipe.pruning import method_notes
from harprune.recipe.schema import Recipe, Training
from harprune.recipe.text import (
    as_toml,
    describe,
    make_recipe,
    overridden,
    read_recipe,
)
from harprune.sparsity import masks


@pytest.mark.parametrize("name", ["harp", "hydra", "rst"])
def test_weight_decay_says_which_methods_decay_scores(name):
    method, model = pruning.METHODS[name](), create_model("small_cnn", 4, width=4)
    method.attach(model, Budget(0.1))
    scores = {id(mask.scores) for _, mask in masks.installed(model).values()}
    decayed = [group for group in method.trainable(model) if "weight_decay" not in group]
    decays = any(id(parameter) in scores for group in decayed for parameter in group["params"])
    said = Training.model_fields["weight_decay"].description
    assert (f"{name} always decays its scores" in " ".join(said.split())) == decays


def refusal(content: dict, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        make_recipe(content, overrides)
    text = str(caught.value)
    assert "\n" not in text and text.startswith(("recipe: ", "--set"))
    return text.removeprefix("recipe: ")


@pytest.mark.parametrize(
    ("content", "wrong", "nearest"),
    [
        ({"sead": 1}, "sead", "seed"),
        ({"methd": {}}, "methd", "method"),
        ({"budget": {"densty": 0.1}}, "budget.densty", "budget.density"),
        ({"pretrain": {"epoch": 1}}, "pretrain.epoch", "pretrain.epochs"),
        ({"prune": {"objective": {"betta": 1}}}, "prune.objective.betta", "prune.objective.beta"),
        ({"density": 0.1}, "density", "budget.density"),
        ({"attack": {"epsilon": 0.1}}, "attack.epsilon", "threat.epsilon"),
        ({"pretrain": {"distillation": {}}}, "pretrain.distillation", "prune.distillation"),
        ({"prune": {"averaging": 0.9}}, "prune.averaging", "pretrain.averaging"),
        ({"finetune": {"awp": {"radios": 1}}}, "finetune.awp.radios", "finetune.awp.radius"),
        ({"zzzz": 1}, "zzzz", "seed"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(content, wrong, nearest):
    text = refusal(content)
    assert text.startswith(f"unknown key {wrong!r}; the nearest known is ")
    if wrong != "zzzz":
        assert text.endswith(repr(nearest))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"budget": {"density": 0}}, "budget.density = 0: must lie strictly between 0 and 1; "),
        ({"budget": {"density": 1.5}}, "budget.density = 1.5: must lie strictly between 0 and 1; "),
        ({"threat": {"epsilon": "8/0"}}, "threat.epsilon = '8/0' is not a number; write a fract"),
        ({"threat": {"epsilon": "abc"}}, "threat.epsilon = 'abc' is not a number; write a fract"),
        ({"threat": {"epsilon": -0.1}}, "threat.epsilon = -0.1 must be finite and above 0; give"),
        ({"threat": {"epsilon": "-8/255"}}, "threat.epsilon = '-8/255': epsilon = -0.0313"),
        ({"threat": {"epsilon": 8}}, "threat.epsilon = 8 exceeds 1, the whole pixel range; in"),
        ({"threat": {"epsilon": [1]}}, "threat.epsilon = [1]: must be a number"),
        ({"threat": {"norm": "l1"}}, "threat.norm = 'l1': must be 'linf' or 'l2'"),
        ({"objective": {"step_size": "2/0"}}, "objective.step_size = '2/0': epsilon = '2/0' is n"),
        ({"prune": {"objective": {"name": "pgd"}}}, "prune.objective.name = 'pgd': must be 'nat"),
        ({"prune": {"objective": 3}}, "prune.objective = 3 must be a section; write its keys und"),
        ({"data": "digits"}, "data = 'digits' must be a section; write its keys under [data]"),
        ({"pretrain": {"epochs": -1}}, "pretrain.epochs = -1: must be greater than or equal to 0"),
        ({"pretrain": {"epochs": 1.5}}, "pretrain.epochs = 1.5: must be a whole number"),
        ({"attack": {"size": 0}}, "attack.size = 0: must be greater than or equal to 1"),
        ({"attack": {"seed": -1}}, "attack.seed = -1: must be greater than or equal to 0"),
        ({"model": {"mean": [0.5, "x"]}}, "model.mean.1 = 'x': must be a number"),
        ({"finetune": {"schedule": "cosin"}}, "finetune.schedule = 'cosin': must be 'cosine', "),
        ({"finetune": {"learning_rate": float("nan")}}, "finetune.learning_rate = nan: must be a"),
        ({"finetune": {"epochs": True}}, "finetune.epochs = True: must be a number"),
        ({"threat": {"epsilon": False}}, "threat.epsilon = False: must be a number"),
        ({"prune": True}, "prune = True must be a section; write its keys und"),
        ({"method": {"gamma": float("nan")}}, "method.gamma = nan: must be a finite number"),
        ({"finetune": {"averaging": 1}}, "finetune.averaging = 1: must be less than 1"),
        ({"data": {"validation": 0}}, "data.validation = 0: must be greater than 0"),
        ({"data": {"image_size": 9999}}, "data.image_size = 9999: must be less than or equal to "),
        ({"model": {"mean": 3}}, 'model.mean = 3: must be a list, as [1, 2] or ["a", "b"]'),
        ({"attack": {"dense": 3}}, "attack.dense = 3: must be true or false"),
        ({"name": 3}, "name = 3: must be text, in quotes"),
        ({"name": "x" * 500, "seed": [0] * 500}, "seed = [0, 0, 0"),
    ],
)
def test_a_wrong_value_is_named_with_its_rule(content, text):
    found = refusal(content)
    assert found.startswith(text)
    assert len(found) < 250


def test_overrides_are_toml_and_bare_words_are_strings():
    overrides = ("seed=3", "threat.epsilon=8/255", "attack.attacks=['fgsm']", "method.name = hydra")
    content = {"prune": {"objective": {"name": "trades"}}}
    recipe = make_recipe(content, (*overrides, "prune.objective.beta=2"))
    assert recipe.seed == 3
    assert recipe.threat.epsilon == "8/255"
    assert recipe.attack.attacks == ("fgsm",)
    assert recipe.method.name == "hydra"
    assert recipe.prune.objective.beta == 2.0
    assert content == {"prune": {"objective": {"name": "trades"}}}


@pytest.mark.parametrize("text", ["seed", "=3", ".seed=3", "budget.=3", "", "seed.x=1"])
def test_a_malformed_override_is_refused(text):
    assert repr(text) in refusal({"seed": 1}, text)


def test_a_file_that_is_no_recipe_is_named(tmp_path):
    garbled, binary = tmp_path / "garbled.toml", tmp_path / "binary.toml"
    garbled.write_text("name = \n[")
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (garbled, binary, tmp_path / "none.toml", tmp_path):
        with pytest.raises(ValueError, match=f"recipe {path} cannot be read: "):
            read_recipe(path)


def test_a_byte_order_mark_is_no_fault(tmp_path):
    (tmp_path / "r.toml").write_text("seed = 4\n", encoding="utf-8-sig")
    assert read_recipe(tmp_path / "r.toml").seed == 4


def test_the_description_is_itself_the_default_recipe():
    text = "\n".join(describe(notes={"method": pruning.method_notes()}))
    assert make_recipe(tomllib.loads(text)) == Recipe()
    assert "One of: cosine, one_cycle, steps, constant.\n" in text
    assert "# harp, hydra: also train scale and shift of batch norm (parity).\n" in text
    uncommented = text.replace("# objective =", "").replace("# gamma =", "gamma =")
    assert make_recipe(tomllib.loads(uncommented)).method.options == {"gamma": 0.01}


def test_every_field_is_documented():
    lines = list(describe(notes={}))
    assert all(line != "# " for line in lines)
    keys = [line for line in lines if " =" in line and not line.startswith(("# ", "\n"))]
    assert len(keys) > 40


_VALUES = st.one_of(
    st.booleans(),
    st.integers(-(2**53), 2**53),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=("Cs", "Cc"))),
    st.lists(st.integers(0, 9)),
)


@given(
    st.dictionaries(
        st.sampled_from("abcdef"),
        _VALUES
        | st.dictionaries(
            st.sampled_from("xyz"), _VALUES | st.dictionaries(st.sampled_from("uv"), _VALUES)
        ),
    )
)
def test_what_is_written_as_toml_reads_back(content):
    assert tomllib.loads("\n".join(as_toml(content))) == content


def test_another_method_does_not_inherit_options():
    content = {"method": {"name": "harp", "gamma": 0.05}}
    kept = overridden(content, ["method.name=harp"])["method"]
    assert kept == {"name": "harp", "gamma": 0.05}
    assert overridden(content, ["method.name=hydra"])["method"] == {"name": "hydra"}
    given = ["method.gamma=0.1", "method.name=mine:Own"]
    assert overridden(content, given)["method"] == {"name": "mine:Own", "gamma": 0.1}
    whole = overridden(content, ["method={name='snip', batches=2}"])["method"]
    assert whole == {"name": "snip", "batches": 2}


def test_every_option_of_a_method_has_its_meaning():
    notes = method_notes()
    text = "\n".join(notes)
    assert "harp: step of the penalty's weight; in epoch e (from 0) the weight is (e + 1)" in text
    assert len(notes) % 2 == 0 and not any(note.endswith(": ") for note in notes)
