# SPDX-License-Identifier: Apache-2.0
"""Two processes that share each batch end where one process ends, to float tolerance.

That holds for networks without batch norm and attacks without a random start: each process
normalises with the statistics of its own rows, and draws its own noise. Where there is batch norm
the processes must still agree with each other, bit for bit.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from harprune.training import checkpoint

# A network without batch norm, and everything `fit` needs to train it, for any number of processes.
MODULE = """
import gc
import torch
from torch import nn
from torch.nn import functional as F
from lightning_fabric import Fabric
from harprune.methods.base import Budget
from harprune.methods.harp import HARP
from harprune.robustness.attacks import FGSM, PGD, no_start
from harprune.robustness.objectives import PGDAT, Free
from harprune.robustness.threat import L2, Linf
from harprune.training.augmentation import CropFlip
from harprune.training.batches import Batches
from harprune.training.loop import fit
from harprune.training.schedules import cosine
from harprune.training.splits import Dataset, from_arrays

def stripes():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(96) % 4
    x = torch.rand(96, 1, 8, 8, generator=generator) * 0.3
    for k in range(4):
        x[y == k, :, 2 * k : 2 * k + 2] += 0.6
    return x, y

def load():
    x, y = stripes()
    train, test = from_arrays(x[:72], y[:72]), from_arrays(x[72:], y[72:])
    return Dataset("stripes", train, test, tuple("abcd"))

def plain(num_classes=4, in_channels=1, width=8, norm=nn.Identity):
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, padding=1), norm(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(9 * width, num_classes),
    )

def train(kind, fabric):
    '''The trained model, and the loss of each step.'''
    torch.manual_seed(0)
    model = plain(norm=nn.BatchNorm2d if kind == "norm" else nn.Identity)
    parameters, penalty, losses = list(model.parameters()), lambda model: 0.0, []
    objective = PGDAT(PGD(L2(0.5), 3, start=no_start))
    if kind == "norm":
        objective = PGDAT(PGD(Linf(0.1), 2))
    if kind == "free":
        objective = Free(L2(0.5), replays=2)
    if kind == "masked":
        method = HARP(gamma=0.1)
        method.attach(model, Budget(0.2))
        parameters, penalty = method.trainable(model), method.penalty
    x, y = stripes()
    batches = Batches(
        from_arrays(x, y), 12, seed=3, augment=CropFlip(1),
        rank=fabric.global_rank, world=fabric.world_size,
    )
    fit(
        model, batches, loss=lambda m, x, y: objective(m, x, y) + penalty(m),
        optimiser=torch.optim.SGD(parameters, lr=0.05, momentum=0.9), schedule=cosine, epochs=2,
        fabric=fabric, seed=1, replays=objective.replays,
        after_step=lambda step, loss: losses.append(float(loss)),
    )
    return model, losses

KINDS = ("attacked", "masked", "free", "norm")

def main():
    torch.set_num_threads(1)
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    for kind in KINDS:
        model, losses = train(kind, fabric)
        torch.save((model.state_dict(), losses), f"{kind}.{fabric.global_rank}.pt")

if __name__ == "__main__":
    main()
    gc.collect()
    torch.distributed.destroy_process_group()
