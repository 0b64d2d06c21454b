# SPDX-License-Identifier: Apache-2.0
"""BCS-P (Ozdenizci & Legenstein, ICML 2021): sampling connectivity while training adversarially.

Deep rewiring (Bellec et al., ICLR 2018) under the robust loss. Every weight is sign * max(theta, 0)
with its sign fixed at the start. After each optimiser step

    theta += noise of the active weights            (a Langevin step on the posterior)
    theta <= 0 becomes dormant, and as many dormant weights wake at theta = 1e-12,
    in a layer drawn in proportion to its size

so that the number of active weights is constant while layers exchange them freely. The allocation
sets where they start, the paper's densities being set by hand.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from harprune.methods.base import Budget, Method, generator, given_counts, parameter_group
from harprune.sparsity import masks
from harprune.sparsity.granularity import Granularity
from harprune.sparsity.masks import KeptMask
from harprune.sparsity.selection import top_among

_AWAKE = 1e-12


class SignedMask(KeptMask):
    """theta -> sign * theta where active, else 0."""

    sign: Tensor

    def __init__(self, sign: Tensor, kept: Tensor):
        super().__init__(kept)
        self.register_buffer("sign", sign)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.sign * self.kept


@dataclass(eq=False)
class BCS(Method):
    """Connectivity sampling from scratch; single weights only.

    Attributes:
        noise: standard deviation of the noise of a step; the authors' learning rate 0.1 times 1e-6.
    """

    noise: float = 1e-7
    _seed: int = field(init=False, repr=False)

    def __post_init__(self):
        if not self.noise >= 0.0:
            raise ValueError(f"noise {self.noise:g} must not be negative")

    def check(self, model: nn.Module, budget: Budget) -> None:
        if budget.granularity is not Granularity.WEIGHT:
            raise ValueError(
                f"bcs wakes and puts to sleep single weights, not a {budget.granularity.value}; "
                "set granularity to weight or choose another method"
            )

    @torch.no_grad()
    def attach(self, model: nn.Module, budget: Budget) -> None:
        self._budget, self._seed = budget, int(torch.randint(2**31, ()))
        counts = given_counts(model, budget)
        for number, (name, layer) in enumerate(budget.layers(model).items()):
            weight = layer.parameter
            everywhere = torch.ones_like(weight, dtype=torch.bool)
            draw = torch.rand(weight.shape, generator=generator(self._seed, number))
            kept = top_among(draw.to(weight.device), everywhere, counts[name])
            # Zero weights, too, need a direction in which to grow.
            masks.install(layer, SignedMask(torch.where(weight < 0, -1.0, 1.0).to(weight), kept))
            weight.abs_().clamp_(min=_AWAKE).mul_(kept)

    def trainable(self, model: nn.Module) -> list[dict]:
        return [parameter_group(list(model.parameters()), decay=True)]

    @torch.no_grad()
    def step_ended(self, model: nn.Module, step: int) -> None:
        parts = list(masks.of_kind(model, SignedMask).values())
        random, slept = self._random(step), 0
        for layer, mask in parts:
            theta, before = layer.parameter, int(mask.kept.sum())
            theta[mask.kept] += self.noise * torch.randn(before, generator=random).to(theta)
            mask.kept = mask.kept & (theta > 0)
            slept += before - int(mask.kept.sum())
        sizes = torch.tensor([float(layer.size) for layer, _ in parts])
        dormant = torch.tensor([int((~mask.kept).sum()) for _, mask in parts])
        for (layer, mask), count in zip(parts, _drawn(slept, sizes, dormant, random)):
            layer.parameter.mul_(mask.kept)
            if not count:
                continue
            draw = torch.rand(layer.shape, generator=random).to(layer.parameter.device)
            woken = top_among(draw, ~mask.kept, count)
            layer.parameter.add_(woken, alpha=_AWAKE)
            mask.kept = mask.kept | woken

    def _random(self, step: int) -> torch.Generator:
        return generator(self._seed, step, 0)

    @torch.no_grad()
    def settle(self, model: nn.Module) -> None:
        parts = masks.of_kind(model, SignedMask)
        wanted = {name: float(mask.kept.float().mean()) for name, (_, mask) in parts.items()}
        counts = self._budget.counts(model, {n: max(d, 1e-12) for n, d in wanted.items()})
        for name, (layer, mask) in parts.items():
            theta = layer.parameter.where(mask.kept, torch.zeros(()).to(layer.parameter))
            kept = top_among(theta, torch.ones_like(mask.kept), counts[name])
            layer.parameter.copy_(layer.weight)
            masks.fix(layer, kept)

    def state_dict(self) -> dict:
        return {"seed": self._seed}

    def load_state_dict(self, state: dict) -> None:
        self._seed = int(state["seed"])


def _drawn(count: int, sizes: Tensor, room: Tensor, random: torch.Generator) -> list[int]:
    """`count` draws of a layer in proportion to `sizes`, none above its `room`."""
    drawn = torch.zeros_like(room)
    while (left := count - int(drawn.sum())) > 0:
        open_sizes = sizes * (drawn < room)
        picks = torch.multinomial(open_sizes, left, replacement=True, generator=random)
        drawn = (drawn + picks.bincount(minlength=len(room))).minimum(room)
    return drawn.tolist()
