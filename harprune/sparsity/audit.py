# SPDX-License-Identifier: Apache-2.0
"""Exact counts of kept weights, read from the final tensors, with their denominator named."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import floor

import torch
from torch import Tensor, nn

from harprune.sparsity.layers import Layer


@dataclass(frozen=True)
class LayerCount:
    """Non-zero weights of one layer."""

    shape: tuple[int, ...]
    total: int
    kept: int
    outputs: int
    price: int = 1

    @property
    def density(self) -> float:
        return self.kept / self.total


@dataclass(frozen=True)
class Audit:
    """How many weights a network really keeps.

    The denominator is the number of prunable weights: biases and batch norm are neither pruned
    nor counted. `budget` is what `spent`, the kept weights times their layers' prices, may come
    to: floor(density * dense price). With parameters as the cost every price is 1.
    """

    layers: Mapping[str, LayerCount]
    budget: int
    denominator: str = "prunable weights"

    def __str__(self) -> str:
        share = f"{100 * self.density:.3f} %"
        return f"{self.kept:,} of {self.total:,} {self.denominator} kept ({share})"

    @property
    def total(self) -> int:
        return sum(layer.total for layer in self.layers.values())

    @property
    def kept(self) -> int:
        return sum(layer.kept for layer in self.layers.values())

    @property
    def density(self) -> float:
        return self.kept / self.total

    @property
    def spent(self) -> int:
        return sum(layer.kept * layer.price for layer in self.layers.values())

    @property
    def thin(self) -> list[str]:
        """Layers that keep fewer weights than they have outputs: some of these are constants."""
        return [name for name, layer in self.layers.items() if layer.kept < layer.outputs]

    def require_within_budget(self) -> "Audit":
        """Raises ValueError where more is kept than the budget allows or a layer is empty."""
        if self.spent > self.budget:
            raise ValueError(
                f"{self.kept} of {self.total} weights are kept at a cost of {self.spent}, above "
                f"the budget of {self.budget}; the method must leave masks within it"
            )
        empty = [name for name, layer in self.layers.items() if layer.kept == 0]
        if empty:
            raise ValueError(
                f"layer collapse: {empty[0]} keeps no weight (such layers: {len(empty)}); "
                "raise `budget.floor`, raise the density or choose another allocation"
            )
        return self

    def as_dict(self) -> dict:
        """The audit as plain values, for JSON."""
        return {
            "denominator": self.denominator,
            "total": self.total,
            "kept": self.kept,
            "spent": self.spent,
            "budget": self.budget,
            "density": self.density,
            "layers": {
                name: {"shape": list(c.shape), "total": c.total, "kept": c.kept}
                for name, c in self.layers.items()
            },
        }


def connected(model: nn.Module, x: Tensor) -> bool:
    """Whether the logits still depend on the images `x`, in the mode the model is in."""
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = model(x)
        # A random mixture: the sum of logits may be constant where each of them is not.
        mixture = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
        (gradient,) = torch.autograd.grad((logits * mixture.to(logits)).sum(), x)
    return bool(gradient.any())


def budget_of(density: float, total: int) -> int:
    """The most weights that may be kept: floor(density * total), float error aside."""
    return floor(density * total + 1e-6)


def audit(
    layers: Mapping[str, Layer], density: float = 1.0, prices: Mapping[str, int] | None = None
) -> Audit:
    """Count the non-zero weights in force in `layers`; a shared weight counts once."""
    prices = prices or dict.fromkeys(layers, 1)
    counts = {
        name: LayerCount(
            tuple(layer.shape),
            layer.size,
            int(torch.count_nonzero(layer.weight)),
            layer.outputs,
            prices[name],
        )
        for name, layer in layers.items()
    }
    return Audit(counts, budget_of(density, sum(c.total * c.price for c in counts.values())))
