# SPDX-License-Identifier: Apache-2.0
"""What is refused before any training starts, so that no fault waits for hours to show."""

from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harprune.modes import eval_mode
from harprune.outcomes import load_evaluation
from harprune.recipe import adversarial, pruning, training
from harprune.recipe.networks import Materials
from harprune.recipe.schema import Budget, Objective, Recipe, Threat, Training
from harprune.robustness.images import subset
from harprune.robustness.threat import parse_epsilon
from harprune.sparsity.effective import require_zeros_kept
from harprune.sparsity.layers import require_weights_of_its_own
from harprune.training.schedules import make_schedule
from harprune.training.splits import Split, require_labels
from harprune.user_code import in_a_line


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


def rehearse(recipe: Recipe, materials: Materials) -> None:
    """Refuse, before training starts, what does not fit the images or the network.

    Raises:
        ValueError: batches larger than the training set, validation images of another shape, a
            network for other images or classes, or of which nothing is left to train, weights under
            another parametrisation, layer patterns that match nothing, an allocation of other
            layers, or a budget that the layers' floors exceed.
    """
    for part in ("train", "validation", "test"):
        if (split := getattr(materials, part)) is not None:
            require_labels(split.labels, materials.num_classes, part)
            require_pixels(split, part)
    if materials.train.shape != materials.validation.shape:
        raise ValueError(
            f"training images are {materials.train.shape}, validation images "
            f"{materials.validation.shape}; bring them to one shape"
        )
    stages = ("prune", "finetune") if materials.given else ("pretrain", "prune", "finetune")
    shown = pruning.method(recipe).sample is not None
    for name in stages:
        section = getattr(recipe, name)
        if not (section.epochs or (name == "prune" and shown)):
            continue
        if section.batch_size > len(materials.train):
            raise ValueError(
                f"{name}.batch_size = {section.batch_size} exceeds the {len(materials.train)} "
                "training images; lower it"
            )
        if section.batch_size % training.processes():
            raise ValueError(
                f"{name}.batch_size = {section.batch_size} does not divide among "
                f"{training.processes()} processes; make it a multiple of them"
            )
    model, limit = materials.network(), pruning.budget(recipe, materials.example)
    seen = torch.cat([materials.train.labels, materials.validation.labels])
    classes = materials.num_classes or int(seen.max()) + 1
    require_logits(model, materials.example, classes)
    if materials.test is not None and classes < 3 and "apgd-dlr" in recipe.attack.attacks:
        raise ValueError(
            f"attack.attacks names apgd-dlr, whose loss needs 3 classes, and there are {classes}; "
            "leave it out: apgd-ce and autoattack do with 2"
        )
    weights = [name for name in stages if name != "prune" and getattr(recipe, name).epochs]
    if weights and not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            f"{weights[0]} would train the network's parameters, of which none has requires_grad; "
            f"call model.requires_grad_(True), or set {weights[0]}.epochs to 0"
        )
    require_weights_of_its_own(model, include=limit.include, exclude=limit.exclude)
    require_zeros_kept(model, materials.example, include=limit.include, exclude=limit.exclude)
    limit.allocate(model, limit.density)
    limit.counts(model, dict.fromkeys(limit.layers(model), limit.density))
    pruning.method(recipe).check(model, limit)
    model.train()
    _logits(model, torch.cat([materials.example] * 2), " in training mode")


