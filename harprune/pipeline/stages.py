# SPDX-License-Identifier: Apache-2.0
"""The stages of a run: pretrain, prune, finetune, attack, report. Folder in, folder out.

A stage whose network exists is done, so an interrupted run goes on by the same command.
The validation split selects epochs; the attack stage alone sees test images.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice, takewhile
from math import ceil, log

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn.utils import parametrize

from harprune.files import to_json, write
from harprune.methods.base import Budget, Method
from harprune.modes import eval_mode
from harprune.pipeline import checks, hardening, machinery, pruning, supply
from harprune.pipeline.console import Console
from harprune.pipeline.course import Course
from harprune.pipeline.judging import chosen, judge
from harprune.pipeline.outlook import outlook
from harprune.pipeline.recipe import Distillation, Recipe
from harprune.pipeline.run import Run
from harprune.pipeline.supply import Materials
from harprune.reporting.records import STAGES
from harprune.reporting.report import write_report
from harprune.reporting.tables import results_table
from harprune.robustness.attacks import seeded
from harprune.robustness.images import subset
from harprune.robustness.objectives import Free, Objective
from harprune.sparsity import allocation, masks
from harprune.sparsity.audit import Audit, connected
from harprune.sparsity.costs import multiply_add_prices
from harprune.sparsity.execution import Execution, Twin, training_twin
from harprune.sparsity.layers import Layer, prunable_layers, weights
from harprune.training import checkpoint
from harprune.training.averaging import Average
from harprune.training.loop import Diverged, fit
from harprune.training.schedules import make_schedule
from harprune.training.splits import Split, to_float

_VALIDATION_BATCH = 250
_GUESSING = 1.2
"""Times the share of one class, up to which accuracy may be luck."""
_EXPLODED = 10.0
"""Times the loss of the first epoch, or of guessing, above which it counts as exploding."""


@dataclass(frozen=True)
class Workshop:
    """What every stage works with."""

    run: Run
    materials: Materials
    engine: Fabric
    console: Console

    @property
    def recipe(self) -> Recipe:
        return self.run.recipe

    @property
    def classes(self) -> int:
        """How many there are among the validation images."""
        return len(self.materials.validation.labels.unique())

    def seed(self, stage: str) -> int:
        """A seed of its own for each stage."""
        return self.recipe.seed * len(STAGES) + list(STAGES).index(stage)

    def warn(self, stage: str, text: str) -> None:
        """Say it, and keep it for the report."""
        self.console.say(f"warning: {text}")
        self.run.warn(stage, text)


def open_workshop(run: Run) -> Workshop:
    """The workshop of an open run: data loaded, device chosen, processes joined.

    Raises:
        ValueError: data, weights or network that are missing or do not fit each other.
    """
    engine = machinery.fabric(run.recipe.execution)
    console = Console(run.folder / "log.txt" if run.leader else None, quiet=not run.leader)
    materials = supply.materials(run.recipe)
    checks.rehearse(run.recipe, materials)
    run.require_same(materials.digests())
    return Workshop(run, materials, engine, console)


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
    shop.console.say(f"dense network: {_percent(clean, robust)} on validation images")
    if shop.materials.given and clean <= _GUESSING / shop.classes:
        shop.warn(
            "pretrain",
            f"clean accuracy {clean:.1%} is what guessing gives; are these the right weights, "
            "classes and normalisation (model.mean, model.std)?",
        )
    _finish(shop, "pretrain", checkpoint.pack("model", model.state_dict()), history, clean, robust)


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
    if history and "density" in method.metrics(model) and not method.budget_met(model):
        shop.warn(
            "prune",
            f"after {len(history)} epochs the densities learned have not come down to the budget, "
            "so all layers are cut in proportion; prune longer, raise method.gamma or lower "
            "method.start_factor",
        )
    method.settle(model)
    tensors = checkpoint.pack("mask", masks.kept_masks(model))
    masks.bake(model)
    counts = budget.audit(model)
    shop.console.say(f"pruned: {counts.kept} of {counts.total} {counts.denominator} kept")
    _alarm(shop, model, counts)
    _write_audit(shop, counts, budget)
    clean, robust = validate(shop, model, hardening.twin(shop.recipe, model))
    shop.console.say(f"pruned network: {_percent(clean, robust)} on validation images")
    tensors |= checkpoint.pack("model", model.state_dict())
    _finish(shop, "prune", tensors, history, clean, robust)


def _show_sample(shop: Workshop, method: Method, model: nn.Module) -> None:
    """Show the method the images it asks for, in every process the same."""
    sample, section = method.sample, shop.recipe.prune
    if sample is None:
        return
    batches = machinery.batches(
        shop.materials.train, shop.recipe, section, shop.engine, shop.seed("prune"), shared=False
    )
    images = islice(batches.epoch(0), sample.batches)
    if sample.attacked:
        objective = section.objective or shop.recipe.objective
        attack = hardening.training_attack(shop.recipe, objective, _attacked(shop, model))
        images = ((attack(model, x, y), y) for x, y in images)
    with eval_mode(model):
        method.observe(model, images)


def _alarm(shop: Workshop, model: nn.Module, counts: Audit) -> None:
    """Warn of layers near collapse; refuse a mask that cuts the logits off from the image."""
    if counts.thin:
        shop.warn(
            "prune",
            f"{len(counts.thin)} layers keep fewer weights than they have outputs, the first is "
            f"{counts.thin[0]} with {counts.layers[counts.thin[0]].kept}",
        )
    # Of a sparse network many images may meet dead units alone, so not one of them decides.
    some = torch.arange(min(_VALIDATION_BATCH, len(shop.materials.validation)))
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
            f"the logits of {len(cut_off)} classes are the same for {len(some)} images, the first "
            f"is class {cut_off[0]}; budget.exclude can leave out the layer that makes them",
        )


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
    shop.console.say(f"finetuned network: {_percent(clean, robust)} on validation images")
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
            execution=Execution(shop.recipe.execution.backend),
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


def learn_weights(
    shop: Workshop,
    stage: str,
    model: nn.Module,
    layers: Mapping[str, Layer],
    *,
    distillation: Distillation | None = None,
) -> list[dict]:
    """Train all parameters of `model`, as `learn` does, with the stage's own options.

    `layers` are those of its weights, as they were found before compaction.
    """
    section, nearby = getattr(shop.recipe, stage), None
    if (awp := hardening.perturbation(shop.recipe, section)) is not None:
        nearby = partial(awp.nearby, [layer.parameter for layer in layers.values()])
    groups = [{"params": list(model.parameters())}]
    return learn(
        shop,
        stage,
        model,
        groups,
        averaging=section.averaging,
        distillation=distillation,
        nearby=nearby,
    )


def learn(
    shop: Workshop,
    stage: str,
    model: nn.Module,
    groups: list[dict],
    *,
    method: Method | None = None,
    averaging: float | None = None,
    distillation: Distillation | None = None,
    nearby: Callable | None = None,
) -> list[dict]:
    """Train `groups` for the stage's epochs, leave the selected epoch in `model`; its history.

    Parameters that the user froze stay as they are. `nearby` is as in `fit`.
    """
    section = getattr(shop.recipe, stage)
    groups = [{**g, "params": [p for p in g["params"] if p.requires_grad]} for g in groups]
    average = None if averaging is None else Average(model, averaging)
    networks = (model,) if average is None else (model, average.module)
    make_loss = _objectives(shop, stage, distillation, repeated=nearby is not None)
    losses = {network: make_loss(network) for network in networks}
    objective, _ = losses[model]
    optimiser = machinery.optimiser(groups, section)
    batches = machinery.batches(
        shop.materials.train, shop.recipe, section, shop.engine, shop.seed(stage)
    )
    # Of noise that stays from batch to batch each process has its own rows, and one file holds one.
    divisible = shop.engine.world_size == 1 or not isinstance(objective, Free)
    course = Course(
        shop.run, stage, model, optimiser, objective, method, len(batches), average, divisible
    )
    fast = hardening.twin(shop.recipe, course.network)
    earlier = _earlier(shop, stage)
    advice = f"; lower {stage}.learning_rate in a new run"
    if method is not None:
        method.begin(section.epochs, len(batches))
    if course.restore():
        shop.run.write_metrics({**earlier, stage: course.history})
        shop.console.say(f"{stage}: going on at step {course.step}")
    with shop.console.bar(stage, section.epochs * len(batches)) as bar:

        def after_step(step: int, loss: Tensor) -> None:
            if method is not None:
                method.step_ended(model, step)
            course.step_ended(step, loss, section.batch_size * objective.replays)
            if bar.due:
                bar.update(step + 1, _summary(_now(course, float(loss))))

        def point(progress: float) -> AbstractContextManager | None:
            context = None if nearby is None else nearby(progress)
            if context is not None:
                course.passes += section.batch_size * hardening.passes_again(objective)
            return context

        def after_epoch(epoch: int) -> bool:
            _end_epoch(shop, course, epoch, fast)
            shop.run.write_metrics({**earlier, stage: course.history})
            left = bar.left((epoch + 1) * len(batches))
            shop.console.say(
                f"{stage} {epoch + 1}/{section.epochs}: {_summary(course.history[-1])}{left}"
            )
            for doubt in _doubts(course.history, section.epochs, shop.classes):
                shop.console.say(f"warning: {doubt}{advice}")
            return done()

        def done() -> bool:
            return method is not None and method.done(model)

        try:
            fit(
                model,
                batches,
                loss=_loss(losses, method),
                optimiser=optimiser,
                schedule=make_schedule(
                    section.schedule, epochs=section.epochs, offset=shop.recipe.parity.cosine_offset
                ),
                epochs=0 if done() else section.epochs,
                fabric=shop.engine,
                seed=shop.seed(stage),
                start=course.step,
                replays=objective.replays,
                average=average,
                nearby=point,
                after_step=after_step,
                after_epoch=after_epoch,
            )
        except Diverged as error:
            raise _diverged(shop.run, stage, error) from None
    shop.engine.barrier()  # until rank 0 has written the best epoch
    best = course.take_best()
    shop.run.write_metrics({**earlier, stage: course.history})
    shop.console.say(f"{stage}: epoch {best + 1} of {section.epochs} selected")
    for epochs in range(1, len(course.history) + 1):  # also those before an interruption
        for doubt in _doubts(course.history[:epochs], section.epochs, shop.classes):
            shop.run.warn(stage, doubt + advice)
    return course.history


def _objectives(
    shop: Workshop, stage: str, distillation: Distillation | None, *, repeated: bool
) -> Callable[[nn.Module], tuple[Objective, nn.Module | None]]:
    """Makes the stage's loss for a network, and the twin on the kernels that the loss is to run.

    The network itself where that is None: it is not masked, or there are no kernels for it.
    `repeated`: each batch has a second pass, which meets the same adversarial images.
    """
    wanted = getattr(shop.recipe, stage).objective or shop.recipe.objective
    looks_inside = distillation is None and wanted.name == "pwoa"  # where no twin has layers
    teacher = load_network(shop, "pretrain").eval() if looks_inside or distillation else None
    soft = _fixed(shop, teacher) if teacher is not None and distillation is not None else None
    backend = Execution(shop.recipe.execution.backend)

    def make(network: nn.Module) -> tuple[Objective, nn.Module | None]:
        attacked = _attacked(shop, network)
        if distillation is None or soft is None:
            objective = hardening.objective(shop.recipe, wanted, attacked, teacher)
        else:
            objective = hardening.distilled(shop.recipe, wanted, attacked, distillation, soft)
        if repeated:
            objective = hardening.attacked_once(objective)
        dense = stage == "pretrain" or looks_inside
        return objective, None if dense else training_twin(network, execution=backend)

    return make


def _loss(
    losses: Mapping[nn.Module, tuple[Objective, nn.Module | None]], method: Method | None
) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """`losses`: the loss of each network that one is asked for, and the twin that it runs."""

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        objective, twin = losses[model]
        robust = objective(model if twin is None else twin, x, y)
        return robust if method is None else robust + method.penalty(model)

    return loss


def _end_epoch(shop: Workshop, course: Course, epoch: int, fast: Twin | None) -> None:
    """Validate, let the method react, checkpoint."""
    clean, robust = validate(shop, course.network, fast)
    record = {"epoch": epoch, "clean": clean, "robust": robust}
    record["learning_rate"] = course.optimiser.param_groups[0]["lr"]
    eligible = True
    if course.method is not None:
        if course.method.watches:
            course.method.judged(*_overfitting(shop, course.model, fast))
        record |= course.method.metrics(course.model)
        eligible = course.method.budget_met(course.model)
        course.method.epoch_ended(course.model, epoch)
    course.epoch_ended(record, eligible=eligible)


def validate(shop: Workshop, model: nn.Module, fast: Twin | None) -> tuple[float, float]:
    """Clean and PGD accuracy on the validation images, in [0, 1]; the same images each time."""
    clean, robust, _ = _judge(shop, model, fast, shop.materials.validation)
    return clean, robust


def _overfitting(shop: Workshop, model: nn.Module, fast: Twin | None) -> tuple[float, float]:
    """Robust accuracy on training minus validation images, and the robust validation loss."""
    _, seen, _ = _judge(shop, model, fast, shop.materials.train)
    _, unseen, loss = _judge(shop, model, fast, shop.materials.validation)
    return seen - unseen, loss


def _judge(
    shop: Workshop, model: nn.Module, fast: Twin | None, split: Split
) -> tuple[float, float, float]:
    """Clean accuracy, PGD accuracy and mean PGD loss on the same images of `split` each time."""
    section = shop.recipe.validation
    attack = hardening.attack(f"pgd-{section.steps}", hardening.threat(shop.recipe))
    index = subset(split.labels, section.size, shop.recipe.seed)
    function = model if fast is None else fast.current()
    hits, loss = torch.zeros(2, dtype=torch.int64), 0.0
    random = seeded(shop.recipe.seed, shop.engine.device)
    with parametrize.cached(), eval_mode(function), random:
        for part in index.split(_VALIDATION_BATCH):
            x = to_float(split.images[part]).to(shop.engine.device)
            y = split.labels[part].to(shop.engine.device)
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


def load_network(shop: Workshop, stage: str) -> nn.Module:
    """The plain network that `stage` left, strictly loaded."""
    model = shop.materials.network()
    supply.load_strictly(model, shop.run.network(stage))
    return model.to(shop.engine.device)


def _attacked(shop: Workshop, model: nn.Module) -> Twin | None:
    """What training attacks run on: the model's twin, in their precision, or the model itself."""
    if not shop.recipe.execution.twin:
        return None
    low = shop.recipe.execution.attack_precision == "bf16"
    return hardening.twin(shop.recipe, model, dtype=torch.bfloat16 if low else None)


