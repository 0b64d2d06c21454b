# SPDX-License-Identifier: Apache-2.0
"""SNIP (Lee, Ajanthan & Torr, ICLR 2019): what would the loss say if this weight were missing?

A factor c = 1 on every unit; the sensitivity of eq. 6 is |dL/dc| = |g . w| summed over the unit,
and the highest of the whole network stay. Shown adversarial images, it asks the robust loss.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harprune.methods.base import (
    Budget,
    Method,
    Sample,
    differentiable,
    gradients,
    settle_ranking,
)


@dataclass(eq=False)
class SNIP(Method):
    """Connection sensitivity at the weights as they are.

    Attributes:
        batches: batches over which the gradient is averaged; the paper takes one.
        adversarial: score on attacked images.
    """

    uses_allocation = False
    batches: int = 1
    adversarial: bool = False
    _budget: Budget = field(init=False, repr=False)
    _scores: dict[str, Tensor] = field(init=False, repr=False)

    @property
    def sample(self) -> Sample:
        return Sample(self.batches, attacked=self.adversarial)

    def __post_init__(self):
        _ = self.sample  # refuses a wrong number of batches

    def attach(self, model: nn.Module, budget: Budget) -> None:
        self._budget = budget

    def observe(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        layers = self._budget.layers(model)
        sums = [torch.zeros_like(layer.parameter) for layer in layers.values()]
        with differentiable(layers):
            for x, y in batches:
                loss = F.cross_entropy(model(x), y)
                for total, gradient in zip(sums, gradients(loss, layers)):
                    total += gradient
        grain = self._budget.granularity
        self._scores = {
            name: grain.total(layer, total * layer.parameter.detach()).abs()
            for (name, layer), total in zip(layers.items(), sums)
        }

    def settle(self, model: nn.Module) -> None:
        settle_ranking(model, self._budget, self._scores)