def require_comparable(folder: str | Path, recipe: Recipe, labels: Tensor) -> None:
    """Refuse, before anything is attacked, an evaluation that is not comparable to an earlier one.

    Args:
        folder: where the earlier one was kept.
        labels: of all test images of `recipe`.

    Raises:
        ValueError: the two differ in attacks, threat, seed or images.
    """
    before, section = load_evaluation(folder), recipe.attack
    if set(before.attacks) != set(section.attacks):
        raise ValueError(
            f"{folder} holds outcomes under {', '.join(before.attacks) or 'no attack'}, not under "
            f"{', '.join(section.attacks) or 'none'}; evaluate under the same attacks"
        )
    bound = repr(adversarial.threat(recipe))
    # On clean images alone neither the threat nor the start of an attack matters.
    if section.attacks and before.threat != bound:
        raise ValueError(
            f"{folder} holds outcomes under {before.threat or 'no stated threat'}, not under "
            f"{bound}; give both the same norm and epsilon"
        )
    if section.attacks and before.seed != section.seed:
        raise ValueError(
            f"{folder} holds outcomes with seed {before.seed}, not {section.seed}; evaluate with "
            "the same seed"
        )
    index = subset(labels, section.size, section.seed)
    for what, wanted in (("index", index), ("labels", labels[index])):
        if not np.array_equal(before.outcomes[what], wanted.numpy()):
            raise ValueError(
                f"{folder} ({before.size} images) and this evaluation ({len(index)} images) differ "
                f"in {what}; evaluate both on the same subset of the same data"
            )


def require_batch(images: Any) -> Tensor:
    """Images as a tensor in main memory; ValueError where they are no batch of floats."""
    wanted = "give float32 (N, C, H, W) in [0, 1]"
    if not isinstance(images, Tensor | np.ndarray):
        raise ValueError(f"images are a {type(images).__name__}; {wanted}")
    batch = torch.as_tensor(images).detach().cpu()
    if batch.dtype != torch.float32 or batch.ndim != 4:
        raise ValueError(
            f"images are {batch.dtype} {tuple(batch.shape)}; {wanted}, uint8 images divided by 255"
        )
    if not len(batch):
        raise ValueError(f"images are none at all; {wanted}")
    _require_unit(batch, "the")
    return batch


def require_pixels(split: Split, what: str) -> None:
    """Raises ValueError where images given as floats leave [0, 1], the unit of every epsilon."""
    if isinstance(split.images, Tensor) and split.images.dtype != torch.uint8:
        _require_unit(split.images, what)


def _require_unit(images: Tensor, what: str) -> None:
    low, high = (float(end) for end in images.aminmax())
    if not (low >= 0.0 and high <= 1.0):  # so that NaN fails it too
        raise ValueError(
            f"{what} images run from {low:.4g} to {high:.4g}; floats must lie in [0, 1]: scale "
            "them, and normalise inside the model (model.mean, model.std)"
        )


@torch.no_grad()
def require_logits(model: nn.Module, example: Tensor, classes: int | None) -> int:
    """How many logits a network gives for `example`, a batch of one.

    At least one for each class, where it is known how many there are.

    Raises:
        ValueError: it does not take images of this shape, or gives something else.
    """
    with eval_mode(model):
        logits = _logits(model, example, "")
    if not torch.isfinite(logits).all():
        raise ValueError(
            "the network's logits are not finite; its weights have diverged, or its normalisation "
            "divides by zero"
        )
    shape = tuple(logits.shape)
    if len(shape) != 2 and classes is None:
        raise ValueError(f"the network gives {shape} for one image; it must give logits (1, K)")
    if len(shape) != 2 or shape[1] < (classes or 0):
        raise ValueError(
            f"the network gives {shape} for one image of {classes} classes; it must give logits "
            f"of shape (1, {classes})"
        )
    return shape[1]


def _logits(model: nn.Module, images: Tensor, when: str) -> Tensor:
    try:
        logits = model(images)
    except Exception as error:  # whatever the network's own code raises, an assertion or else
        others = {p.dtype for p in model.parameters()} - {torch.float32}
        if others:
            raise ValueError(
                f"the network refuses float32 images ({in_a_line(error)}) and has weights of "
                f"{', '.join(sorted(map(str, others)))}; call model.float()"
            ) from error
        raise ValueError(
            f"the network refuses images of shape {tuple(images.shape[1:])}{when} "
            f"({in_a_line(error)}); choose another network or image size"
        ) from error
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"the network gives a {type(logits).__name__}{when}, not logits; wrap it in a module "
            "whose forward returns the logits alone"
        )
    return logits
