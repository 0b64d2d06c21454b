# SPDX-License-Identifier: Apache-2.0
"""Images with their labels, and how they are divided into training, validation and test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harprune.arguments import require_whole
from harprune.training.folders import ImageFiles


@dataclass(frozen=True, repr=False)
class Split:
    """Images with their labels.

    Attributes:
        images: (N, C, H, W), uint8, or float32 in [0, 1]; or `ImageFiles`, decoded when asked for.
        labels: int64 (N,).
    """

    images: Tensor | ImageFiles
    labels: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.images, Tensor | ImageFiles) or not isinstance(self.labels, Tensor):
            raise ValueError(
                f"images and labels are a {type(self.images).__name__} and a "
                f"{type(self.labels).__name__}; they must be tensors: give torch.as_tensor of each"
            )
        if isinstance(self.images, Tensor) and self.images.dtype not in (
            torch.uint8,
            torch.float32,
        ):
            raise ValueError(
                f"images are {self.images.dtype}; they must be uint8, or float32 in [0, 1]"
            )
        if len(self.images.shape) != 4:
            raise ValueError(
                f"images have shape {tuple(self.images.shape)}; they must be (N, C, H, W)"
            )
        for tensor in (self.images, self.labels):
            if isinstance(tensor, Tensor) and (tensor.is_cuda or tensor.requires_grad):
                raise ValueError(
                    "images and labels must lie in main memory, without gradients; give "
                    "images.detach().cpu(), or use from_arrays"
                )
        if self.labels.dtype != torch.int64 or self.labels.shape != (len(self.images),):
            raise ValueError(
                f"labels are {self.labels.dtype} {tuple(self.labels.shape)}; expected int64 "
                f"({len(self.images)},)"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Split({len(self)} images of shape {self.shape})"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def subset(self, indices: Tensor) -> Split:
        """The images at `indices`, in that order."""
        images = self.images
        chosen = images.subset(indices) if isinstance(images, ImageFiles) else images[indices]
        return Split(chosen, self.labels[indices])


@dataclass(frozen=True)
class Dataset:
    """A training and a test split of the same classes; label k stands for `classes[k]`."""

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        for part, split in (("train", self.train), ("test", self.test)):
            if not isinstance(split, Split):
                raise ValueError(
                    f"{part} is a {type(split).__name__}, not a harprune.Split; give one, as "
                    "harprune.training.data.from_arrays makes it of arrays"
                )
        if not isinstance(self.classes, Sequence):
            raise ValueError(f"classes = {self.classes!r} must be names, one for each label")
        if self.train.shape != self.test.shape:
            raise ValueError(
                f"{self.name}: training images are {self.train.shape}, test images "
                f"{self.test.shape}"
            )
        for part, split in (("train", self.train), ("test", self.test)):
            require_labels(split.labels, self.num_classes, f"{self.name} {part}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return self.train.shape

    @property
    def num_classes(self) -> int:
        return len(self.classes)


Images = Split | tuple[Any, Any] | torch.utils.data.Dataset
"""What `as_split` takes."""


def require_labels(labels: Tensor, num_classes: int | None, what: str) -> None:
    """Raises ValueError where there are no labels, or where they leave 0..num_classes - 1."""
    if len(labels) == 0:
        raise ValueError(f"{what}: there are no images")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        top = "K - 1" if num_classes is None else num_classes - 1
        raise ValueError(f"{what}: labels run from {low} to {high}; they must lie in 0..{top}")


def to_float(images: Tensor) -> Tensor:
    """uint8 -> float32 in [0, 1]; float32 stays as it is."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


@dataclass(frozen=True)
class Floats:
    """Images as float batches in [0, 1], converted when they are asked for."""

    images: Tensor | ImageFiles

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor) -> Tensor:
        return to_float(self.images[index])


def from_arrays(images: Any, labels: Any, *, num_classes: int | None = None) -> Split:
    """A split of NumPy arrays or tensors.

    Args:
        images: (N, C, H, W) or (N, H, W), uint8 or float in [0, 1]; floats are kept as float32.
        labels: (N,) integers from 0.
        num_classes: if given, labels must lie below it.

    Raises:
        ValueError: a type, shape or range that does not fit.
    """
    pixels = _tensor(images)
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    if pixels.ndim != 4:
        raise ValueError(f"images have shape {tuple(pixels.shape)}; they must be (N, C, H, W)")
    _, first, middle, last = pixels.shape
    if last in (1, 3) and first not in (1, 3) and middle > last:
        raise ValueError(
            f"images have shape {tuple(pixels.shape)}, channels last, as it seems; give "
            "images.transpose(0, 3, 1, 2), or harprune.Split(images, labels) if they are not"
        )
    split = Split(_pixels(pixels), _integers(_tensor(labels)))
    require_labels(split.labels, num_classes, "labels")
    return split


