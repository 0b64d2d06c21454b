# SPDX-License-Identifier: Apache-2.0
"""Data sets by name: found in their official files, read, checked."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from harprune.arguments import require_text
from harprune.training import download as downloads
from harprune.training.folders import ImageFiles, list_classes, list_images, short_side
from harprune.training.formats import (
    Arrays,
    read_cifar_binary,
    read_idx_pair,
    read_svhn,
)
from harprune.training.splits import (
    Dataset,
    Split,
    as_split,
    from_arrays,
    require_labels,
    split_validation,
)
from harprune.user_code import accepted, called, current_directory_importable, user_function


@dataclass(frozen=True)
class Layout:
    """One form in which a data set's files lie: where, which, and how they are read."""

    subfolders: tuple[str, ...]
    files: tuple[str, ...]
    read: Callable[[Path], tuple[Arrays, Arrays]]

    def find(self, root: Path) -> Path | None:
        """The first of the subfolders that holds all files."""
        for folder in (root / name for name in (*self.subfolders, "")):
            if all((folder / file).is_file() for file in self.files):
                return folder
        return None


@dataclass(frozen=True)
class Source:
    """A published data set: its layouts, its classes, and the form of it that is refused."""

    layouts: tuple[Layout, ...]
    classes: tuple[str, ...]
    pickled: str | None = None


def _concatenated(parts: Sequence[Arrays]) -> Arrays:
    images, labels = zip(*parts, strict=True)
    return np.concatenate(images), np.concatenate(labels)


