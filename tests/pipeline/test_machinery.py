# SPDX-License-Identifier: Apache-2.0
"""What a run sets up around its training: exact arithmetic, and a bar that shows what is said."""

import fcntl
from threading import Timer

import pytest
import torch
from rich.console import Console as RichConsole

from harprune.pipeline import machinery
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
            console = RichConsole(file=file, force_terminal=terminal, width=120, highlight=False)
            bar = Bar(console, "a [/b] name", 3, every=0.0)
            bar.update(0, "on [bold]")
            bar.update(2, "on [bold]")
            bar.close()
        assert "a [/b] name" in path.read_text()


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
