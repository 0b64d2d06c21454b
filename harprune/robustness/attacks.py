# SPDX-License-Identifier: Apache-2.0
"""White-box attacks: FGSM, PGD with any loss and start, and Auto-PGD.

An attack is a frozen dataclass called as `attack(model, x, y) -> x_adv`; its `repr` is the record
of what was run, and `passes` the forward + backward passes it spends on an image. It puts the
model in eval mode and restores it, and differentiates by the images only, so that no parameter
ever receives a gradient from it.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from math import inf
from numbers import Real
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harprune.arguments import require_whole
from harprune.modes import eval_mode
from harprune.robustness.threat import Threat, require_threat


class Attack(Protocol):
    """Called as (model, x, y), it gives x_adv: the shape of x, in [0, 1]."""

    @property
    def passes(self) -> int:
        """Forward + backward passes that it spends on an image."""
        ...

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor: ...


Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits (N, K), what they are compared with) -> loss per image (N,), which an attack raises."""


def record(self: Any) -> str:
    """A dataclass as text that is the same in every process: functions appear by name."""
    values = [(field.name, getattr(self, field.name)) for field in fields(self) if field.repr]
    shown = [
        f"{name}={value.__name__ if inspect.isroutine(value) else repr(value)}"
        for name, value in values
    ]
    return f"{type(self).__name__}({', '.join(shown)})"


# --- losses ---------------------------------------------------------------------------------


def _wide(logits: Tensor) -> Tensor:
    """At least float32: a loss in half precision has no gradient left on confident images."""
    return logits if logits.dtype == torch.float64 else logits.float()


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """-log p_y, per image (N,)."""
    return F.cross_entropy(_wide(logits), y, reduction="none")


def kl_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(softmax(reference) || softmax(logits)), per image (N,); both arguments are logits."""
    p, q = _wide(reference).log_softmax(1), _wide(logits).log_softmax(1)
    return F.kl_div(q, p, reduction="none", log_target=True).sum(1)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _largest_other(logits: Tensor, y: Tensor) -> Tensor:
    """The largest logit of a wrong class, per image (N,)."""
    return logits.scatter(1, y[:, None], -torch.inf).amax(1)


@dataclass(frozen=True)
class Margin:
    """How far a wrong logit leads, at most `kappa` (Carlini & Wagner 2017, f6), per image (N,).

    PGD on it is the C&W_inf attack of robust pruning papers: kappa 50, 20 steps.
    """

    kappa: float = 50.0

    def __post_init__(self) -> None:
        if not (_is_number(self.kappa) and self.kappa >= 0):
            raise ValueError(f"kappa = {self.kappa!r} must be a number of at least 0")

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        logits = _wide(logits)
        lead = _largest_other(logits, y) - logits.gather(1, y[:, None]).squeeze(1)
        return lead.clamp_max(self.kappa)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio, blind to the logits' scale (Croce & Hein 2020, eq. 6), (N,).

    Raises:
        ValueError: there are fewer than three classes.
    """
    if logits.shape[1] < 3:
        raise ValueError(
            f"the DLR loss needs 3 classes, the model has {logits.shape[1]}; use cross_entropy"
        )
    logits = _wide(logits)
    top = logits.topk(3, dim=1).values
    lead = _largest_other(logits, y) - logits.gather(1, y[:, None]).squeeze(1)
    return lead / (top[:, 0] - top[:, 2] + 1e-12)


# --- where an attack starts, and what its loss compares with ----------------------------------


def uniform_start(threat: Threat, x: Tensor) -> Tensor:
    """Uniform in the threat's ball (Madry et al. 2018)."""
    return threat.random_start(x)


def normal_start(threat: Threat, x: Tensor) -> Tensor:
    """x + 0.001 N(0, 1), the start of TRADES and MART; the first step projects it."""
    return x + 0.001 * torch.randn_like(x)


def no_start(threat: Threat, x: Tensor) -> Tensor:
    """The clean image."""
    return x


