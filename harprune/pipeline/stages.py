# SPDX-License-Identifier: Apache-2.0
"""The stages of a run: pretrain, prune, finetune, attack, report. Folder in, folder out.

A stage whose network exists is done, so an interrupted run goes on by the same command.
The validation split selects epochs; the attack stage alone sees test images.
"""

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from harprune.files import to_json, write
from harprune.methods.base import Budget, Method
from harprune.modes import eval_mode
from harprune.pipeline import hardening, machinery, pruning
from harprune.pipeline.judging import chosen, judge
from harprune.pipeline.learning import learn, learn_weights, under_attack
from harprune.pipeline.outlook import outlook
from harprune.pipeline.validation import BATCH, guesses, percent, validate
from harprune.pipeline.workshop import Workshop, load_network
from harprune.reporting.report import write_report
from harprune.reporting.tables import results_table
from harprune.robustness.images import subset
from harprune.sparsity import allocation, masks
from harprune.sparsity.audit import Audit, connected
from harprune.sparsity.costs import multiply_add_prices
from harprune.sparsity.layers import prunable_layers, weights
from harprune.training import checkpoint
from harprune.training.splits import to_float


def run_until(shop: Workshop, last: str = "report") -> dict:
    """All stages in order up to `last`; returns the report, if it came to that.

    Raises:
        ValueError: `last` is no stage.
    """
    order = {f.__name__: f for f in (pretrain, prune, finetune, attack, report)}
    if last not in order:
        raise ValueError(f"--until {last!r} is no stage; choose one of {', '.join(order)}")
    for line in outlook(shop.recipe, shop.materials, shop.engine.device):
        shop.console.say(line)
    for name, stage in order.items():
        result = stage(shop)
        if name == last:
            return result or {}
    return {}


def pretrain(shop: Workshop) -> None:
    """Dense robust training, or the weights the recipe names -> dense.safetensors."""
    if shop.run.network("pretrain").exists():
        return
    model = shop.materials.network().to(shop.engine.device)
    history: list[dict] = []
    if not shop.materials.given and shop.recipe.pretrain.epochs:
        history = learn_weights(shop, "pretrain", model, prunable_layers(model))
    clean, robust = validate(shop, model, hardening.twin(shop.recipe, model))
    shop.console.say(f"dense network: {percent(clean, robust)} on validation images")
    if shop.materials.given and guesses(clean, shop.classes):
        shop.warn(
            "pretrain",
            f"clean accuracy {clean:.1%} is what guessing gives; are these the right weights, "
            "classes and normalisation (model.mean, model.std)?",
        )
    beside = _learned_beside(shop)
    tensors = checkpoint.pack("model", model.state_dict())
    _finish(shop, "pretrain", tensors, history, clean, robust, validation=beside)


def prune(shop: Workshop) -> None:
    """The method's stage: attach, learn, settle within the budget -> pruned.safetensors."""
    if shop.run.network("prune").exists():
        return
    model = load_network(shop, "pretrain")
    method, budget = (
        pruning.method(shop.recipe),
        pruning.budget(shop.recipe, shop.materials.example),
    )
    torch.manual_seed(shop.seed("prune"))
    method.attach(model, budget)
    _show_sample(shop, method, model)
    history: list[dict] = []
    if shop.recipe.prune.epochs and (groups := method.trainable(model)):
        soft = shop.recipe.prune.distillation
        sharpness = pruning.sharpness(shop.recipe)
        nearby = None if sharpness is None else partial(sharpness.nearby, model)
        history = learn(
            shop, "prune", model, groups, method=method, distillation=soft, nearby=nearby
        )
    if history and (doubt := method.doubt(model)):
        shop.warn("prune", doubt)
    method.settle(model)
    tensors = checkpoint.pack("mask", masks.kept_masks(model))
    masks.bake(model)
    counts = budget.audit(model)
    shop.console.say(f"pruned: {counts.kept} of {counts.total} {counts.denominator} kept")
    _alarm(shop, model, counts)
    _write_audit(shop, counts, budget)
    clean, robust = validate(shop, model, hardening.twin(shop.recipe, model))
    shop.console.say(f"pruned network: {percent(clean, robust)} on validation images")
    tensors |= checkpoint.pack("model", model.state_dict())
    _finish(shop, "prune", tensors, history, clean, robust)


def finetune(shop: Workshop) -> None:
    """Train the kept weights under fixed masks -> finetuned.safetensors."""
    if shop.run.network("finetune").exists():
        return
    model, budget = load_network(shop, "prune"), pruning.budget(shop.recipe, shop.materials.example)
    kept = checkpoint.unpack("mask", checkpoint.load(shop.run.network("prune"))[0])
    for name, layer in budget.layers(model).items():
        masks.fix(layer, kept[name].to(shop.engine.device))
    history: list[dict] = []
    if shop.recipe.finetune.epochs:
        layers, soft = prunable_layers(model), shop.recipe.finetune.distillation
        masks.compact(model)
        history = learn_weights(shop, "finetune", model, layers, distillation=soft)
        masks.expand(model)
    masks.bake(model)
    counts = budget.audit(model)
    _write_audit(shop, counts, budget)
    clean, robust = validate(shop, model, hardening.twin(shop.recipe, model))
    shop.console.say(f"finetuned network: {percent(clean, robust)} on validation images")
    tensors = checkpoint.pack("model", model.state_dict()) | checkpoint.pack("mask", kept)
    _finish(shop, "finetune", tensors, history, clean, robust)


