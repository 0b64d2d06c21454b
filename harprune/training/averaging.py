# SPDX-License-Identifier: Apache-2.0
"""The exponential average of a network over its optimiser steps."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class Average(AveragedModel):
    """A copy of a network, `module`, whose weights are averages of those after each step so far.

    After t steps a weight is sum_s decay^(t - s) w_s / sum_s decay^(t - s): the plain mean at first
    and, once t exceeds some 1 / (1 - decay), the usual exponential one. Weights from before the
    first step do not count, so a short stage does not drag its start along.

    Running statistics of batch norm are averaged like weights: they are those of the networks
    averaged, not of their average, and cost no pass over the data. Buffers that are no floating
    point numbers (masks, counters) are those of the last step.

    Raises:
        ValueError: decay outside [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0.0 <= decay < 1.0:
            raise ValueError(
                f"averaging = {decay:g} must lie in [0, 1); 0.999 averages some 1,000 steps"
            )
        super().__init__(model, multi_avg_fn=self._move, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def _move(self, averages: list[Tensor], values: list[Tensor], _count: Tensor) -> None:
        """Move tensors of one type towards the network's own."""
        if not averages[0].is_floating_point():
            torch._foreach_copy_(averages, values)
            return
        # The copy of the count in hand lies on the accelerator, where reading it would wait.
        steps = int(self.n_averaged) + 1
        torch._foreach_lerp_(averages, values, (1.0 - self.decay) / (1.0 - self.decay**steps))
