# SPDX-License-Identifier: Apache-2.0
"""Interrupted runs: by kill -9 at random moments, and at every place where a file is renamed.

Whatever happened on the way, the same command must end with the same bits: tensors, metrics, audit,
outcomes and report. Files that are no tensors are compared byte by byte; of checkpoints every
tensor and value, because safetensors writes its metadata in no fixed order.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harprune.recipe.text import make_recipe, read_recipe
from harprune.run.folder import RunFolder
from harprune.run.opening import open_run
from harprune.run.stages import run_until
from harprune.training import checkpoint

ENTRY = "from harprune.cli.main import main; main()"

DIGITS = """
name = "killed"
[data]
name = "digits"
validation = 0.2
[model]
width = 4
[threat]
epsilon = 0.1
[objective]
steps = 3
[budget]
density = 0.2
[method]
gamma = 0.2
[pretrain]
epochs = 2
[prune]
epochs = 2
[finetune]
epochs = 2
[validation]
size = 50
steps = 2
[attack]
attacks = ["pgd-3"]
size = 40
batch_size = 10
[execution]
threads = 1
checkpoint_minutes = 1e-6
"""


def require_same(run: Path, reference: Path) -> None:
    """Both folders hold the same files with the same content, and nothing else."""
    there, here = _content(reference), _content(run)
    assert sorted(here) == sorted(there)
    differing = [name for name in there if here[name] != there[name]]
    assert not differing


def _content(folder: Path) -> dict[str, object]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = {str(path.relative_to(folder)): path for path in files}
    # The log says when the run went on, the lock which process had it last.
    return {name: _read(path) for name, path in names.items() if name not in ("log.txt", ".lock")}


def _read(path: Path) -> object:
    if path.suffix != ".safetensors":
        return path.read_bytes()
    tensors, values = checkpoint.load(path)
    state = {name: (str(t.dtype), tuple(t.shape), t.tolist()) for name, t in tensors.items()}
    assert state
    return state, repr(values)


# --- real processes, really killed ----------------------------------------------------------------


@pytest.fixture
def environment() -> dict[str, str]:
    """One thread; no commit in the record, which may change while the test runs."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "GIT_DIR": os.devnull}


def start(place: Path, recipe: str, environment: dict[str, str]) -> subprocess.Popen:
    """`harprune run` in `place`: the same command wherever it is."""
    place.mkdir(exist_ok=True)
    (place / "recipe.toml").write_text(recipe)
    command = [sys.executable, "-c", ENTRY, "run", "recipe.toml", "--out", "run"]
    with open(place / "output.txt", "a") as log:
        return subprocess.Popen(command, cwd=place, env=environment, stdout=log, stderr=log)


def finish(process: subprocess.Popen, place: Path) -> Path:
    assert process.wait() == 0, (place / "output.txt").read_text()
    return place / "run"


def kill_when(process: subprocess.Popen, path: Path, delay: float) -> bool:
    """SIGKILL `delay` seconds after `path` is there; False where the process was done before."""
    while not path.exists() and process.poll() is None:
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


# What is there when each part of a run is at work, in order, and how long that part takes at most.
MOMENTS = (
    ("recipe.json", 1.0),
    ("pretrain.progress", 0.5),
    ("pretrain.best", 0.5),
    ("dense.safetensors", 0.2),
    ("prune.progress", 0.5),
    ("prune.best", 0.5),
    ("pruned.safetensors", 0.2),
    ("finetune.progress", 0.5),
    ("attack/dense/partial.npz", 1.0),
    ("attack/finetuned/partial.npz", 1.0),
    ("report/plots", 0.05),
)


def kill_again_and_again(place, recipe, environment, moments, dice) -> int:
    """Run in `place`, killed at a random time after each of `moments`; how many hit a process."""
    hits = 0
    for name, longest in moments:
        process = start(place, recipe, environment)
        hits += kill_when(process, place / "run" / name, dice.uniform(0.0, longest))
    return hits


def test_three_kills_change_nothing(tmp_path, environment):
    reference = finish(start(tmp_path / "whole", DIGITS, environment), tmp_path / "whole")
    place, dice = tmp_path / "killed", random.Random(0)
    moments = [MOMENTS[n] for n in (1, 5, 8)]
    assert kill_again_and_again(place, DIGITS, environment, moments, dice) == 3
    require_same(finish(start(place, DIGITS, environment), place), reference)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_ten_kills_in_all_stages_change_nothing(tmp_path, environment, seed):
    recipe = DIGITS.replace('["pgd-3"]', '["pgd-3", "autoattack"]').replace(
        "size = 40", "size = 20"
    )
    recipe = recipe.replace("epochs = 2", "epochs = 4").replace("width = 4", "width = 8")
    reference = finish(start(tmp_path / "whole", recipe, environment), tmp_path / "whole")
    place, dice = tmp_path / "killed", random.Random(seed)
    hits = kill_again_and_again(place, recipe, environment, MOMENTS, dice)
    assert hits >= 10
    require_same(finish(start(place, recipe, environment), place), reference)


# --- every rename, in one process -----------------------------------------------------------------


class Killed(BaseException):
    """Ends the work as a kill would, as far as the folder can tell."""


