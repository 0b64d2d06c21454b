# SPDX-License-Identifier: Apache-2.0
"""Robust Bird (Chen et al., ICLR 2022): the ticket is drawn as soon as it stops changing.

Early-bird tickets (You et al., ICLR 2020) for adversarial training: the dense network trains
cheaply (prune.objective.name = "natural") until its global-magnitude mask at the end of an epoch
differs by less than `tolerance` from each of those of the epochs before, `window` in all; it is
pruned there, and the adversarial training is that of finetuning. The distance is the paper's, the
share of *all* units in which two masks differ: at density d it is at most 2 d, so below a density
of half the tolerance the first full window ends the search.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from harprune.methods.base import Budget, Method, best_of_all, parameter_group, settle_ranking
from harprune.sparsity import masks
from harprune.sparsity.masks import OpenMask


class _Recent(OpenMask):
    """The masks of the last epochs, (window, *units)."""

    recent: Tensor


@dataclass(eq=False)
class RobustBird(Method):
    """Global magnitude at the epoch where the mask has settled.

    Attributes:
        tolerance: what the distance of the newest mask to each other one of the window stays below.
        window: epochs compared.
    """

    uses_allocation = False
    tolerance: float = 0.08
    window: int = 5
    _seen: int = field(init=False, repr=False, default=0)

    def __post_init__(self):
        if not self.tolerance > 0.0:
            raise ValueError(f"tolerance {self.tolerance:g} must be above 0")
        if self.window < 2:
            raise ValueError(f"window = {self.window} must be at least 2, to compare masks")

    def beyond(self, epochs: int, steps: int) -> dict[str, str]:
        if self.window <= epochs:
            return {}
        return {
            "window": f"exceeds {epochs} epochs; the ticket is drawn after them, settled or not"
        }

    def attach(self, model: nn.Module, budget: Budget) -> None:
        self._budget = budget
        for layer in budget.layers(model).values():
            shape = (self.window, *budget.granularity.score_shape(layer))
            recent = torch.zeros(shape, dtype=torch.bool, device=layer.parameter.device)
            masks.install(layer, _Recent(recent=recent))

    def trainable(self, model: nn.Module) -> list[dict]:
        return [parameter_group(list(model.parameters()), decay=True)]

    @torch.no_grad()
    def _scores(self, model: nn.Module) -> dict[str, Tensor]:
        grain = self._budget.granularity
        return {
            name: grain.magnitude(layer, layer.parameter).abs()
            for name, layer in self._budget.layers(model).items()
        }

    def epoch_ended(self, model: nn.Module, epoch: int) -> None:
        best = best_of_all(model, self._budget, self._scores(model))
        for name, (_, mask) in masks.of_kind(model, _Recent).items():
            mask.recent[self._seen % self.window] = best[name]
        self._seen += 1

    def distance(self, model: nn.Module) -> float:
        """The largest share of units in which the newest mask differs from one of the window."""
        recent = [mask.recent.flatten(1) for _, mask in masks.of_kind(model, _Recent).values()]
        every = torch.cat(recent, dim=1)
        newest = every[(self._seen - 1) % self.window]
        return max(float((mask ^ newest).float().mean()) for mask in every)

    def done(self, model: nn.Module) -> bool:
        return self._seen >= self.window and self.distance(model) < self.tolerance

    def budget_met(self, model: nn.Module) -> bool:
        return False  # so that the last epoch is taken, not the most accurate

    def settle(self, model: nn.Module) -> None:
        settle_ranking(model, self._budget, self._scores(model))

    def state_dict(self) -> dict:
        return {"seen": self._seen}

    def load_state_dict(self, state: dict) -> None:
        self._seen = int(state["seen"])
