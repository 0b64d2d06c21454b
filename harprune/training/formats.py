# SPDX-License-Identifier: Apache-2.0
"""The file formats in which image data sets are published, read into arrays and checked.

Every reader returns images uint8 (N, C, H, W) and labels int64 (N,), and raises a `ValueError` that
names the file where it is truncated or garbled. Nothing is unpickled.
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from harprune.user_code import first_line

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]

CIFAR_SHAPE = (3, 32, 32)
SVHN_SHAPE = (32, 32, 3)
IDX_UINT8 = 0x08


def read_cifar_binary(path: Path, *, records: int, label_bytes: int) -> Arrays:
    """CIFAR's binary version: records of `label_bytes` labels, the last one wanted, and planes."""
    record = label_bytes + math.prod(CIFAR_SHAPE)
    expected, found = records * record, path.stat().st_size
    if found != expected:
        raise ValueError(
            f"{path} holds {found} bytes, expected {expected}; delete it and get it again"
        )
    data = np.fromfile(path, dtype=np.uint8).reshape(records, record)
    images = np.ascontiguousarray(data[:, label_bytes:]).reshape(records, *CIFAR_SHAPE)
    return images, data[:, label_bytes - 1].astype(np.int64)


def read_svhn(path: Path) -> Arrays:
    """SVHN's cropped digits: `X` (32, 32, 3, N) and `y`, in which 10 stands for the digit 0."""
    content = _read_matlab(path, ("X", "y"))
    images, labels = content["X"], content["y"].reshape(-1).astype(np.int64)
    if images.dtype != np.uint8 or images.shape != (*SVHN_SHAPE, len(labels)):
        raise ValueError(
            f"{path} holds X {images.dtype} {images.shape} and {len(labels)} labels, expected "
            "uint8 (32, 32, 3, N)"
        )
    return np.ascontiguousarray(images.transpose(3, 2, 0, 1)), labels % 10


def _read_matlab(path: Path, keys: tuple[str, ...]) -> dict[str, NDArray]:
    from scipy.io import loadmat

    try:
        content = loadmat(path)
    except OSError:
        raise
    # A damaged file makes scipy raise almost anything: TypeError, zlib.error, MatReadError,
    # IndexError, MemoryError.
    except Exception as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is not a readable Matlab file "
            f"({first_line(error)}); get it again"
        ) from error
    missing = [key for key in keys if not isinstance(content.get(key), np.ndarray)]
    if missing:
        raise ValueError(f"{path} holds no array called {', '.join(missing)}")
    return content


def read_idx(path: Path, *, dimensions: int) -> NDArray[np.uint8]:
    """An idx file of bytes as MNIST's authors define it, raw or gzipped."""
    data = _read_bytes(path)
    header = 4 + 4 * dimensions
    if len(data) < header or data[:4] != bytes((0, 0, IDX_UINT8, dimensions)):
        raise ValueError(
            f"{path} does not start like an idx file of {dimensions} dimensions (it starts "
            f"{data[:4].hex()!r})"
        )
    shape = tuple(int(n) for n in np.frombuffer(data, dtype=">u4", count=dimensions, offset=4))
    expected = header + math.prod(shape)
    if len(data) != expected:
        raise ValueError(
            f"{path} holds {len(data)} bytes, expected {expected} for shape {shape}; delete it "
            "and get it again"
        )
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)


def read_idx_pair(images_path: Path, labels_path: Path) -> Arrays:
    """Images (N, H, W) and labels (N,) of two idx files."""
    images = read_idx(images_path, dimensions=3)
    labels = read_idx(labels_path, dimensions=1)
    if len(images) != len(labels):
        raise ValueError(
            f"{images_path} holds {len(images)} images but {labels_path.name} {len(labels)} labels"
        )
    return images[:, None].copy(), labels.astype(np.int64)


def _read_bytes(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        with gzip.open(path) as file:
            return file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is not a complete gzip file "
            f"({first_line(error)}); get it again"
        ) from error
