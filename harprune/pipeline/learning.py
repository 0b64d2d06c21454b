# SPDX-License-Identifier: Apache-2.0
"""One training stage: the loop fed with a loss, watched epoch by epoch, and ended on its best."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from math import ceil, log

import torch
from torch import Tensor, nn

from harprune.methods.base import Method
from harprune.pipeline import hardening, machinery
from harprune.pipeline.course import Course
from harprune.pipeline.recipe import Distillation
from harprune.pipeline.run import Run
from harprune.pipeline.validation import (
    guesses,
    overfitting,
    overfitting_passes,
    percent,
    validate,
)
from harprune.pipeline.workshop import Workshop, load_network
from harprune.robustness.objectives import Free, Objective
from harprune.sparsity.execution import Twin, training_twin
from harprune.sparsity.layers import Layer
from harprune.training.averaging import Average
from harprune.training.loop import Diverged, fit
from harprune.training.schedules import make_schedule

_EXPLODED = 10.0
"""Times the loss of the first epoch, or of guessing, above which it counts as exploding."""


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
    twin = hardening.twin(shop.recipe, course.network)
    others = shop.run.histories()
    advice = f"; lower {stage}.learning_rate in a new run"
    if method is not None:
        method.begin(section.epochs, len(batches))
    if course.restore():
        shop.run.write_metrics({**others, stage: course.history})
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
            _end_epoch(shop, course, epoch, twin)
            shop.run.write_metrics({**others, stage: course.history})
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
    backend = shop.recipe.execution.backend

    def make(network: nn.Module) -> tuple[Objective, nn.Module | None]:
        attacked = under_attack(shop, network)
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


def under_attack(shop: Workshop, model: nn.Module) -> Twin | None:
    """What training attacks run on: the model's twin, in their precision, or the model itself."""
    if not shop.recipe.execution.twin:
        return None
    low = shop.recipe.execution.attack_precision == "bf16"
    return hardening.twin(shop.recipe, model, dtype=torch.bfloat16 if low else None)


def _fixed(shop: Workshop, model: nn.Module) -> nn.Module:
    """A network in eval mode as a fixed function: its twin, never in the precision of attacks."""
    twin = hardening.twin(shop.recipe, model) if shop.recipe.execution.twin else None
    return model if twin is None else twin.current()


def _end_epoch(shop: Workshop, course: Course, epoch: int, twin: Twin | None) -> None:
    """Validate, let the method react, checkpoint."""
    clean, robust = validate(shop, course.network, twin)
    record = {"epoch": epoch, "clean": clean, "robust": robust}
    record["learning_rate"] = course.optimiser.param_groups[0]["lr"]
    eligible = True
    if course.method is not None:
        if course.method.watches:
            course.method.judged(*overfitting(shop, course.model, twin))
            course.passes += overfitting_passes(shop)
        record |= course.method.metrics(course.model)
        eligible = course.method.budget_met(course.model)
        course.method.epoch_ended(course.model, epoch)
    course.epoch_ended(record, eligible=eligible)


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
    if len(history) == ceil(epochs / 2) and guesses(best, classes):
        yield f"clean accuracy, {100 * best:.1f} % at best, is still what guessing gives"


def _now(course: Course, loss: float) -> dict:
    """The state within an epoch: loss, density and gamma of now, accuracies of the last epoch."""
    last = course.history[-1] if course.history else {}
    metrics = {} if course.method is None else course.method.metrics(course.model)
    return {**last, **metrics, "loss": loss}


def _summary(record: dict) -> str:
    parts = [f"loss {record['loss']:.3f}"]
    if "clean" in record:
        parts.append(percent(record["clean"], record["robust"]))
    for name, form in (("density", ".4f"), ("gamma", ".3g")):
        if name in record:
            parts.append(f"{name} {record[name]:{form}}")
    return ", ".join(parts)