def labels(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loss compares with the labels."""
    return y


def clean_logits(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loss compares with the model's answer to the clean images, computed once."""
    # Not under no_grad: inside parametrize.cached() that would cache weights without a graph.
    return model(x).detach()


# --- attacks ----------------------------------------------------------------------------------


def _require_of_attack(threat: Any, loss: Any) -> None:
    require_threat(threat)
    if not callable(loss):
        raise ValueError(
            f"loss = {loss!r} must be a function of (logits, target), as cross_entropy"
        )


def _differentiate(
    model: nn.Module, x_adv: Tensor, loss: Loss, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, loss per image, gradient by the images) at `x_adv`, all detached."""
    x_adv = x_adv.detach().requires_grad_()
    logits = model(x_adv)
    values = loss(logits, target)
    (gradient,) = torch.autograd.grad(values.sum(), x_adv)
    return logits.detach(), values.detach(), gradient


def _best_of(
    restarts: int,
    run: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
    x: Tensor,
    y: Tensor,
    target: Tensor,
) -> Tensor:
    """Per image the broken result of `run`, else that of the highest loss.

    `run(x, y, target)` gives (x_adv, broken, loss); only images not yet broken run again.
    """
    best, highest = x.clone(), x.new_full((len(x),), -torch.inf)
    left = torch.arange(len(x), device=x.device)
    for _ in range(restarts):
        if not len(left):
            break
        x_adv, broken, loss = run(x[left], y[left], target[left])
        better = broken | (loss > highest[left])
        best[left[better]] = x_adv[better]
        highest[left[better]] = loss[better].to(highest.dtype)
        left = left[~broken]
    return best


@dataclass(frozen=True, repr=False)
class PGD:
    """Projected gradient ascent (Madry et al. 2018); the last iterate is the result.

    Args:
        threat: what the attacker may do.
        steps: gradient steps.
        step_size: in the threat's norm; 2.5 epsilon / steps when None.
        restarts: runs from new starts, each on the images not yet broken. One run spends `steps`
            passes and never waits for the device; more need one forward pass each to be compared.
        loss: what is raised, a function of (logits, target) per image.
        start: `uniform_start`, `normal_start` or `no_start`.
        target: what the loss compares with: `labels` or `clean_logits`.

    Raises:
        ValueError: no threat, a loss that is no function, a count below 1, or a step size that is
            not above 0.
    """

    threat: Threat
    steps: int
    step_size: float | None = None
    restarts: int = 1
    loss: Loss = cross_entropy
    start: Callable[[Threat, Tensor], Tensor] = uniform_start
    target: Callable[[nn.Module, Tensor, Tensor], Tensor] = labels

    def __post_init__(self) -> None:
        _require_of_attack(self.threat, self.loss)
        require_whole("steps", self.steps, 1)
        require_whole("restarts", self.restarts, 1)
        size = self.step_size
        if size is not None and not (_is_number(size) and 0 < size < inf):
            raise ValueError(
                f"step_size = {size!r} must be a finite number above 0, or None for a default"
            )

    __repr__ = record

    @property
    def passes(self) -> int:
        """Forward + backward passes per image, at most."""
        return self.steps * self.restarts

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """(model, x (N, ...) in [0, 1], y (N,)) -> x_adv."""
        with eval_mode(model), torch.enable_grad():
            target = self.target(model, x, y)
            if self.restarts == 1:
                return self._climb(model, x, target)
            return _best_of(self.restarts, lambda *batch: self._run(model, *batch), x, y, target)

    def _climb(self, model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        size = self.step_size or 2.5 * self.threat.epsilon / self.steps
        x_adv = self.start(self.threat, x).detach()
        for _ in range(self.steps):
            gradient = _differentiate(model, x_adv, self.loss, target)[2]
            x_adv = self.threat.project(x_adv + size * self.threat.ascent(gradient), x)
        return x_adv

    def _run(self, model: nn.Module, x: Tensor, y: Tensor, target: Tensor):
        x_adv = self._climb(model, x, target)
        logits = model(x_adv).detach()
        return x_adv, logits.argmax(1) != y, self.loss(logits, target)


@dataclass(frozen=True, repr=False)
class FGSM:
    """One step of the whole radius from the clean image (Goodfellow et al. 2015).

    Raises:
        ValueError: no threat, or a loss that is no function.
    """

    threat: Threat
    loss: Loss = cross_entropy

    def __post_init__(self) -> None:
        _require_of_attack(self.threat, self.loss)

    __repr__ = record

    @property
    def passes(self) -> int:
        """Forward + backward passes per image."""
        return 1

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """(model, x (N, ...) in [0, 1], y (N,)) -> x_adv."""
        step = PGD(self.threat, 1, self.threat.epsilon, loss=self.loss, start=no_start)
        return step(model, x, y)


def _checkpoints(steps: int) -> dict[int, int]:
    """{step after which Auto-PGD reviews its step size: steps since the review before}."""
    window, shrink, least = (max(int(part * steps), 1) for part in (0.22, 0.03, 0.06))
    reviews, at = {}, window
    while at <= steps:
        reviews[at] = window
        window = max(window - shrink, least)
        at += window
    return reviews


@dataclass(frozen=True, repr=False)
class APGD:
    """Auto-PGD: momentum, and a step size per image that halves when progress stalls.

    Croce & Hein 2020, algorithm 1, with rho = 0.75 and momentum 0.75; at a checkpoint a tie in the
    first condition halves the step, as in the authors' code. The result is an adversarial iterate
    where one was met, else the iterate of the highest loss.

    Args:
        threat: what the attacker may do.
        steps: gradient steps of one run.
        restarts: runs from new starts, each on the images not yet broken.
        loss: `cross_entropy` or `dlr`.

    Raises:
        ValueError: no threat, a loss that is no function, or a count below 1.
    """

    threat: Threat
    steps: int = 50
    restarts: int = 5
    loss: Loss = cross_entropy

    def __post_init__(self) -> None:
        _require_of_attack(self.threat, self.loss)
        require_whole("steps", self.steps, 1)
        require_whole("restarts", self.restarts, 1)

    __repr__ = record

    @property
    def passes(self) -> int:
        """Forward + backward passes per image, at most."""
        return (self.steps + 1) * self.restarts

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """(model, x (N, ...) in [0, 1], y (N,)) -> x_adv."""

        def run(x: Tensor, y: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.run(model, x, y, self.threat.boundary_start(x))

        with eval_mode(model), torch.enable_grad():
            return _best_of(self.restarts, run, x, y, y)

    def run(
        self, model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One run from `x_adv` -> (x_adv, broken (N,), highest loss (N,))."""
        logits, loss, gradient = _differentiate(model, x_adv, self.loss, y)
        size = x.new_full((len(x), *[1] * (x.dim() - 1)), 2 * self.threat.epsilon)
        broken = logits.argmax(1) != y
        found, before, earlier_loss = x_adv, x_adv, loss
        top_x, top_gradient, top_loss = x_adv, gradient, loss
        reviewed_loss, halved = loss, torch.ones_like(broken)
        rises = torch.zeros_like(y)
        reviews = _checkpoints(self.steps)
        for step in range(1, self.steps + 1):
            keep = 1.0 if step == 1 else 0.75
            ahead = self._advance(x, x_adv, x_adv - before, gradient, size, keep)
            before, x_adv = x_adv, ahead
            logits, loss, gradient = _differentiate(model, x_adv, self.loss, y)
            wrong = logits.argmax(1) != y
            broken, found = broken | wrong, _choose(wrong, x_adv, found)
            higher = loss > top_loss
            top_x, top_gradient = (
                _choose(higher, x_adv, top_x),
                _choose(higher, gradient, top_gradient),
            )
            top_loss = torch.where(higher, loss, top_loss)
            rises, earlier_loss = rises + (loss > earlier_loss), loss
            if step in reviews:
                stalled = rises <= 0.75 * reviews[step]
                halved = stalled | (~halved & (reviewed_loss >= top_loss))
                reviewed_loss, rises = top_loss, torch.zeros_like(rises)
                size = _choose(halved, size / 2, size)
                x_adv, gradient = (
                    _choose(halved, top_x, x_adv),
                    _choose(halved, top_gradient, gradient),
                )
        return _choose(broken, found, top_x), broken, top_loss

    def _advance(
        self, x: Tensor, x_adv: Tensor, drift: Tensor, gradient: Tensor, size: Tensor, keep: float
    ) -> Tensor:
        """The next iterate: a gradient step, of which `keep` is mixed with the last drift."""
        project = self.threat.project
        ahead = project(x_adv + size * self.threat.ascent(gradient), x)
        return project(x_adv + keep * (ahead - x_adv) + (1 - keep) * drift, x)


def _choose(where: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Per image `yes` or `no`."""
    return torch.where(where.reshape(-1, *[1] * (no.dim() - 1)), yes, no)
