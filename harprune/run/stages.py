# SPDX-License-Identifier: Apache-2.0
"""The stages of a run: pretrain, prune, finetune, attack, report. Folder in, folder out.

A stage whose network exists is done, so an interrupted run goes on by the same command.
The validation split selects epochs; the attack stage alone sees test images.
"""

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from harprune.methods.base import Budget, Method, given_densities
from harprune.modes import eval_mode
from harprune.randomness import python_generators_kept, seed_generators
from harprune.recipe import adversarial, pruning, training
from harprune.recipe.outlook import outlook
from harprune.reporting.report import write_report
from harprune.reporting.tables import results_table
from harprune.robustness.images import subset
from harprune.run.console import roughly
from harprune.run.evaluate import chosen, expected_passes, judge
from harprune.run.learning import learn, learn_weights, under_attack
from harprune.run.opening import Run, load_network
from harprune.run.validation import BATCH, guesses, percent, validate, validation_passes
from harprune.sparsity import masks
from harprune.sparsity.audit import Audit, connected
from harprune.sparsity.costs import multiply_add_prices
from harprune.sparsity.layers import prunable_layers
from harprune.training import checkpoint
from harprune.training.splits import to_float

_LONG = 120.0
"""Seconds from which on what an attack will take is worth a line."""


def run_until(run: Run, last: str = "report") -> dict:
    """All stages in order up to `last`; returns the report, if it came to that."""
    order = {f.__name__: f for f in (pretrain, prune, finetune, attack, report)}
    for line in outlook(run.recipe, run.materials, run.engine.device):
        run.console.say(line)
    with python_generators_kept():  # which stages seed, and which may be a caller's
        for name, stage in order.items():
            result = stage(run)
            if name == last:
                return result or {}
    return {}


def pretrain(run: Run) -> None:
    """Dense robust training, or the weights the recipe names -> dense.safetensors."""
    if run.folder.network("pretrain").exists():
        return
    model = run.materials.network().to(run.engine.device)
    history: list[dict] = []
    if not run.materials.trained and run.recipe.pretrain.epochs:
        history = learn_weights(run, "pretrain", model, prunable_layers(model))
    clean, robust = _validated(run, model, "dense")
    if run.materials.trained and guesses(clean, run.classes):
        run.warn(
            "pretrain",
            f"clean accuracy {100 * clean:.1f} % is what guessing gives; are these the right "
            "weights, classes and normalisation (model.mean, model.std)?",
        )
    beside = _learned_beside(run)
    tensors = checkpoint.pack("model", model.state_dict())
    _finish(run, "pretrain", tensors, history, clean, robust, validation=beside)


def prune(run: Run) -> None:
    """The method's stage: attach, learn, settle within the budget -> pruned.safetensors."""
    if run.folder.network("prune").exists():
        return
    model = load_network(run, "pretrain")
    method, budget = (
        pruning.method(run.recipe),
        pruning.budget(run.recipe, run.materials.example),
    )
    seed_generators(run.seed("prune"))
    method.attach(model, budget)
    scoring = _show_sample(run, method, model)
    history: list[dict] = []
    if run.recipe.prune.epochs and (groups := method.trainable(model)):
        soft = run.recipe.prune.distillation
        sharpness = pruning.sharpness(run.recipe)
        nearby = None if sharpness is None else partial(sharpness.nearby, model)
        history = learn(
            run, "prune", model, groups, method=method, distillation=soft, nearby=nearby
        )
    if history and (doubt := method.doubt(model)):
        run.warn("prune", doubt)
    method.settle(model)
    tensors = checkpoint.pack("mask", masks.kept_masks(model))
    masks.bake(model)
    counts = budget.audit(model)
    run.console.say(f"pruned: {counts.kept} of {counts.total} {counts.denominator} kept")
    _alarm(run, model, counts)
    clean, robust = _validated(run, model, "pruned")
    tensors |= checkpoint.pack("model", model.state_dict())
    beside = {"audit": _counted(run, counts, budget), "scoring": scoring}
    _finish(run, "prune", tensors, history, clean, robust, **beside)


