# SPDX-License-Identifier: Apache-2.0
"""Random crops and flips of whole batches, the usual augmentation of CIFAR.

The random numbers are drawn apart from their use: `draw` for the global batch, `apply` to the rows
a process holds, so that one process and many see the same images.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

PHOTOGRAPHS = ("cifar10", "cifar100", "tiny_imagenet", "folder")


@dataclass(frozen=True)
class CropFlip:
    """Shift each image by up to `padding` pixels, black coming in, and flip half of them."""

    padding: int

    def draw(self, count: int, generator: Generator) -> Tensor:
        """(count, 3): row and column offset in 0..2 padding; 1 where the image is flipped."""
        offsets = torch.randint(2 * self.padding + 1, (count, 2), generator=generator)
        flips = torch.randint(2, (count, 1), generator=generator)
        return torch.cat([offsets, flips], dim=1)

    def apply(self, x: Tensor, draws: Tensor) -> Tensor:
        """(N, C, H, W), uint8 or float, and the N rows of `draws` -> the same, cut and flipped."""
        height, width = x.shape[-2:]
        draws = draws.to(x.device, non_blocking=True)
        padded = F.pad(x, (self.padding,) * 4)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        rows = torch.arange(len(x), device=x.device)
        cropped = windows[rows, :, draws[:, 0], draws[:, 1]]
        return torch.where(draws[:, 2].bool()[:, None, None, None], cropped.flip(3), cropped)


def augmentation(name: str, dataset: str, image_size: int) -> CropFlip | None:
    """What a recipe's `data.augmentation` means: crops by up to an eighth of the side, or none."""
    wanted = name == "crop_flip" or (name == "default" and dataset in PHOTOGRAPHS)
    return CropFlip(max(1, image_size // 8)) if wanted else None
