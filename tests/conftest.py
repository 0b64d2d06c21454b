# SPDX-License-Identifier: Apache-2.0
"""What every test shares: one thread, fixed seeds, and folders of real data where there are any."""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

pytest_plugins = ("tests.tiny",)

# Drawn examples must not differ between two runs, nor fail because a shared machine was slow.
hypothesis.settings.register_profile("harprune", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("harprune")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Same seed, same bits: no sum is split among threads; test processes share the cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> Iterator[int]:
    """Seed torch's global generator before each test, so that the order of tests cannot matter."""
    torch.manual_seed(0)
    yield 0


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the data sets in their authors' layouts, from HARPRUNE_TEST_DATA."""
    return _folder_from(
        "HARPRUNE_TEST_DATA", "unpacked data sets (cifar-10-batches-bin, MNIST/raw)"
    )


@pytest.fixture(scope="session")
def checkpoint_root() -> Path:
    """Folder of others' robust checkpoints and MANIFEST.json, from HARPRUNE_TEST_CHECKPOINTS."""
    return _folder_from("HARPRUNE_TEST_CHECKPOINTS", "robust checkpoints and MANIFEST.json")


def _folder_from(variable: str, holds: str) -> Path:
    """The folder an environment variable names; an unset one skips, a wrong one fails."""
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set: it names a folder with {holds}")
    folder = Path(value)
    if not folder.is_dir():
        pytest.fail(f"{variable}={value} is not a folder: it must hold {holds}")
    return folder