def finetune(run: Run) -> None:
    """Train the kept weights under fixed masks -> finetuned.safetensors."""
    if run.folder.network("finetune").exists():
        return
    model, budget = load_network(run, "prune"), pruning.budget(run.recipe, run.materials.example)
    kept = checkpoint.unpack("mask", checkpoint.load(run.folder.network("prune"))[0])
    for name, layer in budget.layers(model).items():
        masks.fix(layer, kept[name].to(run.engine.device))
    history: list[dict] = []
    if run.recipe.finetune.epochs:
        layers, soft = prunable_layers(model), run.recipe.finetune.distillation
        masks.compact(model)
        history = learn_weights(run, "finetune", model, layers, distillation=soft)
        masks.expand(model)
    masks.bake(model)
    counts = budget.audit(model)
    clean, robust = _validated(run, model, "finetuned")
    tensors = checkpoint.pack("model", model.state_dict()) | checkpoint.pack("mask", kept)
    beside = _counted(run, counts, budget)
    _finish(run, "finetune", tensors, history, clean, robust, audit=beside)


def attack(run: Run) -> None:
    """Evaluate on test images: the baked, finetuned network and, if wanted, the dense one."""
    section, test = run.recipe.attack, run.materials.test
    if test is None or not run.folder.leader:
        return
    index = chosen(test.labels, section.size, section.seed, run.console)
    # The pruned network first: it is what was asked for, and the cheaper one.
    wanted = {"finetuned": ("finetune", index)}
    if section.dense:
        fewer = subset(test.labels, section.dense_size or len(index), section.seed)
        wanted["dense"] = ("pretrain", min(index, fewer, key=len))
    # All are read before one is attacked: a damaged file should not be found after hours.
    networks = {name: load_network(run, stage) for name, (stage, _) in wanted.items()}
    pending = [n for n in networks if not (run.folder.attack(n) / "evaluation.json").exists()]
    if pending or run.folder.corrected:
        run.folder.note_change()
    for name, model in networks.items():
        result = judge(
            model,
            test,
            attacks=section.attacks,
            threat=adversarial.threat(run.recipe),
            index=wanted[name][1],
            seed=section.seed,
            batch_size=section.batch_size,
            folder=run.folder.attack(name),
            execution=run.recipe.execution.backend,
            twin=run.recipe.execution.twin,
            num_classes=run.materials.num_classes,
            console=run.console,
            name=name,
        )
        for line in result.lines():
            run.console.say(f"{name}: {line}")


def report(run: Run) -> dict:
    """Tables and plots of what the folder holds -> report/."""
    if not run.folder.leader:
        return {}
    run.folder.restore_derived()
    content = write_report(run.folder.path)
    if table := results_table(content):
        for line in table.lines():
            run.console.say(line)
    run.console.say(f"report: {run.folder.path / 'report' / 'report.html'}")
    return content


def _show_sample(run: Run, method: Method, model: nn.Module) -> dict[str, int] | None:
    """Show the method the images it asks for, in every process the same; what that cost."""
    sample, section = method.sample, run.recipe.prune
    if sample is None:
        return None
    batches = training.batches(
        run.materials.train, run.recipe, section, run.engine, run.seed("prune"), shared=False
    )
    images, passes, shown = islice(batches.epoch(0), sample.batches), sample.passes, 0
    if sample.attacked:
        objective = section.objective or run.recipe.objective
        attack = adversarial.training_attack(run.recipe, objective, under_attack(run, model))
        images = ((attack(model, x, y), y) for x, y in images)
        passes += attack.passes

    def counted() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal shown
        for x, y in images:
            shown += len(x)
            yield x, y

    with eval_mode(model):
        method.observe(model, counted())
    return {"passes": passes * shown}


