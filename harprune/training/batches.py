# SPDX-License-Identifier: Apache-2.0
"""Splits handed out as batches, in an order that depends on the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Generator, Tensor

from harprune.training.augmentation import CropFlip
from harprune.training.splits import Split, mixed_seed, to_float

# Keeps the stream of the order apart from that of the augmentation.
ORDER, AUGMENT = 0, 1


class Batches:
    """The full batches of a split, epoch by epoch: x float32 in [0, 1], y int64, on `device`.

    The order depends on (seed, epoch) alone, the augmentation on (seed, epoch, batch): a resume at
    any batch is exact. Of `world` processes each takes its consecutive rows of every batch, so that
    the ranks' rows, one after another, are the batch of a single process. Sets in memory move to
    `device` once; image files are decoded one batch ahead.

    Args:
        batch_size: images of a batch over all processes, a multiple of `world`.
        augment: random numbers and their use, see `augmentation`; None leaves images as they are.

    Raises:
        ValueError: no batch would come out, or none that the processes can share.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        seed: int,
        augment: CropFlip | None = None,
        device: torch.device | str | None = None,
        rank: int = 0,
        world: int = 1,
    ):
        self.device = torch.device(device or "cpu")
        images = split.images
        self.images = images.to(self.device) if isinstance(images, Tensor) else images
        self.labels = split.labels.to(self.device)
        self.batch_size = batch_size
        self.seed = seed
        self.augment = augment
        self.rank = rank
        self.world = world
        self._check()

    def _check(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank {self.rank} must lie in 0..{self.world - 1}")
        if self.batch_size < 1 or self.batch_size % self.world:
            raise ValueError(
                f"batch_size {self.batch_size} must be a positive multiple of the {self.world} "
                "processes"
            )
        if len(self) == 0:
            raise ValueError(
                f"{len(self.labels)} images give no batch of {self.batch_size}; use a smaller "
                "batch_size"
            )

    def __len__(self) -> int:
        """Batches of one epoch."""
        return len(self.labels) // self.batch_size

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches (x, y) of epoch `number` from batch `start` on."""
        if not 0 <= start <= len(self):
            raise ValueError(f"batch {start} must lie in 0..{len(self)}")
        cut = partial(self._batch, number, self._order(number))
        if isinstance(self.images, Tensor):
            return map(cut, range(start, len(self)))
        return _one_ahead(cut, range(start, len(self)))

    def _order(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.labels), generator=self._generator(ORDER, epoch))

    def _generator(self, *stream: int) -> Generator:
        return torch.Generator().manual_seed(mixed_seed(self.seed, *stream))

    def _batch(self, epoch: int, order: Tensor, number: int) -> tuple[Tensor, Tensor]:
        rows = order[number * self.batch_size : (number + 1) * self.batch_size]
        first, last = (len(rows) * rank // self.world for rank in (self.rank, self.rank + 1))
        mine = rows[first:last]
        # Small copies from ordinary memory, for which an accelerator's work is not waited for.
        there = mine.to(self.device, non_blocking=True)
        if isinstance(self.images, Tensor):
            x = self.images[there]
        else:
            x = self.images[mine].to(self.device, non_blocking=True)
        if self.augment is not None:
            # Drawn for all processes' rows, so that each gets the numbers it would have had alone.
            draws = self.augment.draw(len(rows), self._generator(AUGMENT, epoch, number))
            x = self.augment.apply(x, draws[first:last])
        return to_float(x), self.labels[there]


def _one_ahead(
    function: Callable[[int], tuple[Tensor, Tensor]], arguments: range
) -> Iterator[tuple[Tensor, Tensor]]:
    """`map(function, arguments)` that computes the next value while the last one is in use."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for argument in arguments:
            coming = pool.submit(function, argument)
            if waiting is not None:
                yield waiting.result()
            waiting = coming
        if waiting is not None:
            yield waiting.result()
