# SPDX-License-Identifier: Apache-2.0
"""Normalisation inside the model, so that attacks and budgets always live in [0, 1]."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalised(nn.Module):
    """`network((x - mean) / std)` with one mean and one standard deviation per channel.

    Both are constants of the recipe, not weights: the state dict holds `network.*` alone.

    Raises:
        ValueError: lengths differ, a value is not finite, or a standard deviation is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        if len(mean) != len(std):
            raise ValueError(
                f"mean has {len(mean)} values and std {len(std)}; give one of each per channel"
            )
        means, stds = (torch.tensor(values, dtype=torch.float32) for values in (mean, std))
        if not (means.isfinite().all() and stds.isfinite().all() and (stds > 0).all()):
            raise ValueError(f"mean {list(mean)} must be finite and std {list(std)} positive")
        self.network = network
        self.register_buffer("mean", means.reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", stds.reshape(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] -> logits (N, K)."""
        return self.network((x - self.mean) / self.std)

    def extra_repr(self) -> str:
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"
