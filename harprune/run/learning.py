# SPDX-License-Identifier: Apache-2.0
"""One training stage: the loop fed with a loss, watched epoch by epoch, and ended on its best."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from math import ceil, log

import torch
from torch import Tensor, nn

from harprune.methods.base import Method
from harprune.recipe import adversarial, training
from harprune.recipe.schema import Distillation, Training
from harprune.robustness.objectives import Free, Objective
from harprune.run.console import Bar
from harprune.run.folder import RunFolder
from harprune.run.opening import Run, load_network
from harprune.run.state import TrainingState
from harprune.run.validation import (
    guesses,
    overfitting,
    overfitting_passes,
    percent,
    validate,
)
from harprune.sparsity.execution import Twin, training_twin
from harprune.sparsity.layers import Layer
from harprune.training.averaging import Average
from harprune.training.loop import Diverged, fit
from harprune.training.schedules import make_schedule

_EXPLODED = 10.0
"""Times the loss of the first epoch, or of guessing, above which it counts as exploding."""


def learn_weights(
    run: Run,
    stage: str,
    model: nn.Module,
    layers: Mapping[str, Layer],
    *,
    distillation: Distillation | None = None,
) -> list[dict]:
    """Train all parameters of `model`, as `learn` does, with the stage's own options.

    `layers` are those of its weights, as they were found before compaction.
    """
    section, nearby = getattr(run.recipe, stage), None
    if (awp := adversarial.perturbation(run.recipe, section)) is not None:
        nearby = partial(awp.nearby, [layer.parameter for layer in layers.values()])
    groups = [{"params": list(model.parameters())}]
    return learn(
        run,
        stage,
        model,
        groups,
        averaging=section.averaging,
        distillation=distillation,
        nearby=nearby,
    )


def learn(
    run: Run,
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
    section = getattr(run.recipe, stage)
    groups = [{**g, "params": [p for p in g["params"] if p.requires_grad]} for g in groups]
    average = None if averaging is None else Average(model, averaging)
    networks = (model,) if average is None else (model, average.module)
    make_loss = _objectives(run, stage, distillation, repeated=nearby is not None)
    losses = {network: make_loss(network) for network in networks}
    objective, _ = losses[model]
    optimiser = training.optimiser(groups, section)
    batches = training.batches(
        run.materials.train, run.recipe, section, run.engine, run.seed(stage)
    )
    # Of noise that stays from batch to batch each process has its own rows, and one file holds one.
    divisible = run.engine.world_size == 1 or not isinstance(objective, Free)
    state = TrainingState(
        run.folder, stage, model, optimiser, objective, method, len(batches), average, divisible
    )
    twin = adversarial.twin(run.recipe, state.network)
    watch = _Watch(run, section, state, twin, nearby, run.folder.histories())
    if method is not None:
        method.begin(section.epochs, len(batches))
    if state.restore():
        watch.write_metrics()
        run.console.say(f"{stage}: going on at step {state.step}")
    with run.console.bar(stage, section.epochs * len(batches)) as bar:
        try:
            fit(
                model,
                batches,
                loss=_loss(losses, method),
                optimiser=optimiser,
                schedule=make_schedule(
                    section.schedule, epochs=section.epochs, offset=run.recipe.parity.cosine_offset
                ),
                epochs=0 if watch.done else section.epochs,
                fabric=run.engine,
                seed=run.seed(stage),
                start=state.step,
                replays=objective.replays,
                average=average,
                nearby=watch.point,
                after_step=partial(watch.step_ended, bar),
                after_epoch=partial(watch.epoch_ended, bar),
            )
        except Diverged as error:
            raise _diverged(run.folder, stage, error) from None
    run.engine.barrier()  # until rank 0 has written the best epoch
    best = state.take_best()
    run.console.say(f"{stage}: epoch {best + 1} of {section.epochs} selected")
    for epochs in range(1, len(state.history) + 1):  # also those before an interruption
        for doubt in watch.doubts(epochs):
            run.folder.warn(stage, doubt)
    return state.history


@dataclass(frozen=True)
class _Watch:
    """What comes between the steps of a stage, as `fit` calls it: count, validate, keep, say.

    `twin` is that of the network which is validated; `others` are the epochs of other stages.
    """

    run: Run
    section: Training
    state: TrainingState
    twin: Twin | None
    nearby: Callable | None
    others: Mapping[str, list[dict]]

    def point(self, progress: float) -> AbstractContextManager | None:
        """Where a step takes its gradients anew, if anywhere."""
        context = None if self.nearby is None else self.nearby(progress)
        if context is not None:
            again = adversarial.passes_again(self.state.objective)
            self.state.passes += self.section.batch_size * again
        return context

    def step_ended(self, bar: Bar, step: int, loss: Tensor) -> None:
        state = self.state
        if state.method is not None:
            state.method.step_ended(state.model, step)
        state.step_ended(step, loss, self.section.batch_size * state.objective.replays)
        if bar.due:
            bar.update(step + 1, _summary(_now(state, float(loss))))

    def epoch_ended(self, bar: Bar, epoch: int) -> bool:
        """Validate, let the method react, checkpoint, say how it went; whether that was all."""
        state, method = self.state, self.state.method
        clean, robust = validate(self.run, state.network, self.twin)
        record = {"epoch": epoch, "clean": clean, "robust": robust}
        record["learning_rate"] = state.optimiser.param_groups[0]["lr"]
        eligible = True
        if method is not None:
            if method.watches:
                method.judged(*overfitting(self.run, state.model, self.twin))
                state.passes += overfitting_passes(self.run)
            record |= method.metrics(state.model)
            eligible = method.budget_met(state.model)
            method.epoch_ended(state.model, epoch)
        state.epoch_ended(record, eligible=eligible)
        self.write_metrics()
        said, left = _summary(state.history[-1]), bar.left((epoch + 1) * state.steps)
        self.run.console.say(f"{state.stage} {epoch + 1}/{self.section.epochs}: {said}{left}")
        for doubt in self.doubts(len(state.history)):
            self.run.console.say(f"warning: {doubt}")
        return self.done

    @property
    def done(self) -> bool:
        """Whether the method has found what it was to find."""
        method = self.state.method
        return method is not None and method.done(self.state.model)

    def write_metrics(self) -> None:
        self.run.folder.write_metrics({**self.others, self.state.stage: self.state.history})

    def doubts(self, epochs: int) -> Iterator[str]:
        """What speaks against the stage after its first `epochs`, with the way out."""
        for doubt in _doubts(self.state.history[:epochs], self.section.epochs, self.run.classes):
            yield f"{doubt}; lower {self.state.stage}.learning_rate in a new run"


def _objectives(
    run: Run, stage: str, distillation: Distillation | None, *, repeated: bool
) -> Callable[[nn.Module], tuple[Objective, nn.Module | None]]:
    """Makes the stage's loss for a network, and the twin on the kernels that the loss is to run.

    The network itself where that is None: it is not masked, or there are no kernels for it.
    `repeated`: each batch has a second pass, which meets the same adversarial images.
    """
    wanted = getattr(run.recipe, stage).objective or run.recipe.objective
    looks_inside = distillation is None and wanted.name == "pwoa"  # where no twin has layers
    teacher = load_network(run, "pretrain").eval() if looks_inside or distillation else None
    soft = _fixed(run, teacher) if teacher is not None and distillation is not None else None
    backend = run.recipe.execution.backend

    def make(network: nn.Module) -> tuple[Objective, nn.Module | None]:
        attacked = under_attack(run, network)
        if distillation is None or soft is None:
            objective = adversarial.objective(run.recipe, wanted, attacked, teacher)
        else:
            objective = adversarial.distilled(run.recipe, wanted, attacked, distillation, soft)
        if repeated:
            objective = adversarial.attacked_once(objective)
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


def under_attack(run: Run, model: nn.Module) -> Twin | None:
    """What training attacks run on: the model's twin, in their precision, or the model itself."""
    if not run.recipe.execution.twin:
        return None
    low = run.recipe.execution.attack_precision == "bf16"
    return adversarial.twin(run.recipe, model, dtype=torch.bfloat16 if low else None)


def _fixed(run: Run, model: nn.Module) -> nn.Module:
    """A network in eval mode as a fixed function: its twin, never in the precision of attacks."""
    twin = adversarial.twin(run.recipe, model) if run.recipe.execution.twin else None
    return model if twin is None else twin.current()


def _diverged(folder: RunFolder, stage: str, error: Diverged) -> ValueError:
    last = folder.progress(stage)
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


def _now(state: TrainingState, loss: float) -> dict:
    """The state within an epoch: loss, density and gamma of now, accuracies of the last epoch."""
    last = state.history[-1] if state.history else {}
    metrics = {} if state.method is None else state.method.metrics(state.model)
    return {**last, **metrics, "loss": loss}


def _summary(record: dict) -> str:
    parts = [f"loss {record['loss']:.3f}"]
    if "clean" in record:
        parts.append(percent(record["clean"], record["robust"]))
    for name, form in (("density", ".4f"), ("gamma", ".3g")):
        if name in record:
            parts.append(f"{name} {record[name]:{form}}")
    return ", ".join(parts)
