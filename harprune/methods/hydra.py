# SPDX-License-Identifier: Apache-2.0
"""HYDRA (Sehwag et al., NeurIPS 2020): learn which connections stay, at given densities."""

from dataclasses import dataclass, field

from torch import nn

from harprune.methods.base import (
    Budget,
    Method,
    batch_norm_parameters,
    given_densities,
    install_scores,
    parameter_group,
    scaled_magnitude,
    score_group,
    settle_scores,
)
from harprune.sparsity import masks


@dataclass(eq=False)
class HYDRA(Method):
    """Straight-through scores under the robust loss; the allocation sets each layer's density.

    Attributes:
        train_batch_norm: also train scale and shift of batch norm (parity).
        decay_scores: weight decay on the scores (parity).
    """

    train_batch_norm: bool = False
    decay_scores: bool = False
    _budget: Budget = field(init=False, repr=False)

    @property
    def trains_scores(self) -> bool:
        return True

    def attach(self, model: nn.Module, budget: Budget) -> None:
        self._budget = budget
        install_scores(
            budget.layers(model),
            given_densities(model, budget),
            budget.granularity,
            scaled_magnitude,
        )

    def trainable(self, model: nn.Module) -> list[dict]:
        groups = [score_group(model, decay=self.decay_scores)]
        if self.train_batch_norm:
            groups.append(parameter_group(batch_norm_parameters(model), decay=True))
        return groups

    def metrics(self, model: nn.Module) -> dict:
        densities = masks.densities(model)
        return {"densities": {name: float(value) for name, value in densities.items()}}

    def settle(self, model: nn.Module) -> None:
        settle_scores(model, self._budget)
