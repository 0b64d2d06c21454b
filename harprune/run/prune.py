# SPDX-License-Identifier: Apache-2.0
"""The package in two calls: `prune` your network, `evaluate` any network."""

import copy
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harprune.arguments import require_text, require_whole
from harprune.files import make_folder
from harprune.kernels import Backend
from harprune.models.registry import require_module
from harprune.outcomes import Evaluation
from harprune.recipe import adversarial, checks, networks, pruning, training
from harprune.recipe.networks import Materials
from harprune.recipe.schema import Recipe
from harprune.recipe.text import make_recipe
from harprune.reporting.records import GIVEN_IN_PYTHON
from harprune.robustness.evaluation import device_of
from harprune.robustness.identity import model_digest
from harprune.robustness.threat import Linf, Threat, require_threat
from harprune.run.console import Console
from harprune.run.evaluate import chosen, judge
from harprune.run.folder import Run, remove_litter
from harprune.run.lock import lock
from harprune.run.opening import Workshop, check, load_network
from harprune.run.stages import run_until
from harprune.sparsity.audit import Audit
from harprune.sparsity.execution import require_backend
from harprune.training.splits import Images, as_split, to_float


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
    threat = _threat(threat)
    _require_place(out)
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
    materials = _materials(model, train, validation, given=pretrain_epochs == 0)
    check(recipe, out)
    checks.rehearse(recipe, materials)
    engine = training.fabric(recipe.execution)
    place = tempfile.TemporaryDirectory() if out is None else nullcontext(str(out))
    with place as folder, Run(folder, recipe, command="harprune.prune") as run:
        run.require_same({**materials.digests(), "dense network": model_digest(model)})
        console = Console(run.folder / "log.txt", quiet=quiet)
        shop = Workshop(run, materials, engine, console)
        # Without a folder there is nobody who could read a report.
        run_until(shop, "finetune" if out is None else "report")
        pruned = load_network(shop, "finetune").cpu().eval()
        return Pruned(pruned, pruning.budget(recipe, materials.example).audit(pruned))


def evaluate(
    model: nn.Module,
    test: Images,
    *,
    attacks: Sequence[str] = ("autoattack",),
    threat: Threat | None = None,
    size: int | None = None,
    seed: int = 0,
    batch_size: int = 250,
    out: str | Path | None = None,
    name: str = "model",
    execution: Backend = "auto",
    twin: bool = True,
    quiet: bool = False,
) -> Evaluation:
    """Clean accuracy and accuracy under each attack, with intervals, checks and flags.

    Args:
        test: images as `prune` takes them.
        attacks: fgsm, pgd-STEPS, cw-STEPS, apgd-ce, apgd-dlr, autoattack.
        threat: Linf(8/255) if absent.
        size: number of images, drawn by `seed`; all if absent.
        out: a folder for per-image outcomes, from which an interrupted evaluation goes on; refused
            while another process works in it.
        execution: what runs the attacks on a CPU, as a recipe's execution.backend; verdicts are
            always the model's own.
        twin: whether attacks run on an equivalent of the model, batch norm folded and masks
            multiplied out, on the kernels if `execution` has it so; else on the plain model, in
            torch.

    Raises:
        ValueError: an unknown attack, values of another kind, images or a network that do not fit,
            execution "sparse" without the twin.
    """
    require_module(model)
    _require_place(out)
    require_whole("seed", seed)
    require_whole("batch_size", batch_size, 1)
    require_text("name", name, "model")
    if execution == "sparse" and not twin:
        raise ValueError(
            "execution = 'sparse' runs the twin, and twin = False leaves it out; give execution = "
            "'auto', or leave out twin = False"
        )
    require_backend(execution)
    threat = _threat(threat)
    attacks = (attacks,) if isinstance(attacks, str) else attacks
    if not isinstance(attacks, Sequence):
        raise ValueError(f"attacks = {attacks!r} must be names in a list, as ['autoattack']")
    for each in attacks:
        adversarial.attack(each, threat)
    split = as_split(test)
    checks.require_labels(split.labels, None, "test")
    checks.require_pixels(split, "test")
    example = to_float(split.images[torch.tensor([0])])
    example = example.to(device_of(model))
    checks.require_logits(model, example, int(split.labels.max()) + 1)
    console = Console(quiet=quiet)
    index = chosen(split.labels, size, seed, console)
    with _kept_in(out):
        return judge(
            model,
            split,
            attacks=attacks,
            threat=threat,
            index=index,
            seed=seed,
            batch_size=batch_size,
            folder=out,
            execution=execution,
            twin=twin,
            console=console,
            name=name,
        )


def evaluate_recipe(
    recipe: Recipe, out: str | Path | None = None, *, against: str | Path | None = None
) -> Evaluation:
    """Evaluate the network of a recipe, with the weights it names, as its attack section says.

    The model may be a file that `harprune export` made.

    Args:
        against: the folder of an earlier evaluation, to which the caller will compare this one.

    Raises:
        ValueError: whatever the recipe, the data or the weights refuse; a model without weights,
            or for other images; an evaluation of which `against` is no repetition.
    """
    checks.check(recipe)
    networks.require_no_folder(recipe.model.name)
    held = networks.exported(recipe.model) if networks.is_exported(recipe.model.name) else None
    if recipe.model.weights is None and held is None:
        raise ValueError(
            f"model.weights is missing: name the weights of {recipe.model.name}, or give as the "
            "model a file that `harprune export` made"
        )
    engine = training.fabric(recipe.execution)
    dataset = networks.load_data(recipe.data)
    if against is not None:
        checks.require_comparable(against, recipe, dataset.test.labels)
    if held is None:
        model = networks.network(recipe.model, dataset, recipe.seed)
    else:
        model = networks.in_torch(held, recipe.model.name, dataset)
    example = to_float(dataset.test.images[torch.tensor([0])])
    checks.require_logits(model, example, dataset.num_classes)
    model, section = model.to(engine.device), recipe.attack
    return evaluate(
        model,
        dataset.test,
        attacks=section.attacks,
        threat=adversarial.threat(recipe),
        size=section.size,
        seed=section.seed,
        batch_size=section.batch_size,
        out=out,
        execution=recipe.execution.backend,
        twin=recipe.execution.twin,
        name=recipe.name,
    )


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


def _require_place(out: str | Path | None) -> None:
    """Raises ValueError for empty text, which `Path` takes for the current folder."""
    if out == "":
        raise ValueError("out = '' names no folder; give one, as 'runs/mine', or None")


def _kept_in(out: str | Path | None) -> AbstractContextManager:
    if out is None:
        return nullcontext()
    make_folder(out)
    held = lock(Path(out))
    remove_litter(Path(out))
    return held


def _materials(model: nn.Module, train: Images, validation: Images, *, given: bool) -> Materials:
    plain = networks.plain_copy(model)
    return Materials(
        train=as_split(train),
        validation=as_split(validation),
        test=None,
        num_classes=None,
        network=lambda: copy.deepcopy(plain),
        given=given,
    )


def _threat(threat: Threat | None) -> Threat:
    if threat is None:
        return Linf(8 / 255)
    require_threat(threat)
    return threat
