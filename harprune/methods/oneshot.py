# SPDX-License-Identifier: Apache-2.0
"""One-shot pruning: rank once, without training; the floor under every claim.

Magnitude under a given allocation (global, LAMP, ERK, ... as of the budget), or random.
"""

from abc import abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from harprune.methods.base import Budget, Method, given_densities, install_scores, settle_scores
from harprune.sparsity.layers import Layer


class OneShot(Method):
    """Scores are computed once in `attach`; nothing is trained."""

    _budget: Budget

    @abstractmethod
    def score(self, layer: Layer, magnitude: Tensor) -> Tensor:
        """Scores in the shape of `magnitude`."""

    def attach(self, model: nn.Module, budget: Budget) -> None:
        self._budget = budget
        densities = given_densities(model, budget)
        install_scores(budget.layers(model), densities, budget.granularity, self.score)

    def settle(self, model: nn.Module) -> None:
        settle_scores(model, self._budget)


@dataclass(eq=False)
class Magnitude(OneShot):
    """Keep the largest weights of each layer."""

    _budget: Budget = field(init=False, repr=False)

    def score(self, layer: Layer, magnitude: Tensor) -> Tensor:
        return magnitude


@dataclass(eq=False)
class Random(OneShot):
    """Keep weights drawn at random, from torch's global generator."""

    _budget: Budget = field(init=False, repr=False)

    def score(self, layer: Layer, magnitude: Tensor) -> Tensor:
        return torch.rand(magnitude.shape).to(magnitude)
