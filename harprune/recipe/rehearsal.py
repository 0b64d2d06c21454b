# SPDX-License-Identifier: Apache-2.0
"""What images and network are refused for before any training, so that no fault waits for hours."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harprune.modes import eval_mode
from harprune.recipe import pruning, training
from harprune.recipe.materials import Materials
from harprune.recipe.schema import Recipe
from harprune.sparsity.effective import require_zeros_kept
from harprune.sparsity.layers import require_weights_of_its_own
from harprune.training.splits import Split, require_labels
from harprune.user_code import in_a_line


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
    stages = ("prune", "finetune") if materials.trained else ("pretrain", "prune", "finetune")
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
