# SPDX-License-Identifier: Apache-2.0
"""The state of a training stage: what it remembers between steps, and all a resume needs."""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from harprune.methods.base import Method
from harprune.robustness.objectives import Free, Objective
from harprune.run.folder import RunFolder
from harprune.training import checkpoint
from harprune.training.averaging import Average
from harprune.training.loop import Diverged


@dataclass
class TrainingState:
    """Progress of `stage`: step reached, metrics per epoch, best epoch so far.

    An epoch has `steps` batches. Where there is an `average`, it is the network that counts: epochs
    are judged by it and the best one holds it. A stage that is not `divisible` can only go on from
    the end of an epoch.

    `save` and `restore` carry it, with model, average, method, optimiser and the objective's own
    state, through the run's progress file. Randomness needs no saving: it is a function of the
    step.
    """

    folder: RunFolder
    stage: str
    model: nn.Module
    optimiser: Optimizer
    objective: Objective
    method: Method | None
    steps: int
    average: Average | None = None
    divisible: bool = True
    step: int = 0
    loss_sum: float = 0.0
    passes: int = 0
    history: list[dict] = field(default_factory=list)
    best: list | None = None
    _origin: dict[str, str] = field(init=False)
    _losses: list[Tensor] = field(default_factory=list)
    _saved: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._origin = self.folder.origin(self.stage)

    @property
    def network(self) -> nn.Module:
        """What the stage is to leave behind: the average, or the model itself."""
        return self.model if self.average is None else self.average.module

    def restore(self) -> bool:
        """Go on where the progress file stands; False when there is none."""
        path = self.folder.progress(self.stage)
        if not path.exists():
            return False
        tensors, values = checkpoint.load(path)
        self._require_best(values["best"])
        self.model.load_state_dict(checkpoint.unpack("model", tensors))
        checkpoint.unpack_optimiser(
            self.optimiser, checkpoint.unpack("optimiser", tensors), values["optimiser"]
        )
        if self.method is not None:
            self.method.load_state_dict(values["method"])
        if isinstance(self.objective, Free):
            self.objective.load_state_dict(checkpoint.unpack("objective", tensors))
        if self.average is not None:
            self.average.load_state_dict(checkpoint.unpack("average", tensors))
        for name in ("step", "loss_sum", "passes", "history", "best"):
            setattr(self, name, values[name])
        return True

    def save(self) -> None:
        """Write the progress file.

        Raises:
            Diverged: the weights are not finite; the last file stays.
        """
        self._require_finite()
        self._sum_losses()
        self._saved = time.monotonic()
        if not self.folder.leader:
            return
        state, plain = checkpoint.pack_optimiser(self.optimiser)
        tensors = checkpoint.pack("model", self.model.state_dict())
        tensors |= checkpoint.pack("optimiser", state)
        if isinstance(self.objective, Free):
            tensors |= checkpoint.pack("objective", self.objective.state_dict())
        if self.average is not None:
            tensors |= checkpoint.pack("average", self.average.state_dict())
        values = {
            name: getattr(self, name) for name in ("step", "loss_sum", "passes", "history", "best")
        }
        values |= {"optimiser": plain, "method": self.method.state_dict() if self.method else {}}
        values |= self._origin
        self.folder.note_change()
        checkpoint.save(self.folder.progress(self.stage), tensors, values)

    def _require_best(self, best: list | None) -> None:
        """Fail now, not after the last epoch, where the best one cannot be read any more."""
        path, progress = self.folder.best(self.stage), self.folder.progress(self.stage)
        if best is not None and not path.exists():
            raise ValueError(
                f"{path} is missing, to which {progress} refers; restore it, or delete the other "
                "as well and the stage starts again"
            )
        if best is not None:
            checkpoint.load(path)

    def _require_finite(self) -> None:
        # The loss of the last step came before its update.
        if not all(torch.isfinite(p).all() for p in self.model.parameters()):
            raise Diverged(f"the weights are not finite after step {self.step - 1}")

    def step_ended(self, step: int, loss: Tensor, images: int) -> None:
        """Count one optimiser step; checkpoint when the last one is old."""
        self.step = step + 1
        self._losses.append(loss)
        self.passes += images * self.objective.passes
        # What follows the last step of an epoch must not be skipped: `epoch_ended` saves it.
        within = self.divisible and self.step % self.steps != 0
        age = time.monotonic() - self._saved
        if within and age > 60 * self.folder.recipe.execution.checkpoint_minutes:
            self.save()

    def _sum_losses(self) -> None:
        # Read together, because reading one waits for an accelerator to have finished its step.
        # One after another: `sum` compensates, and would give other bits after a resume.
        for loss in torch.stack(self._losses).tolist() if self._losses else ():
            self.loss_sum += loss
        self._losses.clear()

    def epoch_ended(self, record: dict, *, eligible: bool) -> None:
        """Append the epoch's record, keep it if it is the best so far, checkpoint.

        Epochs that are not `eligible` (the budget is not met) give way to any that is; among
        them the latest counts.
        """
        self._sum_losses()
        record = {**record, "loss": self.loss_sum / self.steps, "passes": self.passes}
        self.loss_sum = 0.0
        self.history.append(record)
        if isinstance(self.objective, Free):
            self.objective.reset()  # each epoch begins without noise, as in HARP's authors' code
        score = [1, record["robust"], record["clean"]] if eligible else [0, record["epoch"], 0]
        self._require_finite()
        if self.best is None or score > self.best[:3]:
            self.best = [*score, record["epoch"]]
            if self.folder.leader:
                tensors = checkpoint.pack("model", self.network.state_dict())
                checkpoint.save(self.folder.best(self.stage), tensors, {"epoch": record["epoch"]})
        self.save()

    @torch.no_grad()
    def take_best(self) -> int:
        """Load the best epoch into the model and mark it in the history; its number."""
        tensors, values = checkpoint.load(self.folder.best(self.stage))
        self.model.load_state_dict(checkpoint.unpack("model", tensors))
        self.history[values["epoch"]]["selected"] = True
        return values["epoch"]
