# SPDX-License-Identifier: Apache-2.0
"""Accuracies on the validation images, which select epochs and tell how a run fares."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from harprune.modes import eval_mode
from harprune.randomness import seeded
from harprune.recipe import adversarial
from harprune.robustness.images import subset
from harprune.run.opening import Run
from harprune.sparsity.execution import Twin
from harprune.training.splits import Split, to_float

BATCH = 250
_GUESSING = 1.2
"""Times the share of one class, up to which accuracy may be luck."""


def validate(run: Run, model: nn.Module, twin: Twin | None) -> tuple[float, float]:
    """Clean and PGD accuracy on the validation images, in [0, 1]; the same images each time."""
    clean, robust, _ = _judge(run, model, twin, run.materials.validation)
    return clean, robust


def overfitting(run: Run, model: nn.Module, twin: Twin | None) -> tuple[float, float]:
    """Robust accuracy on training minus validation images, and the robust validation loss."""
    _, seen, _ = _judge(run, model, twin, run.materials.train)
    _, unseen, loss = _judge(run, model, twin, run.materials.validation)
    return seen - unseen, loss


def validation_passes(run: Run) -> int:
    """Forward + backward passes of single images that `validate` takes."""
    return _passes(run, run.materials.validation)


def overfitting_passes(run: Run) -> int:
    """Forward + backward passes of single images that `overfitting` takes."""
    return _passes(run, run.materials.train) + _passes(run, run.materials.validation)


def _passes(run: Run, split: Split) -> int:
    section = run.recipe.validation
    return section.steps * len(subset(split.labels, section.size, run.recipe.seed))


def _judge(
    run: Run, model: nn.Module, twin: Twin | None, split: Split
) -> tuple[float, float, float]:
    """Clean accuracy, PGD accuracy and mean PGD loss on the same images of `split` each time."""
    section = run.recipe.validation
    attack = adversarial.attack(f"pgd-{section.steps}", adversarial.threat(run.recipe))
    index = subset(split.labels, section.size, run.recipe.seed)
    function = model if twin is None else twin.current()
    hits, loss = torch.zeros(2, dtype=torch.int64), 0.0
    random = seeded(run.recipe.seed, run.engine.device)
    with parametrize.cached(), eval_mode(function), random:
        for part in index.split(BATCH):
            x = to_float(split.images[part]).to(run.engine.device)
            y = split.labels[part].to(run.engine.device)
            hits[0] += _outcome(function, x, y)[0]
            correct, summed = _outcome(function, attack(function, x, y), y)
            hits[1] += correct
            loss += summed
    clean, robust = hits.tolist()
    return clean / len(index), robust / len(index), loss / len(index)


@torch.no_grad()
def _outcome(model: nn.Module, x: Tensor, y: Tensor) -> tuple[int, float]:
    """(images classified correctly, summed cross-entropy)."""
    logits = model(x)
    loss = nn.functional.cross_entropy(logits, y, reduction="sum")
    return int((logits.argmax(dim=1) == y).sum()), float(loss)


def percent(clean: float, robust: float) -> str:
    return f"clean {100 * clean:.2f} %, PGD {100 * robust:.2f} %"


def guesses(clean: float, classes: int) -> bool:
    """Whether a clean accuracy is no more than luck gives among so many classes."""
    return clean <= _GUESSING / classes
