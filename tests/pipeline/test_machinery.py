# SPDX-License-Identifier: Apache-2.0
"""What a run sets up around its training: exact arithmetic, and a bar that shows what is said."""

import fcntl
import io
from threading import Timer
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console as RichConsole

from harprune.pipeline import console, machinery
from harprune.pipeline.console import Bar
from harprune.pipeline.pruning import method_notes
from harprune.pipeline.recipe_text import make_recipe
from harprune.pipeline.run import environment_of, lock


def test_convolutions_on_an_accelerator_are_not_shortened(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    machinery.fabric(make_recipe({"execution": {"device": "cpu"}}).execution)
    assert not torch.backends.cudnn.allow_tf32


def test_brackets_in_a_name_are_no_markup(tmp_path):
    for terminal in (True, False):
        path = tmp_path / str(terminal)
        with open(path, "w") as file:
            rich = RichConsole(file=file, force_terminal=terminal, width=120, highlight=False)
            bar = Bar(rich, "a [/b] name", 3, every=0.0)
            bar.update(0, "on [bold]")
            bar.update(2, "on [bold]")
            bar.close()
        assert "a [/b] name" in path.read_text()


@pytest.mark.parametrize("terminal", [True, False])
def test_the_log_says_once_how_much_time_is_left(monkeypatch, terminal):
    clock, noted = [0.0], []
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    rich = RichConsole(file=io.StringIO(), force_terminal=terminal, width=120)
    bar = Bar(rich, "prune", 100, every=30.0, note=noted.append)
    for clock[0], done in ((20.0, 1), (25.0, 2), (45.0, 6), (90.0, 15)):
        bar.update(done, "loss 1")
    bar.close()
    assert noted == ["prune 6/100, 7:50 left, loss 1"]
    assert bar.left(100) == ""


def test_each_attack_has_a_pace_of_its_own(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    bar = Bar(RichConsole(file=io.StringIO()), "attack", 100)
    for clock[0], done in ((1.0, 50), (2.0, 100), (62.0, 50)):
        bar.update(done)
    assert bar.left(50) == ", 1:00 left"


def test_threads_far_beyond_the_cores_are_refused():
    with pytest.raises(ValueError, match=r"execution\.threads = 100000 exceeds 4 for each of the"):
        machinery.fabric(make_recipe({"execution": {"threads": 100_000}}).execution)


def test_the_record_says_what_a_run_was_given():
    section = make_recipe({"execution": {"device": "cpu", "threads": 3}}).execution
    machine = environment_of("", section)["machine"]
    assert (machine["threads"], machine["accelerator"]) == (3, None)
    assert environment_of("")["machine"]["threads"] == torch.get_num_threads()


def test_who_only_looks_whether_a_folder_is_free_refuses_nobody(tmp_path):
    lock(tmp_path).close()
    with open(tmp_path / ".lock") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        Timer(0.05, lambda: fcntl.flock(looking, fcntl.LOCK_UN)).start()
        lock(tmp_path).close()


def test_every_option_of_a_method_has_its_meaning():
    notes = method_notes()
    text = "\n".join(notes)
    assert "harp: step of the penalty's weight; in epoch e (from 0) the weight is (e + 1)" in text
    assert len(notes) % 2 == 0 and not any(note.endswith(": ") for note in notes)
