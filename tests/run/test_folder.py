# SPDX-License-Identifier: Apache-2.0
"""What a run folder says of its machine, and who may work in it and speak of it."""

import fcntl
from threading import Timer

import pytest
import torch

from harprune.recipe.materials import gather
from harprune.recipe.text import make_recipe, read_recipe
from harprune.run.environment import environment_of
from harprune.run.lock import lock
from harprune.run.opening import open_run


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


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_processes_one_speaks_and_writes(rank, here, monkeypatch, capsys):
    """Also where the images and the network come from Python."""
    monkeypatch.setenv("RANK", str(rank))
    recipe = read_recipe("tiny.toml")
    with open_run(recipe, "run", gather(recipe), quiet=False) as run:
        run.console.say("a line")
    assert ("a line" in capsys.readouterr().err) == (here / "run").exists() == (rank == 0)
