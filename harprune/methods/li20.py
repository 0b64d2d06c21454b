# SPDX-License-Identifier: Apache-2.0
"""Boosting tickets (Li, Wang, Jia, Lu, Zhang, Duan, Huang & Zhang 2020, arXiv 2003.05733).

Winning tickets of adversarial training show early and under a cheap attack. So: train the dense
network for a short while (the paper: with FGSM), keep the largest |w| / mean |w| of the whole
network, put every weight back to where it began, and train what is kept with PGD in finetuning.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from harprune.methods.base import Budget, Method, parameter_group, settle_ranking


@dataclass(eq=False)
class Li20(Method):
    """Global magnitude, each layer in units of its own mean, with rewinding.

    Attributes:
        rewind: after pruning, give the network back the weights with which the stage began.
    """

    uses_allocation = False
    rewind: bool = True
    _start: dict[str, Tensor] = field(init=False, repr=False)

    def attach(self, model: nn.Module, budget: Budget) -> None:
        self._budget = budget
        self._start = {name: value.clone() for name, value in model.state_dict().items()}

    def trainable(self, model: nn.Module) -> list[dict]:
        return [parameter_group(list(model.parameters()), decay=True)]

    @torch.no_grad()
    def settle(self, model: nn.Module) -> None:
        grain, scores = self._budget.granularity, {}
        for name, layer in self._budget.layers(model).items():
            magnitude = layer.parameter.abs()
            mean = grain.total(layer, magnitude) / grain.unit_size(layer)
            scores[name] = mean / magnitude.mean().clamp_min(1e-30)
        if self.rewind:
            model.load_state_dict(self._start)
        settle_ranking(model, self._budget, scores)
