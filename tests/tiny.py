# SPDX-License-Identifier: Apache-2.0
"""The command line inside the test process, a data set of 96 images, and a run of it to copy."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from harprune.cli.main import main

DATA_SET = """
import random

import numpy
import torch
from harprune.training.splits import Dataset, from_arrays

def images():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(96) % 4
    x = torch.rand(96, 1, 8, 8, generator=generator) * 0.3
    for k in range(4):
        x[y == k, :, 2 * k : 2 * k + 2] += 0.6
    return x, y

def load():
    x, y = images()
    train, test = from_arrays(x[:72], y[:72]), from_arrays(x[72:], y[72:])
    return Dataset("stripes", train, test, tuple("abcd"))

def relabelled():
    whole = load()
    others = from_arrays(whole.test.images, whole.test.labels.flip(0))
    return Dataset("relabelled", whole.train, others, tuple("abcd"))

def larger():
    x, y = images()
    x = torch.nn.functional.pad(x, (2, 2, 2, 2))
    return Dataset("larger", from_arrays(x, y), from_arrays(x, y), tuple("abcd"))

def wants(num_classes, something, width):
    pass

def nan(num_classes, in_channels=1, width=4):
    from torch import nn
    layer = nn.Linear(64, num_classes)
    nn.init.constant_(layer.bias, float("nan"))
    return nn.Sequential(nn.Flatten(), layer)

def fails(num_classes, in_channels=1, width=4):
    return open("/nowhere/at/all")

class Picky(torch.nn.Module):
    def __init__(self, modes, num_classes):
        super().__init__()
        self.modes, self.layer = modes, torch.nn.Linear(64, num_classes)

    def forward(self, x):
        assert self.training not in self.modes, "nine pixels\\n are needed"
        return self.layer(x.flatten(1))

def picky(num_classes, in_channels=1, width=4):
    return Picky([False], num_classes)

def lonely(num_classes, in_channels=1, width=4):
    return Picky([True], num_classes)

class Drawing(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(),
            torch.nn.Linear(144, num_classes),
        )

    def forward(self, x):
        return self.layers(x + 0.3 * random.random() + 0.3 * numpy.random.rand())

def drawing(num_classes, in_channels=1, width=4):
    return Drawing(num_classes)

def unread():
    return open("/nowhere/at/all")

def too_bright():
    from harprune.training.splits import Split
    x, y = images()
    return Dataset("bright", Split(x * 255, y), Split(x * 255, y), tuple("abcd"))
"""

RECIPE = """
name = "tiny"
[data]
name = "stripes_of_tests:load"
validation = 12
augmentation = "none"
[model]
name = "small_cnn"
width = 4
[objective]
steps = 1
[budget]
density = 0.2
[pretrain]
epochs = 2
batch_size = 20
[prune]
epochs = 2
batch_size = 20
[finetune]
epochs = 2
batch_size = 20
[validation]
size = 12
steps = 1
[attack]
attacks = ["pgd-2"]
size = 16
"""


@dataclass(frozen=True)
class Said:
    """What a command left: its exit code, and its text on the two streams."""

    code: int
    out: str
    err: str

    @property
    def refusal(self) -> str:
        """The one line of a refusal: nothing else was printed, and the exit code is 2."""
        assert self.code == 2, self
        lines = self.err.splitlines()
        assert len(lines) == 1 and self.out == "", self
        assert lines[0].startswith("harprune: ")
        return lines[0].removeprefix("harprune: ")

    @property
    def last_line(self) -> str:
        """The last line of an error that came while a run was working."""
        assert self.code == 2 and "Traceback" not in self.err, self
        return self.err.splitlines()[-1].removeprefix("harprune: ")


Command = Callable[..., Said]


@pytest.fixture
def command(monkeypatch, capsys) -> Command:
    """`command("run", path, ...)`: the command line in this process."""

    def call(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["harprune", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        return Said(int(stopped.value.code or 0), printed.out, printed.err)

    return call


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory, from which the data set of the tests can be imported."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stripes_of_tests.py").write_text(DATA_SET)
    (tmp_path / "tiny.toml").write_text(RECIPE)
    monkeypatch.delitem(sys.modules, "stripes_of_tests", raising=False)
    return tmp_path


@pytest.fixture(scope="session")
def _finished(tmp_path_factory) -> Path:
    """A finished run of RECIPE, made once."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "stripes_of_tests.py").write_text(DATA_SET)
    (folder / "tiny.toml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["harprune", "run", "tiny.toml", "--out", "run"])
        with pytest.raises(SystemExit) as stopped:
            main()
    assert not stopped.value.code
    return folder / "run"


@pytest.fixture
def finished(_finished, here) -> Path:
    """A copy of the finished run as `run` in the working directory."""
    shutil.copytree(_finished, here / "run")
    return here / "run"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under `folder` but the lock and the log, which each command may touch."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", "log.txt")
    }