def as_split(images: Images) -> Split:
    """Images with their labels, in whichever form they are given.

    Args:
        images: a `Split`; a pair (images, labels) as `from_arrays` takes it; or a torch `Dataset`
            of pairs (image (C, H, W), label), which is read into memory, once.

    Raises:
        ValueError: none of them, or what `from_arrays` refuses; a torch `Dataset` that augments.
    """
    if isinstance(images, Split):
        return images
    if isinstance(images, torch.utils.data.Dataset):
        return from_arrays(*_read(images))
    if not isinstance(images, tuple | list) or len(images) != 2:
        raise ValueError(
            f"images are a {type(images).__name__}; give a pair (images, labels) of arrays, a "
            "torch Dataset, or a harprune.Split"
        )
    return from_arrays(*images)


_AGAIN = 16
"""As many images are read twice, to see whether a torch `Dataset` augments them."""


def _read(items: Any) -> tuple[Tensor, Tensor]:
    """All images and labels of a torch `Dataset`."""
    try:
        count = len(items)
    except TypeError:
        raise ValueError(f"the {type(items).__name__} has no length; give one that has") from None
    if count == 0:
        raise ValueError(f"the {type(items).__name__} holds no images")
    read = [_item(items, number) for number in range(count)]
    for number, (image, _) in enumerate(read):
        if image.shape != read[0][0].shape:
            raise ValueError(
                f"image {number} has shape {tuple(image.shape)}, the first "
                f"{tuple(read[0][0].shape)}; bring them to one size"
            )
        if number < _AGAIN and not torch.equal(image, _item(items, number)[0]):
            raise ValueError(
                f"image {number} is another when it is read again; leave random transforms out: "
                "harprune augments by itself (augmentation = 'crop_flip')"
            )
    images, labels = zip(*read)
    return torch.stack(images), torch.stack(labels)


def _item(items: Any, number: int) -> tuple[Tensor, Tensor]:
    try:
        image, label = items[number]
    except (TypeError, ValueError):
        raise ValueError(f"item {number} is no pair (image, label)") from None
    if not isinstance(image, Tensor | np.ndarray):
        raise ValueError(
            f"image {number} is a {type(image).__name__}; make it a tensor (C, H, W), uint8 or "
            "float in [0, 1], as torchvision's ToTensor does"
        )
    return _tensor(image), _tensor(label)


def _tensor(values: Any) -> Tensor:
    """A tensor in main memory; arrays are copied, for they may be read-only or reversed."""
    if isinstance(values, Tensor):
        return values.detach().cpu()
    try:
        array = np.array(values)
    except ValueError:
        raise ValueError("values are lists of different lengths; give one array") from None
    try:
        return torch.tensor(array)
    except TypeError:
        raise ValueError(
            f"values of type {array.dtype} are no numbers; labels are integers from 0, pixels "
            "uint8 or float in [0, 1]"
        ) from None


def _pixels(images: Tensor) -> Tensor:
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}; they must be uint8, or float in [0, 1]")
    images = images.float()
    # Written so that NaN fails it too.
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(
            f"images run from {images.min():.4g} to {images.max():.4g}; floats must lie in [0, 1]"
        )
    return images


def _integers(labels: Tensor) -> Tensor:
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.ndim != 1:
        raise ValueError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}; they must be integers "
            "of shape (N,)"
        )
    return labels.long()


def split_validation(split: Split, size: int | float, seed: int) -> tuple[Split, Split]:
    """(train, validation): disjoint, each class in its share to within one image.

    The same seed gives the same parts.

    Args:
        size: how many images (int) or which fraction (float in (0, 1)) go to validation.

    Raises:
        ValueError: a size that leaves either part empty.
    """
    if not isinstance(split, Split):
        raise ValueError(f"split is a {type(split).__name__}, not a harprune.Split; give one")
    if isinstance(size, float):
        count = round(size * len(split)) if 0 < size < 1 else 0
    else:
        require_whole("size", size)
        count = size
    if not 0 < count < len(split):
        raise ValueError(
            f"validation size {size} of {len(split)} images leaves a part empty; give a count "
            "or a fraction in (0, 1)"
        )
    chosen = _stratified(split.labels, count, seed)
    return split.subset((~chosen).nonzero().flatten()), split.subset(chosen.nonzero().flatten())


def _stratified(labels: Tensor, count: int, seed: int) -> Tensor:
    """A mask of `count` images in which each class has its share, largest remainders first."""
    classes, sizes = labels.unique(return_counts=True)
    shares = sizes.double() * count / len(labels)
    quotas = shares.floor().long()
    extra = (shares - quotas).argsort(descending=True, stable=True)[: count - int(quotas.sum())]
    quotas[extra] += 1
    generator = torch.Generator().manual_seed(mixed_seed(seed))
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label, quota in zip(classes.tolist(), quotas.tolist(), strict=True):
        members = (labels == label).nonzero().flatten()
        mask[members[torch.randperm(len(members), generator=generator)[:quota]]] = True
    return mask


def mixed_seed(*entropy: int) -> int:
    """One 64-bit seed out of several integers: near seeds and epochs give unrelated streams."""
    for part in entropy:
        require_whole("seed", part, 0)
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]) >> 1