def _cifar_layout(subfolder: str, train: tuple[str, ...], test: str, *, label_bytes: int) -> Layout:
    read = partial(read_cifar_binary, label_bytes=label_bytes)

    def read_all(folder: Path) -> tuple[Arrays, Arrays]:
        parts = [read(folder / file, records=50_000 // len(train)) for file in train]
        return _concatenated(parts), read(folder / test, records=10_000)

    return Layout((subfolder,), (*train, test), read_all)


def _idx_layout(subfolders: tuple[str, ...], suffix: str) -> Layout:
    pairs = [
        tuple(f"{part}-{what}-ubyte{suffix}" for what in ("images-idx3", "labels-idx1"))
        for part in ("train", "t10k")
    ]

    def read_all(folder: Path) -> tuple[Arrays, Arrays]:
        train, test = (read_idx_pair(folder / images, folder / labels) for images, labels in pairs)
        return train, test

    return Layout(subfolders, (*pairs[0], *pairs[1]), read_all)


def _svhn_layout() -> Layout:
    files = ("train_32x32.mat", "test_32x32.mat")

    def read_all(folder: Path) -> tuple[Arrays, Arrays]:
        train, test = (read_svhn(folder / file) for file in files)
        return train, test

    return Layout(("svhn", "SVHN"), files, read_all)


CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"
CIFAR100_CLASSES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
    camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile
    cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp
    lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
    oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
    possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
    spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
    train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
FASHION_CLASSES = "T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Ankle_boot"
DIGITS = "0 1 2 3 4 5 6 7 8 9"

MNIST_FOLDERS = ("MNIST/raw", "mnist/raw", "mnist", "MNIST")
FASHION_FOLDERS = ("FashionMNIST/raw", "fashion_mnist", "fashion-mnist", "FashionMNIST")

SOURCES: dict[str, Source] = {
    "cifar10": Source(
        (
            _cifar_layout(
                "cifar-10-batches-bin",
                tuple(f"data_batch_{k}.bin" for k in range(1, 6)),
                "test_batch.bin",
                label_bytes=1,
            ),
        ),
        tuple(CIFAR10_CLASSES.split()),
        pickled="cifar-10-batches-py",
    ),
    "cifar100": Source(
        (_cifar_layout("cifar-100-binary", ("train.bin",), "test.bin", label_bytes=2),),
        tuple(CIFAR100_CLASSES.split()),
        pickled="cifar-100-python",
    ),
    "svhn": Source((_svhn_layout(),), tuple(DIGITS.split())),
    "mnist": Source(
        (_idx_layout(MNIST_FOLDERS, ""), _idx_layout(MNIST_FOLDERS, ".gz")), tuple(DIGITS.split())
    ),
    "fashion_mnist": Source(
        (_idx_layout(FASHION_FOLDERS, ""), _idx_layout(FASHION_FOLDERS, ".gz")),
        tuple(FASHION_CLASSES.split()),
    ),
}

# Image folders of up to this many bytes, decoded, are kept in memory.
IN_MEMORY_BYTES = 2 * 2**30
DIGITS_TEST_SIZE = 360
OTHER_DATASETS = ("digits", "tiny_imagenet", "folder")


def list_datasets() -> list[str]:
    """Names that `load_dataset` knows, sorted."""
    return sorted((*SOURCES, *OTHER_DATASETS))


def data_folder() -> Path:
    """Where data sets lie when no folder is given: HARPRUNE_DATA, or the user's cache."""
    import pooch

    return Path(os.environ.get("HARPRUNE_DATA") or pooch.os_cache("harprune")).expanduser()


def load_dataset(
    name: str,
    folder: str | os.PathLike[str] | None = None,
    *,
    download: bool = False,
    progress: bool = True,
    image_size: int | None = None,
) -> Dataset:
    """A data set from its official files.

    Args:
        name: one of `list_datasets()`, or `module:function` of the user, found from the current
            directory, called with `folder=` and `image_size=` as far as its signature takes them,
            returning (train, test), each as `as_split` takes it, or a `Dataset`.
        folder: where the files lie, directly or in their usual subfolder; None is `data_folder()`.
            For `folder`, the folder that holds train/<class>/, and test/<class>/ or, where there
            is no test/, val/<class>/.
        download: get what is missing from the official address, checked by its published MD5.
        progress: show a bar while downloading.
        image_size: height and width to which the images of a folder are brought; None is the
            shorter side of the first one. Folders whose decoded images take at most 2 GiB are
            decoded once into memory, larger ones batch by batch.

    Raises:
        ValueError: an unknown name, missing files, or a file that is truncated or garbled.
    """
    require_text("name", name, "cifar10")
    if ":" in name:
        return _from_user(name, folder, image_size)
    key = name.lower().replace("-", "_")
    if key not in list_datasets():
        raise ValueError(
            f"unknown data set {name!r}; there are {', '.join(list_datasets())}, and "
            "`module:function` of your own"
        )
    if key == "digits":
        return _same_size(_load_digits(), image_size)
    root = data_folder() if folder is None else Path(folder).expanduser()
    if key == "folder":
        return _load_folder(root, key, ("test", "val"), image_size)
    if key == "tiny_imagenet":
        return _load_tiny_imagenet(root, download, progress, image_size)
    return _same_size(_load_source(key, root, download, progress), image_size)


def _same_size(dataset: Dataset, image_size: int | None) -> Dataset:
    height, width = dataset.shape[1:]
    if image_size not in (None, height):
        raise ValueError(
            f"image_size = {image_size} applies to image folders; {dataset.name} is {height} x "
            f"{width}: leave it out"
        )
    return dataset


def _load_digits() -> Dataset:
    """scikit-learn's 1797 digits, 8 x 8; 360 of them, always the same, are the test split."""
    from sklearn.datasets import load_digits
    from sklearn.utils import Bunch

    digits = cast(Bunch, load_digits())
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    whole = from_arrays(images, digits.target)
    train, test = split_validation(whole, DIGITS_TEST_SIZE, seed=0)
    return Dataset("digits", train, test, tuple(DIGITS.split()))


def _load_source(name: str, root: Path, download: bool, progress: bool) -> Dataset:
    source = SOURCES[name]
    found = _find(source, root)
    if found is None and download:
        downloads.download(name, root, progress=progress)
        found = _find(source, root)
    if found is None:
        raise ValueError(_missing(name, source, root))
    layout, folder = found
    train, test = (
        Split(torch.from_numpy(images), torch.from_numpy(labels))
        for images, labels in layout.read(folder)
    )
    return Dataset(name, train, test, source.classes)


def _find(source: Source, root: Path) -> tuple[Layout, Path] | None:
    for layout in source.layouts:
        folder = layout.find(root)
        if folder is not None:
            return layout, folder
    return None


def _missing(name: str, source: Source, root: Path) -> str:
    """Why the data set was not found, and what to do."""
    remedy = f"get it with `harprune data {name}`, or name its folder"
    if source.pickled is not None:
        for folder in (root / source.pickled, root):
            if folder.name == source.pickled and folder.is_dir():
                return (
                    f"{folder} is the pickled Python version of {name}, which is never unpickled; "
                    f"take the binary version: {remedy}"
                )
    layout = source.layouts[0]
    for folder in (root / subfolder for subfolder in (*layout.subfolders, "")):
        absent = [file for file in layout.files if not (folder / file).is_file()]
        if len(absent) < len(layout.files):
            return f"{name} in {folder} is incomplete: {', '.join(absent)} not there; {remedy}"
    return (
        f"{name} not found in {root} or its {layout.subfolders[0]}/ "
        f"(expected {', '.join(layout.files)}); {remedy}"
    )


def _load_tiny_imagenet(
    root: Path, download: bool, progress: bool, image_size: int | None
) -> Dataset:
    """The test images of Tiny-ImageNet have no labels, so its validation set is the test split."""
    inner = root / "tiny-imagenet-200"
    if download and not (inner.is_dir() or (root / "train").is_dir()):
        downloads.download("tiny_imagenet", root, progress=progress)
    folder = inner if inner.is_dir() else root
    return _load_folder(folder, "tiny_imagenet", ("val",), image_size)


def _load_folder(
    root: Path, name: str, test_names: tuple[str, ...], image_size: int | None
) -> Dataset:
    train_folder = root / "train"
    test_folders = [root / test for test in test_names if (root / test).is_dir()]
    if not train_folder.is_dir() or not test_folders:
        expected = " or ".join(f"{test}/<class>/" for test in test_names)
        own = "name the folder that holds them (data.folder, --data-dir)"
        hint = own if name == "folder" else f"get it with `harprune data {name}`"
        raise ValueError(
            f"{name} not found in {root} (expected train/<class>/ and {expected}); {hint}"
        )
    classes = list_classes(train_folder)
    listed = [list_images(folder, classes) for folder in (train_folder, test_folders[0])]
    size = short_side(listed[0][0][0]) if image_size is None else image_size
    bytes_decoded = sum(len(paths) for paths, _ in listed) * 3 * size * size
    train, test = (
        Split(
            _images(ImageFiles(paths, size), bytes_decoded <= IN_MEMORY_BYTES), torch.tensor(labels)
        )
        for paths, labels in listed
    )
    return Dataset(name, train, test, tuple(classes))


def _images(files: ImageFiles, decode: bool) -> Tensor | ImageFiles:
    return files.decoded() if decode else files


def _from_user(name: str, folder: str | os.PathLike[str] | None, image_size: int | None) -> Dataset:
    offered = {"folder": folder, "image_size": image_size}
    with current_directory_importable():
        function = user_function(name, "data set")
        made = called(name, function, accepted(function, offered))
        return made if isinstance(made, Dataset) else _of_pair(name, made)


def _of_pair(name: str, made: Any) -> Dataset:
    """The data set of (train, test), its classes named by their numbers."""
    if not isinstance(made, tuple | list) or len(made) != 2:
        raise ValueError(
            f"{name} returned {type(made).__name__}; it must return (train, test), each of them a "
            "pair (images, labels) or a torch Dataset, or it must return a harprune.Dataset"
        )
    train, test = (_part(name, *part) for part in zip(("train", "test"), made, strict=True))
    top = int(max(train.labels.max(), test.labels.max()))
    return Dataset(name, train, test, tuple(map(str, range(top + 1))))


def _part(name: str, part: str, images: Any) -> Split:
    try:
        split = as_split(images)
    except ValueError as error:
        raise ValueError(f"{name} must return (train, test), but of {part} {error}") from None
    require_labels(split.labels, None, f"{name}, {part}")
    return split
