# SPDX-License-Identifier: Apache-2.0
"""What a recipe by itself is refused for: what a later stage would refuse, what has no effect."""

from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

from harprune.recipe import adversarial, pruning
from harprune.recipe.networks import is_exported
from harprune.recipe.schema import Budget, Objective, Recipe, Threat, Training
from harprune.robustness.threat import parse_epsilon
from harprune.training.schedules import make_schedule


def check(recipe: Recipe, *, weights_follow: bool = False) -> None:
    """Refuse, before data are loaded or a folder is made, what a later stage would refuse.

    Args:
        weights_follow: the file of `model.weights` will be there when the recipe is run.

    Raises:
        ValueError: an unknown name, or a value that its owner does not take.
    """
    pruning.method(recipe)
    pruning.sharpness(recipe)
    pruning.allocate(recipe.budget.allocation)
    if recipe.parity.epsilon and recipe.threat.norm != "linf":
        raise ValueError(
            f"parity.epsilon is a radius of linf, but threat.norm = {recipe.threat.norm!r}; "
            "set one of them otherwise"
        )
    if recipe.parity.epsilon:
        _require_no_other_epsilon(recipe)
    if recipe.execution.attack_precision == "bf16" and not recipe.execution.twin:
        raise ValueError(
            "execution.attack_precision = 'bf16' is the twin's, and execution.twin = false leaves "
            "it out; set one of them otherwise"
        )
    bound = adversarial.threat(recipe)
    for name in recipe.attack.attacks:
        adversarial.attack(name, bound)
    for stage in (recipe.pretrain, recipe.prune, recipe.finetune):
        adversarial.objective(recipe, stage.objective or recipe.objective, None)
        make_schedule(stage.schedule, epochs=stage.epochs, offset=recipe.parity.cosine_offset)
    for stage in (recipe.pretrain, recipe.finetune):
        adversarial.perturbation(recipe, stage)
    for stage in (recipe.prune, recipe.finetune):
        if soft := stage.distillation:
            adversarial.distilled(
                recipe, stage.objective or recipe.objective, None, soft, lambda x: x
            )
    weights = recipe.model.weights
    if weights is None and recipe.model.weights_density is not None:
        raise ValueError(
            f"model.weights_density = {recipe.model.weights_density} is about the scores in "
            "model.weights; name that file, or leave it out"
        )
    first = recipe.pretrain.objective or recipe.objective
    if first.name == "pwoa" and recipe.pretrain.epochs and weights is None:
        raise ValueError(
            "objective.name = 'pwoa' learns from the dense network, which pretraining has yet to "
            "make; give pretrain.objective another name, or model.weights"
        )
    if weights is not None and not weights_follow and not Path(weights).is_file():
        raise ValueError(f"model.weights = {weights!r}: no such file; name a checkpoint")
    if weights is not None and is_exported(weights):
        raise ValueError(
            f"model.weights = {weights!r} is an exported network, not the weights of one; "
            f"`harprune evaluate --model {weights} --data DATA` takes it"
        )


def require_effect(recipe: Recipe, overrides: Sequence[str] = ()) -> None:
    """Refuse a value of `recipe` that nothing will use.

    A key at its default passes: whoever writes it down changes nothing. So does pretraining beside
    given weights, for a recipe may serve both ways; but not where `overrides` ask for it.

    Raises:
        ValueError: a value that has no effect beside the others.
    """
    for text in overrides if recipe.model.weights is not None else ():
        if text.partition("=")[0].strip().split(".")[0] == "pretrain":
            raise ValueError(
                f"--set {text!r} has no effect with model.weights = {recipe.model.weights!r}, "
                "which is the dense network; leave it out"
            )
    for name, section in _objectives(recipe).items():
        _require_effect_of_loss(name, section)
    for name in ("pretrain", "prune", "finetune"):
        stage = getattr(recipe, name)
        if stage.optimiser == "adamw" and stage.momentum != Training().momentum:
            raise ValueError(
                f"{name}.momentum = {stage.momentum} has no effect with {name}.optimiser = "
                "'adamw'; leave it out"
            )
        for key in OF_TRAINING if stage.epochs == 0 else ():
            if getattr(stage, key, None) is not None:
                raise ValueError(f"{name}.{key} has no effect with {name}.epochs = 0; leave it out")
    share = recipe.budget.multiply_add_share
    if recipe.budget.cost != "mixed" and share != Budget().multiply_add_share:
        raise ValueError(
            f"budget.multiply_add_share = {share} has no effect with budget.cost = "
            f"{recipe.budget.cost!r}; leave it out, or set budget.cost to 'mixed'"
        )
    if recipe.attack.dense_size is not None and not recipe.attack.dense:
        raise ValueError(
            f"attack.dense_size = {recipe.attack.dense_size} has no effect with attack.dense = "
            "false; leave it out"
        )
    pruning.require_effect(recipe)


OF_TRAINING = ("averaging", "awp", "distillation")
"""Keys of a stage that ask for more than its usual training."""
_KEYS_OF_LOSSES = {
    "pgd-at": {"steps", "step_size"},
    "trades": {"steps", "step_size", "beta"},
    "mart": {"steps", "step_size", "beta"},
    "free": {"replays"},
    "pwoa": {"pwoa"},
}


def _objectives(recipe: Recipe) -> dict[str, Objective]:
    """The losses that a recipe names, by where it does."""
    names = ("objective", "pretrain.objective", "prune.objective", "finetune.objective")
    found = {name: attrgetter(name)(recipe) for name in names}
    return {name: section for name, section in found.items() if section is not None}


def _require_effect_of_loss(name: str, section: Objective) -> None:
    """Raises ValueError for a key of a loss other than the one that is named."""
    usual, known = Objective(), _KEYS_OF_LOSSES.get(section.name, set())
    for key in Objective.model_fields:
        value = getattr(section, key)
        if key != "name" and key not in known and value != getattr(usual, key):
            raise ValueError(
                f"{name}.{key} = {value!r} has no effect with {name}.name = {section.name!r}; "
                "leave it out"
            )


def _require_no_other_epsilon(recipe: Recipe) -> None:
    """Raises ValueError for an epsilon or a step that parity.epsilon would override unseen."""
    given = {}
    if parse_epsilon(recipe.threat.epsilon) != parse_epsilon(Threat().epsilon):
        given["threat.epsilon"] = recipe.threat.epsilon
    for name, section in _objectives(recipe).items():
        if section.step_size is not None:
            given[f"{name}.step_size"] = section.step_size
    if given:
        key, value = next(iter(given.items()))
        raise ValueError(
            f"parity.epsilon has an epsilon and a step of its own, but {key} = {value!r}; "
            "leave one of them out"
        )
