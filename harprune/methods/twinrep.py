# SPDX-License-Identifier: Apache-2.0
"""TwinRep (Li et al., AAAI 2023): adversarial training of two factors of every weight.

The network computes with w * a * m (Twin-Rep, single weights) or with A w m, A a square matrix over
the filters (Channel-Rep); both factors are trained and decayed. Since the least of
lambda / 2 (w^2 + a^2) with w a = v is lambda |v|, weight decay on the factors is an L1 penalty on
their product: the network grows sparse while the robust loss itself stays as it is. Early in
training one global threshold sets m; at the end the factors fold into a plain weight.
"""

from dataclasses import dataclass, field
from math import sqrt

import torch
from torch import Tensor, nn

from harprune.methods.base import Budget, Method, best_of_all, parameter_group
from harprune.sparsity import masks
from harprune.sparsity.granularity import Granularity
from harprune.sparsity.layers import Layer
from harprune.sparsity.masks import KeptMask


class Factors(KeptMask):
    """w -> w * a * m for single weights, A w m along the axis of the units for others."""

    def __init__(self, layer: Layer, grain: Granularity):
        device = layer.parameter.device
        super().__init__(torch.ones(grain.score_shape(layer), dtype=torch.bool, device=device))
        self.axis = None if grain is Granularity.WEIGHT else _axis_of(layer, grain)
        size = layer.shape if self.axis is None else (layer.shape[self.axis],) * 2
        self.factor = nn.Parameter(torch.empty(size).to(layer.parameter))

    def forward(self, weight: Tensor) -> Tensor:
        if self.axis is None:
            return weight * self.factor * self.kept
        axes = ([1], [self.axis])
        product = torch.tensordot(self.factor, weight, dims=axes)  # pyright: ignore[reportArgumentType] - its stub has no pairs
        return product.movedim(0, self.axis).contiguous() * self.kept


@dataclass(eq=False)
class TwinRep(Method):
    """Both factors of every weight are trained, from scratch as in the paper.

    Attributes:
        prune_at: share of the training after which masks are set; the paper: 10 epochs of 100.
        inherit: start from the network's own function, its weights split into factors, instead of
            from a random second factor, which a trained network does not survive.
    """

    uses_allocation = False
    prune_at: float = 0.1
    inherit: bool = False
    _epochs: int = field(init=False, repr=False, default=0)
    _pruned: bool = field(init=False, repr=False, default=False)

    def __post_init__(self):
        if not 0.0 < self.prune_at <= 1.0:
            raise ValueError(f"prune_at {self.prune_at:g} must lie in (0, 1]")

    @torch.no_grad()
    def attach(self, model: nn.Module, budget: Budget) -> None:
        self._budget = budget
        for layer in budget.layers(model).values():
            factors = Factors(layer, budget.granularity)
            weight, factor = layer.parameter, factors.factor
            if not self.inherit:
                # As torch begins a weight: +-1 / sqrt(inputs).
                bound = 1.0 / sqrt(layer.fan_in if factors.axis is None else len(factor))
                factor.copy_((2.0 * torch.rand(factor.shape) - 1.0) * bound)
            elif factors.axis is None:
                factor.copy_(weight.abs().sqrt())
                weight.copy_(weight.sign() * factor)
            else:
                nn.init.eye_(factor)
            masks.install(layer, factors)

    def begin(self, epochs: int, steps: int) -> None:
        self._epochs = epochs

    def trainable(self, model: nn.Module) -> list[dict]:
        # The decay of both factors is the method.
        return [parameter_group(list(model.parameters()), decay=True)]

    def epoch_ended(self, model: nn.Module, epoch: int) -> None:
        if epoch + 1 >= self.prune_at * self._epochs and not self._pruned:
            self._prune(model)

    @torch.no_grad()
    def _prune(self, model: nn.Module) -> None:
        grain = self._budget.granularity
        scores = {
            name: grain.total(layer, layer.weight.square()).sqrt()
            for name, layer in self._budget.layers(model).items()
        }
        best = best_of_all(model, self._budget, scores)
        for name, (_, factors) in masks.of_kind(model, Factors).items():
            factors.kept = best[name]
        self._pruned = True

    def budget_met(self, model: nn.Module) -> bool:
        return self._pruned

    @torch.no_grad()
    def settle(self, model: nn.Module) -> None:
        if not self._pruned:
            self._prune(model)
        for layer, factors in masks.of_kind(model, Factors).values():
            layer.parameter.copy_(layer.weight)
            masks.fix(layer, factors.kept)

    def state_dict(self) -> dict:
        return {"pruned": self._pruned}

    def load_state_dict(self, state: dict) -> None:
        self._pruned = bool(state["pruned"])


def _axis_of(layer: Layer, grain: Granularity) -> int:
    return layer.output_axis if grain is Granularity.FILTER else 1 - layer.output_axis
