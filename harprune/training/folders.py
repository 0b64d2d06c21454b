# SPDX-License-Identifier: Apache-2.0
"""Images in folders, one folder a class: listed, and decoded to one size when they are needed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".webp", ".tif", ".tiff"))
TINY_IMAGENET_ANNOTATIONS = "val_annotations.txt"
DECODERS = min(16, os.cpu_count() or 1)
LARGEST = 1024
"""Most pixels along a side: a batch of 128 such images takes 1.6 GB as floats, its network more."""


class ImageFiles:
    """Image files that are decoded when asked for: `files[indices]` is uint8 (n, 3, size, size).

    Each image's short side is scaled to `size`, then the centre is cut out; greyscale images become
    three channels. Decoding runs in a pool of threads.

    Raises:
        ValueError: a size outside 1..LARGEST.
    """

    def __init__(self, paths: Sequence[Path], size: int):
        if not 1 <= size <= LARGEST:
            raise ValueError(
                f"image_size = {size} must lie in 1..{LARGEST}; give a size to which images are "
                "scaled"
            )
        self.paths = list(paths)
        self.size = size

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        return f"ImageFiles({len(self)} files, size={self.size})"

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Decode the images at `indices` (int64, any number)."""
        return self._decode([self.paths[i] for i in indices.tolist()])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, 3, size, size), as a tensor would have."""
        return (len(self), 3, self.size, self.size)

    def subset(self, indices: Tensor) -> ImageFiles:
        """The files at `indices`, undecoded."""
        return ImageFiles([self.paths[i] for i in indices.tolist()], self.size)

    def digest(self) -> str:
        """SHA-256 of all names and of the first file's content; to read all would take long."""
        digest = hashlib.sha256("/".join(path.name for path in self.paths).encode())
        digest.update(self.paths[0].read_bytes())
        return digest.hexdigest()

    def decoded(self) -> Tensor:
        """All images as one uint8 tensor."""
        return self._decode(self.paths)

    def _decode(self, paths: Sequence[Path]) -> Tensor:
        images = np.empty((len(paths), 3, self.size, self.size), dtype=np.uint8)

        def decode_into(row: int) -> None:
            images[row] = _decode(paths[row], self.size)

        with ThreadPoolExecutor(DECODERS) as pool:
            # Consuming the results lets the first error out.
            for _ in pool.map(decode_into, range(len(paths))):
                pass
        return torch.from_numpy(images)


def _decode(path: Path, size: int) -> NDArray[np.uint8]:
    """(3, size, size): the short side scaled to `size`, the centre cut out."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            # JPEG decodes straight to a smaller size where that is still large enough.
            image.draft("RGB", (size, size))
            if image.mode in ("I", "F"):
                raise ValueError(
                    f"pixels of mode {image.mode} have no known range; save it with 8 or 16 bits"
                )
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            return _centre(image.convert("RGB"), size).transpose(2, 0, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) cannot be decoded ({error}); remove or "
            "replace it"
        ) from error


def _centre(image, size: int) -> NDArray[np.uint8]:
    from PIL import Image

    scale = size / min(image.size)
    if scale != 1:
        scaled = tuple(max(size, round(side * scale)) for side in image.size)
        image = image.resize(scaled, Image.Resampling.BILINEAR)
    left, top = ((side - size) // 2 for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def short_side(path: Path) -> int:
    """The shorter side of an image file, in pixels."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return min(image.size)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path} is not a readable image ({error}); remove or replace it"
        ) from error


def list_classes(folder: Path) -> list[str]:
    """The class folders under `folder`, sorted.

    Raises:
        ValueError: there are fewer than two.
    """
    classes = sorted(
        entry.name for entry in folder.iterdir() if entry.is_dir() and not _hidden(Path(entry.name))
    )
    if len(classes) < 2:
        raise ValueError(
            f"{folder} holds {len(classes)} class folders; it must hold at least 2, each with the "
            "images of its class"
        )
    return classes


def list_images(folder: Path, classes: Sequence[str]) -> tuple[list[Path], list[int]]:
    """The image files of each class folder, however deep, with the position of their class in
    `classes`.

    Raises:
        ValueError: a folder that is none of the classes, or a class without images.
    """
    if (folder / TINY_IMAGENET_ANNOTATIONS).is_file():
        return _list_annotated(folder, classes)
    unknown = sorted(set(list_classes(folder)) - set(classes))
    if unknown:
        raise ValueError(
            f"{folder} holds classes that were not trained on: {_some(unknown)}; remove them, or "
            "give them training images"
        )
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = _images_below(folder / name)
        paths += found
        labels += [label] * len(found)
    found = set(labels)
    absent = [name for label, name in enumerate(classes) if label not in found]
    if absent:
        raise ValueError(
            f"{folder} holds no images of: {_some(absent)}; every class needs some, as one of "
            f"{', '.join(sorted(SUFFIXES))}"
        )
    return paths, labels


def _list_annotated(folder: Path, classes: Sequence[str]) -> tuple[list[Path], list[int]]:
    """Tiny-ImageNet's own validation set: `images/` and a line of file, class, box for each."""
    positions = {name: label for label, name in enumerate(classes)}
    paths, labels = [], []
    for line in (folder / TINY_IMAGENET_ANNOTATIONS).read_text().splitlines():
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in positions:
            raise ValueError(
                f"{folder / TINY_IMAGENET_ANNOTATIONS} names class {wnid!r}, which has no "
                "training folder; get the data set anew with `harprune data tiny_imagenet`"
            )
        paths.append(folder / "images" / name)
        labels.append(positions[wnid])
    lost = [path.name for path in paths if not path.is_file()]
    if lost or not paths:
        raise ValueError(
            f"{folder} lacks {len(lost)} of the {len(paths)} annotated images ({_some(lost)}); "
            "get the data set anew with `harprune data tiny_imagenet`"
        )
    return paths, labels


def _images_below(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    images = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    return sorted(path for path in images if not _hidden(path.relative_to(folder)))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