class Fate:
    """Stands for `os.replace`: after `allowed` renames it dies, before or after the next one."""

    def __init__(self, dice: random.Random):
        self.dice = dice
        self.replace = os.replace
        self.deaths = 0

    def live_again(self) -> None:
        self.allowed = self.dice.randint(1, 14)

    def __call__(self, *arguments: object) -> None:
        self.allowed -= 1
        late = self.dice.random() < 0.5
        if self.allowed >= 0 or late:
            self.replace(*arguments)
        if self.allowed < 0:
            self.deaths += 1
            raise Killed


def attempt(folder: Path, recipe) -> None:
    with open_run(recipe, folder, command="test") as run:
        run_until(run)


EVERY_STEP = ("execution.checkpoint_minutes=1e-6", "execution.threads=1", "attack.batch_size=5")
VARIANTS = {
    "harp, pgd-at, sgd": (),
    "harp, free, adamw": (
        'objective={name="free"}', "prune.optimiser=adamw", "prune.learning_rate=0.01",
    ),
    "hydra, trades, sgd": ("method.name=hydra", "objective.name=trades"),
    "harp, mart, adamw, filters": (
        "objective.name=mart", "pretrain.optimiser=adamw", "pretrain.learning_rate=0.01",
        "budget.granularity=filter", "budget.density=0.5", "parity.score_decay=true",
        "parity.batch_norm_affine=true",
    ),
    "magnitude, fgsm-rs, steps": (
        "method.name=magnitude", 'objective={name="fgsm-rs"}', "finetune.schedule=steps",
        "execution.twin=false", "finetune.distillation.temperature=2.0",
    ),
    "harp, averaged, distilled": (
        "pretrain.averaging=0.9", "finetune.averaging=0.5",
        "prune.distillation.weight=0.5", "finetune.distillation.weight=0.5",
    ),
    "harp, weights trained, awp": (
        "method.train_weights=true", "pretrain.awp={}", "finetune.awp.radius=0.1",
        "finetune.averaging=0.5",
    ),
    "a forward that draws in Python and NumPy": (
        "model.name=stripes_of_tests:drawing", "finetune.averaging=0.5",
    ),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_dying_at_any_rename_changes_nothing(variant, here, monkeypatch):
    monkeypatch.setenv("GIT_DIR", os.devnull)
    settings = (*VARIANTS[variant], *EVERY_STEP)
    whole = read_recipe("tiny.toml", settings)
    attempt(here / "whole", whole)

    fate = Fate(random.Random(variant))
    monkeypatch.setattr("os.replace", fate)
    for _ in range(100):
        fate.live_again()
        try:
            attempt(here / "killed", whole)
            break
        except Killed:
            continue
    assert fate.deaths >= 3
    require_same(here / "killed", here / "whole")


def test_dying_before_the_last_metrics_loses_none(finished, here, monkeypatch):
    recipe, write = read_recipe("tiny.toml"), RunFolder.write_metrics

    def die_late(run, histories):
        if len(histories.get("finetune", [])) == recipe.finetune.epochs:
            raise Killed
        write(run, histories)

    monkeypatch.setattr(RunFolder, "write_metrics", die_late)
    with pytest.raises(Killed):
        attempt(here / "again", recipe)
    monkeypatch.undo()
    monkeypatch.chdir(here)
    attempt(here / "again", recipe)
    metrics = [folder / "metrics.jsonl" for folder in (here / "again", finished)]
    assert metrics[0].read_bytes() == metrics[1].read_bytes()


def test_a_run_that_is_opened_again_loses_the_litter_of_the_dead(finished):
    litter = [
        ".dense.safetensors.ab12cd_9", ".recipe.toml.00000000", ".metrics.jsonl.zzzzzzzz",
        "attack/dense/.partial.npz.abcdefgh", "report/.report.html.abcdefgh",
        "report/plots/.density.svg.abcdefgh", ".tmp5mm4Wi", "pretrain.progress", "prune.best",
    ]  # fmt: skip
    others = [".bashrc.settings", ".hidden", "dense.json.abcdefgh", "sub/.a.json.abcdefgh"]
    (finished / "sub").mkdir()
    for name in (*litter, *others):
        (finished / name).write_text("half")
    with RunFolder(finished, read_recipe(finished / "recipe.toml")):
        pass
    assert not [name for name in litter if (finished / name).exists()]
    assert all((finished / name).exists() for name in others)


def test_a_run_continued_by_other_code_says_so(tmp_path, monkeypatch):
    recipe = make_recipe({}, source="a test")
    commits = iter(["first", "second", "second", "third"])
    monkeypatch.setattr("harprune.run.environment._commit", lambda: next(commits))
    for commit in ("first", "second", "second", "third"):
        with RunFolder(tmp_path / "run", recipe) as run:
            run.progress("pretrain").touch()
            if commit != "third":  # which computes nothing
                run.note_change()
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["commit"] == "first"
    assert [e["commit"] for e in environment["continued"]] == ["second"]


def test_a_key_that_came_with_a_later_version_does_not_make_another_recipe(tmp_path):
    recipe = make_recipe({}, source="a test")
    with RunFolder(tmp_path / "run", recipe) as run:
        run.progress("pretrain").touch()
    path = tmp_path / "run" / "recipe.json"
    held = json.loads(path.read_text())
    del held["execution"]["backend"]
    path.write_text(json.dumps(held))
    with RunFolder(tmp_path / "run", recipe):
        pass
    other = make_recipe({"execution": {"backend": "dense"}}, source="a test")
    with pytest.raises(ValueError, match=r"execution.backend: 'auto' -> 'dense'"):
        RunFolder(tmp_path / "run", other)
