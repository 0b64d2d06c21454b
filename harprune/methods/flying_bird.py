# SPDX-License-Identifier: Apache-2.0
"""Flying Bird and Flying Bird+ (Chen et al., ICLR 2022): sparse from the first step, ever rewired.

Adversarial training under random masks. Every so often each layer drops the fraction d of its kept
units with the least magnitude and grows as many elsewhere, at zero: anywhere (SET, Mocanu et al.
2018), or where the loss would fall fastest (RigL, Evci et al. 2020). d falls by a cosine.

Flying Bird+ follows overfitting: in the second half, while the gap between robust accuracy on
training and on validation images has been rising it drops more, while the validation loss has not
been falling it grows more. The paper lets the final density drift; here `settle` brings it to the
budget, and of epochs those count that it need not cut.

The paper shares the density by IGQ (budget.allocation = "igq") and trains from scratch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from math import cos, floor, pi
from operator import ge, gt
from typing import cast

import torch
from torch import Tensor, nn

from harprune.methods.base import Budget, Method, generator, given_counts, parameter_group
from harprune.sparsity import masks
from harprune.sparsity.layers import Layer
from harprune.sparsity.masks import KeptMask
from harprune.sparsity.selection import top_among

_LEAST = 0.005  # where the cosine ends
_PATIENCE = 4  # epochs that Flying Bird+ looks back
_MORE_DROPPED, _MORE_GROWN = 0.4, 0.05  # of d, and of what is regrown anyway


class Growth(Enum):
    """Which units grow."""

    RANDOM = "random"
    GRADIENT = "gradient"


class WatchedMask(KeptMask):
    """A mask that keeps the loss's last gradient to *all* weights, pruned ones included."""

    gradient: Tensor | None = None

    def forward(self, weight: Tensor) -> Tensor:
        product = super().forward(weight)
        if product.requires_grad:
            product.register_hook(self._see)
        return product

    def _see(self, gradient: Tensor) -> None:
        self.gradient = gradient.detach()


