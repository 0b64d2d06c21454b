# SPDX-License-Identifier: Apache-2.0
"""Training losses: functions (model, x, y) -> scalar, configured as frozen dataclasses.

Attacks run in eval mode; the loss itself is taken in the model's own mode. `passes` counts forward
passes that are differentiated, per image and step; `replays` the steps taken on each batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harprune.robustness.attacks import Attack, clean_logits, kl_divergence, normal_start
from harprune.robustness.threat import Threat

Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]

TRADES_ATTACK = {"start": normal_start, "loss": kl_divergence, "target": clean_logits}
"""What PGD needs to be the attack of TRADES."""

MART_ATTACK = {"start": normal_start}
"""What PGD needs to be the attack of MART."""


@dataclass(frozen=True)
class Natural:
    """Cross-entropy on the images as they are."""

    passes: int = 1
    replays: int = 1

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)


@dataclass(frozen=True)
class PGDAT:
    """Adversarial training (Madry et al. 2018): cross-entropy on adversarial images only.

    Attributes:
        clean_forward: first pass the clean batch in the model's own mode, gradients unused, so
            that batch-norm statistics absorb it too (a hidden choice of HARP's released code).
    """

    attack: Attack
    clean_forward: bool = False
    replays: int = 1

    @property
    def passes(self) -> int:
        return self.attack.passes + 1

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if self.clean_forward:
            with torch.no_grad():
                model(x)
        return F.cross_entropy(model(self.attack(model, x, y)), y)


@dataclass(frozen=True)
class TRADES:
    """CE(x) + beta KL(p(x) || p(x_adv)) (Zhang et al. 2019, eq. 5)."""

    attack: Attack
    beta: float = 6.0
    replays: int = 1

    @property
    def passes(self) -> int:
        return self.attack.passes + 2

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x_adv = self.attack(model, x, y)
        clean, adversarial = model(x), model(x_adv)
        robust = kl_divergence(adversarial, clean).mean()
        return F.cross_entropy(clean, y) + self.beta * robust


@dataclass(frozen=True)
class MART:
    """Boosted CE(x_adv) + beta KL(p(x) || p(x_adv)) (1 - p_y(x)) (Wang et al. 2020, eq. 11)."""

    attack: Attack
    beta: float = 5.0
    replays: int = 1

    @property
    def passes(self) -> int:
        return self.attack.passes + 2

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x_adv = self.attack(model, x, y)
        clean, adversarial = model(x), model(x_adv)
        p_clean, p_adv = clean.softmax(dim=1), adversarial.softmax(dim=1)
        rival = p_adv.scatter(1, y[:, None], 0.0).amax(dim=1)
        boosted = F.cross_entropy(adversarial, y) - torch.log(1.0001 - rival + 1e-12).mean()
        right = p_clean.gather(1, y[:, None]).squeeze(1)
        robust = (kl_divergence(adversarial, clean) * (1.0000001 - right)).mean()
        return boosted + self.beta * robust


class Free:
    """Free adversarial training (Shafahi et al. 2019): one backward pass for weights and noise.

    Each batch is taken `replays` times; the noise persists from step to step and batch to batch,
    and moves by epsilon along the input gradient that the caller's `backward()` brings with it.
    """

    def __init__(self, threat: Threat, replays: int = 4):
        if replays < 1:
            raise ValueError(f"replays {replays} must be at least 1")
        self.threat = threat
        self.replays = replays
        self.passes = 1
        self._noise: Tensor | None = None

    def __repr__(self) -> str:
        return f"Free({self.threat}, replays={self.replays})"

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if self._noise is None or len(self._noise) < len(x):
            self._noise = torch.zeros_like(x)
        noise = self._noise[: len(x)].clone().requires_grad_(True)
        noise.register_hook(lambda gradient: self._move(gradient, x))
        # The ball is around 0 here; the images' own range is kept by the clamp.
        return F.cross_entropy(model((x + noise).clamp(0.0, 1.0)), y)

    def _move(self, gradient: Tensor, x: Tensor) -> None:
        current = self._noise[: len(x)]
        moved = current + self.threat.epsilon * self.threat.ascent(gradient)
        self._noise[: len(x)] = self.threat.project(x + moved, x) - x

    def reset(self) -> None:
        """Start again from no noise."""
        self._noise = None

    def state_dict(self) -> dict[str, Tensor]:
        """The noise, if there is any."""
        return {} if self._noise is None else {"noise": self._noise}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        self._noise = state.get("noise")