def _fixed(shop: Workshop, model: nn.Module) -> nn.Module:
    """A network in eval mode as a fixed function: its twin, never in the precision of attacks."""
    fast = hardening.twin(shop.recipe, model) if shop.recipe.execution.twin else None
    return model if fast is None else fast.current()


def _finish(
    shop: Workshop, stage: str, tensors: dict, history: list, clean: float, robust: float
) -> None:
    shop.engine.barrier()
    shop.run.finish(stage, tensors, {"history": history, "clean": clean, "robust": robust})
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


def _earlier(shop: Workshop, stage: str) -> dict[str, list[dict]]:
    """The epochs of the stages before this one."""
    before = takewhile(lambda name: name != stage, STAGES)
    return {name: checkpoint.load(shop.run.network(name))[1]["history"] for name in before}


def _diverged(run: Run, stage: str, error: Diverged) -> ValueError:
    last = run.progress(stage)
    good = (
        f"the last good checkpoint is {last}" if last.exists() else "no checkpoint was written yet"
    )
    return ValueError(f"{stage} stopped: {error}; {good}; lower {stage}.learning_rate in a new run")


def _doubts(history: list[dict], epochs: int, classes: int) -> Iterator[str]:
    """What speaks against a stage after the last epoch of `history`, each said once."""
    # A trained network's first loss may be next to nothing, and then grow tenfold without harm.
    usual = max(history[0]["loss"], log(classes))
    exploded = [epoch["loss"] > _EXPLODED * usual for epoch in history]
    if exploded[-1] and not any(exploded[:-1]):
        yield f"the loss has grown from {history[0]['loss']:.3g} to {history[-1]['loss']:.3g}"
    best = max(epoch["clean"] for epoch in history)
    if len(history) == ceil(epochs / 2) and best <= _GUESSING / classes:
        yield f"clean accuracy, {best:.1%} at best, is still what guessing gives"


def _now(course: Course, loss: float) -> dict:
    """The state within an epoch: loss, density and gamma of now, accuracies of the last epoch."""
    last = course.history[-1] if course.history else {}
    metrics = {} if course.method is None else course.method.metrics(course.model)
    return {**last, **metrics, "loss": loss}


def _summary(record: dict) -> str:
    parts = [f"loss {record['loss']:.3f}"]
    if "clean" in record:
        parts.append(_percent(record["clean"], record["robust"]))
    for name, form in (("density", ".4f"), ("gamma", ".3g")):
        if name in record:
            parts.append(f"{name} {record[name]:{form}}")
    return ", ".join(parts)


def _percent(clean: float, robust: float) -> str:
    return f"clean {100 * clean:.2f} %, PGD {100 * robust:.2f} %"
