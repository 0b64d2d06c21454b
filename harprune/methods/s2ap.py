# SPDX-License-Identifier: Apache-2.0
"""S2AP (Piras et al. 2025, arXiv 2510.18381): scores at which the robust loss is flat.

    min over s   max over z with |z_l| <= radius |s_l| in each layer l   of   L_robust(w * M(s + z))

A plug-in for every method that trains scores. One normalised ascent step finds z, as in sharpness-
aware minimisation; the gradient of the step is the one at s + z, on the same adversarial images,
and the optimiser applies it at s. It costs one more pass forward and backward.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from torch import nn

from harprune.ascent import Ascent, uphill
from harprune.sparsity import masks
from harprune.sparsity.masks import LearnedMask


@dataclass(frozen=True)
class S2AP(Ascent):
    """Where the scores' gradient is taken; the paper warms up for 5 epochs of 20."""

    radius: float = 0.01
    warm_up: float = 0.25

    def nearby(self, model: nn.Module, progress: float) -> AbstractContextManager | None:
        """A context with the scores at s + z, from their present gradients; None in the warm-up."""
        return None if progress < self.warm_up else self._perturbed(model)

    @contextmanager
    def _perturbed(self, model: nn.Module) -> Iterator[None]:
        learned = [m for _, m in masks.of_kind(model, LearnedMask).values()]
        scores = [m.scores for m in learned if m.scores.grad is not None]
        if not scores:
            raise ValueError("s2ap perturbs scores, and no mask of this method trains any")
        with uphill(scores, self.radius):
            yield
