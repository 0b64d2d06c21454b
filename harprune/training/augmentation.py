# SPDX-License-Identifier: Apache-2.0
"""Random crops and flips of whole batches.

The random numbers are drawn apart from their use: `draw` for the global batch, `apply` to the rows
a process holds, so that one process and many see the same images.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

DEFAULT_PADDING = 4


class Augmentation(Protocol):
    """What `Batches` asks of an augmentation."""

    def draw(self, count: int, generator: Generator) -> Tensor:
        """Random numbers for `count` images, one row each."""
        ...

    def apply(self, x: Tensor, draws: Tensor) -> Tensor:
        """(N, C, H, W) and the N rows of `draws` -> (N, C, H, W) of the same type."""
        ...


@dataclass(frozen=True)
class Crop:
    """Shift each image by up to `padding` pixels, black coming in; flip half of them if `flip`.

    Callable as `(x, generator)` on a batch (N, C, H, W), uint8 or float.

    Raises:
        ValueError: a negative padding.
    """

    padding: int = DEFAULT_PADDING
    flip: bool = False

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise ValueError(f"padding is {self.padding}; it must be 0 or more")

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        """The batch, augmented with fresh random numbers."""
        return self.apply(x, self.draw(len(x), generator))

    def draw(self, count: int, generator: Generator) -> Tensor:
        """(count, 3): row and column offset in 0..2 padding; 1 where the image is flipped."""
        offsets = torch.randint(2 * self.padding + 1, (count, 2), generator=generator)
        flips = torch.randint(2, (count, 1), generator=generator)
        return torch.cat([offsets, flips * self.flip], dim=1)

    def apply(self, x: Tensor, draws: Tensor) -> Tensor:
        """Cut each image out of its padded self at its offsets, then flip it where told."""
        height, width = x.shape[-2:]
        draws = draws.to(x.device, non_blocking=True)
        padded = F.pad(x, (self.padding,) * 4)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        rows = torch.arange(len(x), device=x.device)
        cropped = windows[rows, :, draws[:, 0], draws[:, 1]]
        if not self.flip:
            return cropped
        return torch.where(draws[:, 2].bool()[:, None, None, None], cropped.flip(3), cropped)


def crop_flip(padding: int = DEFAULT_PADDING) -> Crop:
    """Random crop and horizontal flip: the usual augmentation of CIFAR."""
    return Crop(padding, flip=True)


def default_augmentation(dataset: str, image_size: int) -> Augmentation | None:
    """Crop and flip for photographs; nothing for digits and clothes."""
    photographs = dataset in ("cifar10", "cifar100", "tiny_imagenet", "folder")
    return crop_flip(padding_of(image_size)) if photographs else None


def padding_of(image_size: int) -> int:
    """By how much images are padded before they are cropped: an eighth of their side."""
    return max(1, image_size // 8)
