# SPDX-License-Identifier: Apache-2.0
"""The images that an evaluation is of: chosen once, taken a batch at a time."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChosenImages:
    """Images (n, ...) in [0, 1], and the labels (m,) of those at the positions `index` (m,).

    `images` is a tensor, or anything where `images[LongTensor]` gives floats.
    """

    images: Any
    labels: Tensor
    index: Tensor
    batch_size: int
    device: torch.device
    num_classes: int | None

    def __len__(self) -> int:
        return -(-len(self.index) // self.batch_size)

    def rows(self, batch: int) -> slice:
        """Where the images of a batch lie in `index`."""
        start = batch * self.batch_size
        return slice(start, min(start + self.batch_size, len(self.index)))

    def batch(self, batch: int) -> tuple[Tensor, Tensor]:
        """Images and labels of a batch, on the device."""
        return self._load(self.rows(batch))

    def head(self, size: int) -> tuple[Tensor, Tensor]:
        """The first images and their labels, at most `size`, on the device."""
        return self._load(slice(0, min(size, len(self.index))))

    def _load(self, rows: slice) -> tuple[Tensor, Tensor]:
        x = torch.as_tensor(self.images[self.index[rows]])
        if not x.is_floating_point() or not (x.min() >= 0 and x.max() <= 1):
            raise ValueError(
                f"images must be floats in [0, 1], got {x.dtype} from {x.min()} to {x.max()}; "
                "divide bytes by 255, and normalise inside the model"
            )
        return x.to(self.device), self.labels[rows].to(self.device)


def subset(labels: Tensor, size: int | None, seed: int) -> Tensor:
    """Sorted positions (m,) of at most `size` images: drawn by `seed`.

    All images when `size` is None. Raises ValueError for a size below 1.
    """
    if size is not None and size < 1:
        raise ValueError(f"size = {size} must be at least 1, or None for all images")
    if size is None or size >= len(labels):
        return torch.arange(len(labels))
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(len(labels), generator=generator)[:size].sort().values