"""

RECIPE = """
name = "parallel"
[data]
name = "parallel_parts:load"
validation = 12
augmentation = "none"
[model]
name = "parallel_parts:plain"
width = 8
[threat]
norm = "l2"
epsilon = 0.5
[objective]
name = "natural"
[budget]
density = 0.3
[method]
name = "harp"
gamma = 0.1
[pretrain]
epochs = 2
batch_size = 12
learning_rate = 0.05
averaging = 0.9
[prune]
epochs = 2
batch_size = 12
[finetune]
epochs = 2
batch_size = 12
averaging = 0.9
[validation]
size = 12
steps = 1
[attack]
attacks = ["fgsm"]
size = 16
[execution]
device = "cpu"
threads = 1
checkpoint_minutes = 1e-6
"""

PYTHON = (sys.executable, "-W", "error")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
HARPRUNE = ("-m", "harprune", "run", "recipe.toml", "--out", "run")


def call(place: Path, *command: str) -> str:
    """What the command says on standard error, once it has succeeded."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GIT_DIR": os.devnull}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr and "destroy_process_group" not in done.stderr
    return done.stderr


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the parts and the recipe, from which both can be imported."""
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        (folder / "parallel_parts.py").write_text(MODULE)
        (folder / "recipe.toml").write_text(RECIPE)
    monkeypatch.syspath_prepend(tmp_path / "one")
    monkeypatch.delitem(sys.modules, "parallel_parts", raising=False)
    return tmp_path


def test_fit_in_two_processes_is_fit_in_one(place):
    import parallel_parts
    from lightning_fabric import Fabric

    call(place, *TORCHRUN, "two/parallel_parts.py")
    fabric = Fabric(accelerator="cpu", devices=1)
    for kind in parallel_parts.KINDS:
        ranks = [torch.load(place / f"{kind}.{rank}.pt", weights_only=True) for rank in (0, 1)]
        (state, losses), (other_state, other_losses) = ranks
        assert losses == other_losses, kind
        assert all(torch.equal(state[name], other_state[name]) for name in state), kind
        model, expected = parallel_parts.train(kind, fabric)
        assert len(losses) == len(expected) == 16
        if kind == "norm":
            # Batch statistics of half the rows and other noise: another run, of the same task.
            assert losses != pytest.approx(expected, rel=1e-4)
            assert int(state["1.num_batches_tracked"]) == 16
        else:
            assert losses == pytest.approx(expected, rel=1e-4), kind
            for name, tensor in model.state_dict().items():
                torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-5, msg=kind)


def test_a_whole_run_in_two_processes_is_a_run_in_one(place):
    call(place / "one", *PYTHON, *HARPRUNE)
    said = call(place / "two", *TORCHRUN, "--no-python", *PYTHON, *HARPRUNE)
    assert said.count("pretrain 1/2:") == said.count("report: run") == 1  # rank 0 alone speaks

    one, two = place / "one" / "run", place / "two" / "run"
    files = [sorted(str(p.relative_to(run)) for p in run.rglob("*")) for run in (one, two)]
    assert files[0] == files[1]
    for name in ("dense", "pruned", "finetuned"):
        tensors, _ = checkpoint.load(one / f"{name}.safetensors")
        others, _ = checkpoint.load(two / f"{name}.safetensors")
        assert tensors.keys() == others.keys()
        for key, tensor in tensors.items():
            torch.testing.assert_close(others[key], tensor, rtol=1e-3, atol=1e-5, msg=key)
    assert (one / "audit.json").read_text() == (two / "audit.json").read_text()
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a.pop("densities", {}) == pytest.approx(b.pop("densities", {}), rel=1e-4)
        assert a.pop("stage") == b.pop("stage")
        assert a == pytest.approx(b, rel=1e-4)


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["trades", "free"])
def test_two_processes_killed_together_go_on_with_the_same_bits(place, objective):
    """With batch norm and noise: what rank 0 saved is enough for both."""
    recipe = RECIPE.replace("parallel_parts:plain", "small_cnn")
    recipe = recipe.replace('"natural"', f'"{objective}"')
    for folder in ("one", "two"):
        (place / folder / "recipe.toml").write_text(recipe)
    pair = (*TORCHRUN, "--no-python", *PYTHON, *HARPRUNE)
    call(place / "one", *pair)
    for awaited in ("pretrain.progress", "prune.best", "finetune.progress"):
        kill_group_when(place / "two", awaited, *pair)
    call(place / "two", *pair)
    for name in ("dense", "pruned", "finetuned"):
        files = [place / folder / "run" / f"{name}.safetensors" for folder in ("one", "two")]
        (tensors, values), (others, other_values) = map(checkpoint.load, files)
        assert values == other_values
        assert all(torch.equal(tensors[key], others[key]) for key in tensors)


def kill_group_when(place: Path, awaited: str, *command: str) -> None:
    """SIGKILL the launcher and its processes soon after the file is there."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GIT_DIR": os.devnull}
    process = subprocess.Popen(
        command, cwd=place, env=environment, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while not (place / "run" / awaited).exists() and process.poll() is None:
        time.sleep(0.002)
    time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