@dataclass(eq=False)
class FlyingBird(Method):
    """Dynamic sparse training.

    A weight dies with its momentum, which has faded when it grows back, unless it does so at once.

    Attributes:
        growth: random (SET) or gradient (RigL).
        drop: fraction dropped in the first update.
        updates: how often the masks change; the interval is a third longer in the second half.
            The authors' 900 and 1,200 steps of 78,200 make 75.
        until: share of the training after which the masks stay.
        adaptive: Flying Bird+.
    """

    growth: Growth = Growth.RANDOM
    drop: float = 0.5
    updates: int = 75
    until: float = 1.0
    adaptive: bool = False
    _seed: int = field(init=False, repr=False)
    _total: int = field(init=False, repr=False, default=0)
    _epochs: int = field(init=False, repr=False, default=0)
    _gaps: list[float] = field(init=False, repr=False, default_factory=list)
    _losses: list[float] = field(init=False, repr=False, default_factory=list)

    def __post_init__(self):
        if not 0.0 < self.drop < 1.0:
            raise ValueError(f"drop {self.drop:g} must lie strictly between 0 and 1")
        if self.updates < 1:
            raise ValueError(f"updates = {self.updates} must be at least 1")
        if not 0.0 < self.until <= 1.0:
            raise ValueError(f"until {self.until:g} must lie in (0, 1]")

    @property
    def watches(self) -> bool:
        return self.adaptive

    def beyond(self, epochs: int, steps: int) -> dict[str, str]:
        total = epochs * steps
        short = self.updates > total
        return {"updates": f"exceeds {total} steps; there is one after each"} if short else {}

    def attach(self, model: nn.Module, budget: Budget) -> None:
        self._budget, self._seed = budget, int(torch.randint(2**31, ()))
        counts = given_counts(model, budget)
        for number, (name, layer) in enumerate(budget.layers(model).items()):
            shape = budget.granularity.score_shape(layer)
            everywhere = torch.ones(shape, dtype=torch.bool, device=layer.parameter.device)
            draw = torch.rand(shape, generator=generator(self._seed, number))
            self._put(layer, top_among(draw.to(everywhere.device), everywhere, counts[name]))

    @torch.no_grad()
    def _put(self, layer: Layer, kept: Tensor) -> None:
        masks.fix(layer, kept)
        if self.growth is Growth.GRADIENT:
            masks.install(layer, WatchedMask(kept))

    def begin(self, epochs: int, steps: int) -> None:
        self._total, self._epochs = epochs * steps, epochs

    def trainable(self, model: nn.Module) -> list[dict]:
        return [parameter_group(list(model.parameters()), decay=True)]

    @torch.no_grad()
    def step_ended(self, model: nn.Module, step: int) -> None:
        done = step + 1
        if not self._due(done):
            return
        for number, (layer, mask) in enumerate(masks.of_kind(model, KeptMask).values()):
            kept = int(mask.kept.sum())
            dropped, grown = self._exchange(kept, self._rate(done))
            magnitude = self._budget.granularity.magnitude(layer, layer.parameter).abs()
            stay = top_among(magnitude, mask.kept, kept - dropped)
            grown = min(grown, int((~stay).sum()))
            new = top_among(self._promise(layer, mask, step, number), ~stay, grown)
            layer.parameter.mul_(stay)  # what grows, grows from zero
            self._put(layer, stay | new)

    def _due(self, done: int) -> bool:
        if done >= self._total or done > self.until * self._total:
            return False
        return self._passed(done) > self._passed(done - 1)

    def _passed(self, done: int) -> int:
        """Updates due by then."""
        progress = done / self._total
        share = 8 * progress / 7 if progress < 0.5 else (1 + 6 * progress) / 7
        return floor(self.updates * share + 1e-9)

    def _rate(self, done: int) -> float:
        """d, from `drop` to almost none."""
        progress = done / (self.until * self._total)
        return _LEAST + (self.drop - _LEAST) * (1.0 + cos(pi * progress)) / 2.0

    def _exchange(self, kept: int, rate: float) -> tuple[int, int]:
        """How many of `kept` units are dropped, at least one staying, and how many grow."""
        more, extra = 0.0, 0.0
        if self.adaptive:
            more = _MORE_DROPPED * rate if self._mostly(gt, self._gaps) else 0.0
            extra = _MORE_GROWN if self._mostly(ge, self._losses) else 0.0
        dropped, regrown = min(floor((rate + more) * kept), kept - 1), floor(rate * kept)
        return dropped, regrown + floor(extra * regrown)

    def _mostly(self, rose: Callable[[float, float], bool], values: list[float]) -> bool:
        """In the second half: whether at least half of the last epochs rose."""
        recent = values[-_PATIENCE - 1 :]
        if 2 * len(values) <= self._epochs or len(recent) <= _PATIENCE:
            return False
        return sum(rose(after, before) for before, after in pairwise(recent)) >= _PATIENCE / 2

    def _promise(self, layer: Layer, mask: KeptMask, step: int, number: int) -> Tensor:
        """What each unit promises were it to grow."""
        if not isinstance(mask, WatchedMask):
            shape, device = mask.kept.shape, mask.kept.device
            return torch.rand(shape, generator=generator(self._seed, number, step)).to(device)
        gradient = cast(Tensor, mask.gradient)  # a step's loss has just been differentiated
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(gradient)  # each process saw its own images
        return self._budget.granularity.magnitude(layer, gradient).abs()

    def judged(self, gap: float, loss: float) -> None:
        self._gaps.append(gap)
        self._losses.append(loss)

    def _excess(self, model: nn.Module) -> int:
        """Units that `settle` will take away."""
        counts, parts = self._counts(model), masks.of_kind(model, KeptMask)
        return sum(max(int(m.kept.sum()) - counts[n], 0) for n, (_, m) in parts.items())

    def _counts(self, model: nn.Module) -> dict[str, int]:
        """Units that each layer keeps in the end."""
        parts = masks.of_kind(model, KeptMask)
        counts = {name: int(mask.kept.sum()) for name, (_, mask) in parts.items()}
        if not self.adaptive:
            return counts
        wanted = {n: counts[n] / mask.kept.numel() for n, (_, mask) in parts.items()}
        return self._budget.counts(model, wanted)

    def budget_met(self, model: nn.Module) -> bool:
        return self._excess(model) == 0

    def doubt(self, model: nn.Module) -> str | None:
        if not (excess := self._excess(model)):
            return None
        return (
            f"no epoch kept to the budget, so {excess:,} units of the last one are cut; finetune, "
            "or leave method.adaptive out"
        )

    @torch.no_grad()
    def settle(self, model: nn.Module) -> None:
        parts, counts = masks.of_kind(model, KeptMask), self._counts(model)
        for number, (name, (layer, mask)) in enumerate(parts.items()):
            magnitude = self._budget.granularity.magnitude(layer, layer.parameter).abs()
            kept = top_among(magnitude, mask.kept, min(counts[name], int(mask.kept.sum())))
            draw = torch.rand(kept.shape, generator=generator(self._seed, number, -1))
            missing = counts[name] - int(kept.sum())
            layer.parameter.mul_(mask.kept)  # what grows, grows from zero
            masks.fix(layer, kept | top_among(draw.to(kept.device), ~kept, missing))

    def state_dict(self) -> dict:
        return {"seed": self._seed, "gaps": self._gaps, "losses": self._losses}

    def load_state_dict(self, state: dict) -> None:
        self._seed = int(state["seed"])
        self._gaps, self._losses = list(state["gaps"]), list(state["losses"])
