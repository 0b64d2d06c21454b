# SPDX-License-Identifier: Apache-2.0
"""SNIP (Lee, Ajanthan & Torr, ICLR 2019): what would the loss say if this weight were missing?

A factor c = 1 on every unit; the sensitivity of eq. 6 is |dL/dc| = |g . w| summed over the unit,
and the highest of the whole network stay. Shown adversarial images, it asks the robust loss.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harprune.methods.base import Ranked, Sample, differentiable, gradients


@dataclass(eq=False)
class SNIP(Ranked):
    """Connection sensitivity at the weights as they are.

    Attributes:
        batches: batches over which the gradient is averaged; the paper takes one.
        adversarial: score on attacked images.
    """

    batches: int = 1
    adversarial: bool = False

    @property
    def sample(self) -> Sample:
        return Sample(self.batches, attacked=self.adversarial)

    def __post_init__(self):
        _ = self.sample  # refuses a wrong number of batches

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