def attack(shop: Workshop) -> None:
    """Evaluate on test images: the baked, finetuned network and, if wanted, the dense one."""
    section, test = shop.recipe.attack, shop.materials.test
    if test is None or not shop.run.leader:
        return
    index = chosen(test.labels, section.size, section.seed, shop.console)
    # The pruned network first: it is what was asked for, and the cheaper one.
    wanted = {"finetuned": ("finetune", index)}
    if section.dense:
        fewer = subset(test.labels, section.dense_size or len(index), section.seed)
        wanted["dense"] = ("pretrain", min(index, fewer, key=len))
    # All are read before one is attacked: a damaged file should not be found after hours.
    networks = {name: load_network(shop, stage) for name, (stage, _) in wanted.items()}
    pending = [n for n in networks if not (shop.run.attack(n) / "evaluation.json").exists()]
    if pending or shop.run.corrected:
        shop.run.note_change()
    for name, model in networks.items():
        result = judge(
            model,
            test,
            attacks=section.attacks,
            threat=hardening.threat(shop.recipe),
            index=wanted[name][1],
            seed=section.seed,
            batch_size=section.batch_size,
            folder=shop.run.attack(name),
            execution=shop.recipe.execution.backend,
            twin=shop.recipe.execution.twin,
            num_classes=shop.materials.num_classes,
            console=shop.console,
            name=name,
        )
        for line in result.lines():
            shop.console.say(f"{name}: {line}")


def report(shop: Workshop) -> dict:
    """Tables and plots of what the folder holds -> report/."""
    if not shop.run.leader:
        return {}
    content = write_report(shop.run.folder)
    if table := results_table(content):
        for line in table.lines():
            shop.console.say(line)
    shop.console.say(f"report: {shop.run.folder / 'report' / 'report.html'}")
    return content


def _show_sample(shop: Workshop, method: Method, model: nn.Module) -> None:
    """Show the method the images it asks for, in every process the same."""
    sample, section = method.sample, shop.recipe.prune
    if sample is None:
        return
    batches = machinery.batches(
        shop.materials.train, shop.recipe, section, shop.engine, shop.seed("prune"), shared=False
    )
    images, passes, shown = islice(batches.epoch(0), sample.batches), sample.passes, 0
    if sample.attacked:
        objective = section.objective or shop.recipe.objective
        attack = hardening.training_attack(shop.recipe, objective, under_attack(shop, model))
        images = ((attack(model, x, y), y) for x, y in images)
        passes += attack.passes

    def counted() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal shown
        for x, y in images:
            shown += len(x)
            yield x, y

    with eval_mode(model):
        method.observe(model, counted())
    if shop.run.leader:
        write(shop.run.folder / "scoring.json", to_json({"passes": passes * shown}))


def _alarm(shop: Workshop, model: nn.Module, counts: Audit) -> None:
    """Warn of layers near collapse; refuse a mask that cuts the logits off from the image."""
    if counts.thin:
        shop.warn(
            "prune",
            f"layers that keep fewer weights than they have outputs: {len(counts.thin)}, the first "
            f"is {counts.thin[0]} with {counts.layers[counts.thin[0]].kept}",
        )
    # Of a sparse network many images may meet dead units alone, so not one of them decides.
    some = torch.arange(min(BATCH, len(shop.materials.validation)))
    with eval_mode(model):
        x = to_float(shop.materials.validation.images[some]).to(shop.engine.device)
        if not connected(model, x):
            raise ValueError(
                "layer collapse: the pruned network's output no longer depends on the image; "
                "raise budget.floor or budget.density, or choose another allocation, in a new run "
                f"with model.weights = {str(shop.run.network('pretrain'))!r}"
            )
        with torch.no_grad():
            logits = model(x)
    cut_off = (logits == logits[:1]).all(dim=0).nonzero().flatten().tolist()
    if len(some) > 1 and cut_off:
        shop.warn(
            "prune",
            f"classes whose logits are the same for {len(some)} images: {len(cut_off)}, the first "
            f"is class {cut_off[0]}; budget.exclude can leave out the layer that makes them",
        )


def _learned_beside(shop: Workshop) -> str | None:
    """The digest of the validation images that the dense network has not learned from, if known.

    Warns where they are not this run's.
    """
    ours, weights = shop.materials.validation_digest, shop.recipe.model.weights
    if not shop.materials.given:
        return ours
    if weights is None or not checkpoint.is_checkpoint(weights):
        return None
    theirs = checkpoint.load(weights)[1].get("validation")
    if theirs not in (None, ours):
        shop.warn(
            "pretrain",
            f"the network of {weights} was trained beside other validation images, so it may have "
            "learned from some of these; keep the seed and data.validation of its run",
        )
    return theirs


def _finish(
    shop: Workshop,
    stage: str,
    tensors: dict,
    history: list,
    clean: float,
    robust: float,
    **more: str | None,
) -> None:
    shop.engine.barrier()
    values = {"history": history, "clean": clean, "robust": robust, **more}
    shop.run.finish(stage, tensors, values)
    shop.engine.barrier()


def _write_audit(shop: Workshop, counts: Audit, budget: Budget) -> None:
    """audit.json: the counts, beside what the named allocations would give the dense network."""
    if not shop.run.leader:
        return
    model = load_network(shop, "pretrain")
    layers = budget.layers(model)
    dense = weights(layers)
    others = {"uniform": allocation.uniform, "erk": allocation.erk, "lamp": allocation.lamp}
    content = counts.as_dict()
    with suppress(ValueError):  # a layer that the forward pass never uses has no such price
        prices = multiply_add_prices(model, layers, shop.materials.example.to(shop.engine.device))
        content["multiply_adds"] = {
            "dense": sum(prices[n] * c.total for n, c in counts.layers.items()),
            "kept": sum(prices[n] * c.kept for n, c in counts.layers.items()),
        }
    content["allocations"] = {n: a(dense, budget.density) for n, a in others.items()}
    write(shop.run.folder / "audit.json", to_json(content))
