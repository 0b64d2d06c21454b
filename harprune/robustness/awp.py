# SPDX-License-Identifier: Apache-2.0
"""AWP: adversarial weight perturbation (Wu, Xia & Wang, NeurIPS 2020).

    min over w   max over v with |v_l| <= radius |w_l| in each layer l   of   L_robust(w + v)

The inner maximum is one normalised step uphill on the adversarial images of the batch; the gradient
of the step is the one at w + v, and the optimiser applies it at w. It costs one more pass forward
and backward, without another attack. Batch norm and biases stay where they are.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from harprune.ascent import Ascent, uphill


@dataclass(frozen=True)
class AWP(Ascent):
    """Where the weights' gradient is taken; the paper takes 0.005 for adversarial training."""

    radius: float = 0.005
    warm_up: float = 0.0

    def nearby(self, weights: Sequence[Tensor], progress: float) -> AbstractContextManager | None:
        """A context with the weights at w + v, from their present gradients; None in the warm-up.

        Args:
            weights: one parameter for each layer, its kept values alone where it is pruned.
            progress: share of the training that is over, in [0, 1].
        """
        return None if progress < self.warm_up else uphill(weights, self.radius)
