# SPDX-License-Identifier: Apache-2.0
"""Training losses that harden a network: PGD-AT, TRADES, MART, RSLAD, Free and fast training.

An attack runs in eval mode, the forward passes that are differentiated in the model's own mode.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harprune.robustness.attacks import (
    Attack,
    clean_logits,
    kl_divergence,
    normal_start,
    record,
)
from harprune.robustness.threat import Threat


class Objective(Protocol):
    """A training loss: called as (model, x, y), it gives a scalar."""

    @property
    def attack(self) -> Attack | None:
        """What it trains against; None where it runs no attack of its own."""
        ...

    @property
    def replays(self) -> int:
        """Optimiser steps that a batch gets."""
        ...

    @property
    def passes(self) -> int:
        """Forward + backward passes that a step costs for each image.

        A forward pass alone, as a teacher's, is about a third of one, and nowhere counted.
        """
        ...

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor: ...


TRADES_ATTACK = {"start": normal_start, "loss": kl_divergence, "target": clean_logits}
"""Options of PGD that make it the attack of TRADES."""

MART_ATTACK = {"start": normal_start}
"""Options of PGD that make it the attack of MART."""


def _adversarial(
    attack: Attack, clean_forward: bool, model: nn.Module, x: Tensor, y: Tensor
) -> Tensor:
    if clean_forward:
        # Not under no_grad: inside parametrize.cached() that would cache weights without a graph.
        model(x)
    return attack(model, x, y)


@dataclass(frozen=True)
class Natural:
    """Cross-entropy on the images as they are."""

    attack = None
    replays = 1
    passes = 1

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)


@dataclass(frozen=True)
class PGDAT:
    """Cross-entropy on attacked images (Madry et al. 2018, eq. 2.1).

    Args:
        attack: any attack, usually PGD.
        clean_forward: first pass the clean batch through the model in its own mode, as the authors
            of HYDRA and HARP do, so that batch-norm statistics absorb it too.
    """

    attack: Attack
    clean_forward: bool = False
    replays = 1

    @property
    def passes(self) -> int:
        return self.attack.passes + 1

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x_adv = _adversarial(self.attack, self.clean_forward, model, x, y)
        return F.cross_entropy(model(x_adv), y)


@dataclass(frozen=True)
class TRADES:
    """Cross-entropy on clean images + beta KL(p(x) || p(x_adv)) (Zhang et al. 2019, eq. 5).

    Args:
        attack: any attack, usually `PGD(..., **TRADES_ATTACK)`.
        beta: weight of the second term, the paper's 1 / lambda.
        clean_forward: as in `PGDAT`.
    """

    attack: Attack
    beta: float = 6.0
    clean_forward: bool = False
    replays = 1

    @property
    def passes(self) -> int:
        return self.attack.passes + 2

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x_adv = _adversarial(self.attack, self.clean_forward, model, x, y)
        clean = model(x)
        return F.cross_entropy(clean, y) + self.beta * kl_divergence(model(x_adv), clean).mean()


@dataclass(frozen=True)
class MART:
    """Boosted cross-entropy on attacked images + beta KL weighted by the doubt on clean ones.

    Wang et al. 2020, eq. 9-11: mean of -log p_y(x_adv) - log(1 - max_{k != y} p_k(x_adv)), plus
    beta times the mean of KL(p(x) || p(x_adv)) (1 - p_y(x)).

    Args:
        attack: any attack, usually `PGD(..., **MART_ATTACK)`.
        beta: weight of the second term, the paper's lambda.
        clean_forward: as in `PGDAT`.
    """

    attack: Attack
    beta: float = 5.0
    clean_forward: bool = False
    replays = 1

    @property
    def passes(self) -> int:
        return self.attack.passes + 2

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x_adv = _adversarial(self.attack, self.clean_forward, model, x, y)
        clean, attacked = model(x), model(x_adv)
        doubt = 1 - clean.softmax(1).gather(1, y[:, None]).squeeze(1)
        consistency = (kl_divergence(attacked, clean) * doubt).mean()
        return _boosted_cross_entropy(attacked, y) + self.beta * consistency


def _boosted_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Mean of -log p_y - log(1 - p_k), k the likeliest wrong class (Wang et al. 2020, eq. 9)."""
    rival = logits.scatter(1, y[:, None], -torch.inf).argmax(1, keepdim=True)
    # log(1 - p_k) as a sum over the other classes: finite however sure of k the model is.
    others = logits.scatter(1, rival, -torch.inf).logsumexp(1) - logits.logsumexp(1)
    return F.cross_entropy(logits, y) - others.mean()


