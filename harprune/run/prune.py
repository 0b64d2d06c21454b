# SPDX-License-Identifier: Apache-2.0
"""`prune`: a network of your own, on images of your own, in one call."""

import copy
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from harprune.models.registry import require_module
from harprune.recipe import networks, pruning, training
from harprune.recipe.materials import Materials
from harprune.recipe.text import make_recipe
from harprune.reporting.records import GIVEN_IN_PYTHON
from harprune.robustness.threat import Linf, Threat
from harprune.run.evaluate import given_threat, require_place
from harprune.run.opening import load_network, open_run
from harprune.run.stages import run_until
from harprune.sparsity.audit import Audit
from harprune.training.splits import Images, as_split


@dataclass(frozen=True, repr=False)
class Pruned:
    """The pruned plain model, in eval mode, and the count of what it keeps."""

    model: nn.Module
    audit: Audit

    def __repr__(self) -> str:
        return f"Pruned({type(self.model).__name__}: {self.audit})"


def prune(
    model: nn.Module,
    train: Images,
    validation: Images,
    *,
    density: float,
    threat: Threat | None = None,
    method: str = "harp",
    pretrain_epochs: int = 0,
    prune_epochs: int = 20,
    finetune_epochs: int = 100,
    augmentation: str = "none",
    seed: int = 0,
    out: str | Path | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    quiet: bool = False,
) -> Pruned:
    """Prune a robust network and finetune what is left; `model` itself is not changed.

    Args:
        model: images (N, C, H, W) in [0, 1] -> logits; normalisation inside.
        train: images to learn from: a pair (images, labels) of arrays, images (N, C, H, W) in
            uint8 or float in [0, 1]; or a torch Dataset of pairs (image, label); or a `Split`.
        validation: images to select epochs on, likewise.
        density: fraction of the weights to keep, in (0, 1).
        threat: what to be robust against; Linf(8/255) if absent.
        method: one that `harprune doctor` lists, or module:Class of your own.
        pretrain_epochs: robust training before pruning; none for a network that is robust.
        augmentation: of `train`, anew in each epoch: "crop_flip" for photographs, or "none".
        out: a folder in which the run is kept, and continued after an interruption. Its report has
            an attack once `evaluate` was run with out = this folder / "attack" / "finetuned" and
            `harprune report` after it.
        options: further recipe sections, as `{"finetune": {"learning_rate": 0.02}}`.

    Raises:
        ValueError: whatever a recipe or the data refuse, in one line.
    """
    require_module(model)
    threat = given_threat(threat)
    require_place(out)
    if out is None and training.processes() > 1:
        raise ValueError("several processes share one run, which needs a folder; give out")
    content = {
        "name": type(model).__name__,
        "seed": seed,
        "data": {"name": GIVEN_IN_PYTHON, "augmentation": augmentation},
        "model": {"name": type(model).__name__},
        "threat": {"norm": "linf" if isinstance(threat, Linf) else "l2", "epsilon": threat.epsilon},
        "budget": {"density": density},
        "method": {"name": method},
        "pretrain": {"epochs": pretrain_epochs},
        "prune": {"epochs": prune_epochs},
        "finetune": {"epochs": finetune_epochs},
    }
    if not isinstance(options, Mapping | None):
        raise ValueError(
            f"options are a {type(options).__name__}; give sections by their names, as "
            "{'finetune': {'learning_rate': 0.02}}"
        )
    for section, values in (options or {}).items():
        _require_about_the_run(section, values)
        _require_not_said(section, values, content)
        content[section] = {**content.get(section, {}), **values}
    recipe = make_recipe(content, source="harprune.prune")
    materials = _materials(model, train, validation, trained=pretrain_epochs == 0)
    place = tempfile.TemporaryDirectory() if out is None else nullcontext(str(out))
    with (
        place as folder,
        open_run(recipe, folder, materials, command="harprune.prune", quiet=quiet) as run,
    ):
        # Without a folder there is nobody who could read a report.
        run_until(run, "finetune" if out is None else "report")
        pruned = load_network(run, "finetune").cpu().eval()
        return Pruned(pruned, pruning.budget(recipe, materials.example).audit(pruned))


def _require_about_the_run(section: str, values: Mapping[str, Any]) -> None:
    """Raises ValueError for keys of a recipe that speak of what is given in Python instead."""
    if not isinstance(values, Mapping) and "." in section:
        section, _, key = section.partition(".")
        raise ValueError(f"write options = {{{section!r}: {{{key!r}: {values!r}}}}}")
    if not isinstance(values, Mapping):
        raise ValueError(
            f"options[{section!r}] = {values!r} is no section; options are sections with their "
            "keys, as {'finetune': {'learning_rate': 0.02}}, and all else is an argument"
        )
    if section in ("model", "data", "attack"):
        key = next(iter(values), "")
        raise ValueError(
            f"options[{section!r}] with {key!r} would have no effect: network and images are those "
            "given, augmentation is an argument, and nothing is attacked here; leave it out"
        )


def _require_not_said(section: str, values: Mapping, content: Mapping) -> None:
    """Raises ValueError for an option that is an argument as well."""
    for key in values:
        if key in content.get(section, {}):
            raise ValueError(
                f"options[{section!r}][{key!r}] = {values[key]!r} is said by an argument of prune "
                f"already ({content[section][key]!r}); give it there"
            )


def _materials(model: nn.Module, train: Images, validation: Images, *, trained: bool) -> Materials:
    plain = networks.plain_copy(model)
    return Materials(
        train=as_split(train),
        validation=as_split(validation),
        test=None,
        num_classes=None,
        network=lambda: copy.deepcopy(plain),
        trained=trained,
        drawn=False,
    )
