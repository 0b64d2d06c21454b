# SPDX-License-Identifier: Apache-2.0
"""The exponential average of a network over its optimiser steps."""

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

Tensors = tuple[Tensor, ...] | list[Tensor]

SETTLING = 16
"""Batches of an epoch from which the average takes its batch-norm statistics."""


class Average(AveragedModel):
    """A copy of a network, `module`, whose weights are averages of those after each step so far.

    After t steps a weight is sum_s decay^(t - s) w_s / sum_s decay^(t - s), decay in [0, 1): the
    plain mean at first and, once t exceeds some 1 / (1 - decay), the usual exponential one. Weights
    from before the first step do not count, so a short stage does not drag its start along.

    Buffers are those of the last step, until `settle` gives batch norm the statistics of the
    averaged network: at a high learning rate the mean of the steps' own is far from them.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model, multi_avg_fn=self._move)
        self.decay = decay

    def settle(
        self,
        batches: Iterable[tuple[Tensor, Tensor]],
        forward: Callable[[nn.Module, Tensor, Tensor], object],
    ) -> None:
        """Take batch-norm statistics from training passes of the average itself.

        As for any average of weights (Izmailov et al. 2018, sec. 3.2); `forward` is called as
        (module, x, y) in training mode.
        """
        self.module.train()
        norms = [m for m in self.module.modules() if isinstance(m, _BatchNorm)]
        norms = [m for m in norms if m.training and m.track_running_stats]
        if not norms:
            return
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            # The first batch takes the place of what was there, which its attack still needs.
            cast(Tensor, norm.num_batches_tracked).zero_()
            norm.momentum = None  # the mean of all batches
        try:
            for x, y in batches:
                forward(self.module, x, y)
        finally:
            for norm, momentum in zip(norms, momenta):
                norm.momentum = momentum

    @torch.no_grad()
    def _move(self, averages: Tensors, values: Tensors, _count: Tensor | int) -> None:
        """Move tensors of one type towards the network's own."""
        # The copy of the count in hand lies on the accelerator, where reading it would wait.
        steps = int(self.n_averaged) + 1
        share = (1.0 - self.decay) / (1.0 - self.decay**steps)
        # All at once, as torch's own averages do; there is no public name for it.
        torch._foreach_lerp_(averages, values, share)  # pyright: ignore[reportPrivateImportUsage]