@dataclass(frozen=True)
class SoftLabels:
    """T^2 KL(q || p) of answers softened by the temperature T, per image (N,), from logits.

    p = softmax(logits / T), q = softmax(reference / T). T^2 keeps gradients at one scale for every
    temperature (Hinton et al. 2015, sec. 2).
    """

    temperature: float = 1.0

    def __call__(self, logits: Tensor, reference: Tensor) -> Tensor:
        t = self.temperature
        return t**2 * kl_divergence(logits / t, reference / t)


@dataclass(frozen=True)
class RSLAD:
    """(1 - weight) D(x) + weight D(x_adv), D the divergence from a robust teacher's answer to x.

    Robust soft label adversarial distillation (Zi et al., ICCV 2021), there with temperature 1 and
    weight 5/6. Labels are not used; what the attack is given for y are the teacher's logits.

    Args:
        attack: raises D, as `PGD(..., loss=divergence)` does.
        teacher: images -> logits (N, K), a fixed function; asked once for each batch.
        divergence: D, a function of (logits, the teacher's) per image.
        weight: of the attacked images, in [0, 1].
    """

    attack: Attack
    teacher: Callable[[Tensor], Tensor] = field(repr=False)
    divergence: SoftLabels = SoftLabels()
    weight: float = 5 / 6
    replays = 1

    @property
    def passes(self) -> int:
        return self.attack.passes + 2

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            reference = self.teacher(x)
        x_adv = self.attack(model, x, reference)
        clean, attacked = (self.divergence(model(z), reference).mean() for z in (x, x_adv))
        return (1 - self.weight) * clean + self.weight * attacked


@dataclass(repr=False, eq=False)
class Free:
    """Free adversarial training (Shafahi et al. 2019, algorithm 1).

    Each batch gets `replays` optimiser steps; the backward pass of each also moves a noise buffer
    by epsilon along the images' gradient. The buffer persists from batch to batch: `reset` it
    where the recipe says so (HARP: each epoch), and carry `state_dict` through a resume.
    """

    threat: Threat
    replays: int = 4
    attack = None
    passes = 1

    def __post_init__(self) -> None:
        self._noise: Tensor | None = None

    __repr__ = record

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        noise = self._rows(x).clone().requires_grad_()
        noise.register_hook(self._move)
        return F.cross_entropy(model((x + noise).clamp(0.0, 1.0)), y)

    def _rows(self, x: Tensor) -> Tensor:
        """The buffer's rows for this batch; it grows to the largest batch seen."""
        held = x.new_zeros((0, *x.shape[1:])) if self._noise is None else self._noise.to(x)
        if held.shape[1:] != x.shape[1:]:
            raise ValueError(
                f"images of shape {tuple(x.shape[1:])} do not fit the noise of shape "
                f"{tuple(held.shape[1:])}; call reset() before changing the data"
            )
        missing = max(len(x) - len(held), 0)
        self._noise = torch.cat([held, x.new_zeros((missing, *x.shape[1:]))]) if missing else held
        return self._noise[: len(x)]

    def _move(self, gradient: Tensor) -> None:
        """One step of epsilon along the gradient that the caller's backward pass brings."""
        rows = cast(Tensor, self._noise)[: len(gradient)]
        rows.copy_(self.threat.clip(rows + self.threat.epsilon * self.threat.ascent(gradient)))

    def reset(self) -> None:
        """Forget the noise."""
        self._noise = None

    def state_dict(self) -> dict[str, Tensor]:
        """The noise, if any batch was seen."""
        return {} if self._noise is None else {"noise": self._noise.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up the noise that `state_dict` gave."""
        self._noise = state["noise"].clone() if "noise" in state else None