def _alarm(run: Run, model: nn.Module, counts: Audit) -> None:
    """Warn of layers near collapse; refuse a mask that cuts the logits off from the image."""
    if counts.thin:
        run.warn(
            "prune",
            f"layers that keep fewer weights than they have outputs: {len(counts.thin)}, the first "
            f"is {counts.thin[0]} with {counts.layers[counts.thin[0]].kept}",
        )
    # Of a sparse network many images may meet dead units alone, so not one of them decides.
    some = torch.arange(min(BATCH, len(run.materials.validation)))
    with eval_mode(model):
        x = to_float(run.materials.validation.images[some]).to(run.engine.device)
        if not connected(model, x):
            raise ValueError(
                "layer collapse: the pruned network's output no longer depends on the image; "
                "raise budget.floor or budget.density, or choose another allocation, in a new run "
                f"with model.weights = {str(run.folder.network('pretrain'))!r}"
            )
        with torch.no_grad():
            logits = model(x)
    cut_off = (logits == logits[:1]).all(dim=0).nonzero().flatten().tolist()
    if len(some) > 1 and cut_off:
        run.warn(
            "prune",
            f"classes whose logits are the same for {len(some)} images: {len(cut_off)}, the first "
            f"is class {cut_off[0]}; budget.exclude can leave out the layer that makes them",
        )


def _learned_beside(run: Run) -> str | None:
    """The digest of the validation images that the dense network has not learned from, if known.

    Warns where they are not this run's.
    """
    ours, weights = run.materials.validation_digest, run.recipe.model.weights
    if not run.materials.trained:
        return ours
    if weights is None or not checkpoint.is_checkpoint(weights):
        return None
    theirs = checkpoint.load(weights)[1].get("validation")
    if theirs not in (None, ours):
        run.warn(
            "pretrain",
            f"the network of {weights} was trained beside other validation images, so it may have "
            "learned from some of these; keep the seed and data.validation of its run",
        )
    return theirs


def _validated(run: Run, model: nn.Module, name: str) -> tuple[float, float]:
    """Clean and PGD accuracy on validation images, said; and what the attack will take, if long."""
    began = time.monotonic()
    clean, robust = validate(run, model, adversarial.twin(run.recipe, model))
    pace = (time.monotonic() - began) / validation_passes(run)
    run.console.say(f"{name} network: {percent(clean, robust)} on validation images")
    section, bound = run.recipe.attack, adversarial.threat(run.recipe)
    images = _attacked_images(run, name)
    passes = expected_passes(section.attacks, bound, clean=clean, robust=robust)
    if images and (seconds := images * passes * pace) >= _LONG:
        key = "attack.dense_size" if name == "dense" else "attack.size"
        run.console.say(
            f"note: the attack on the {name} network, {images:,} test images, will take about "
            f"{roughly(seconds)}; {key} can make it fewer"
        )
    return clean, robust


def _attacked_images(run: Run, name: str) -> int:
    """How many test images the attack stage will take for a network."""
    section, test = run.recipe.attack, run.materials.test
    if test is None or name == "pruned" or (name == "dense" and not section.dense):
        return 0
    size = min(section.size or len(test), len(test))
    return min(section.dense_size or size, size) if name == "dense" else size


def _finish(
    run: Run,
    stage: str,
    tensors: dict,
    history: list,
    clean: float,
    robust: float,
    **more: Any,
) -> None:
    run.engine.barrier()
    values = {"history": history, "clean": clean, "robust": robust, **more}
    run.folder.finish(stage, tensors, values)
    run.engine.barrier()


def _counted(run: Run, counts: Audit, budget: Budget) -> dict[str, Any]:
    """The counts, beside what named allocations would keep under the same budget."""
    model = load_network(run, "pretrain")
    layers = budget.layers(model)
    content = counts.as_dict()
    with suppress(ValueError):  # a layer that the forward pass never uses has no such price
        prices = multiply_add_prices(model, layers, run.materials.example.to(run.engine.device))
        content["multiply_adds"] = {
            "dense": sum(prices[n] * c.total for n, c in counts.layers.items()),
            "kept": sum(prices[n] * c.kept for n, c in counts.layers.items()),
        }
    content["allocations"] = {}
    for name in ("uniform", "erk", "lamp"):
        other = replace(budget, allocation=pruning.allocate(name))
        with suppress(ValueError):  # without a floor it may leave a layer empty
            shares = given_densities(model, other)
            content["allocations"][name] = {n: float(share()) for n, share in shares.items()}
    return content
