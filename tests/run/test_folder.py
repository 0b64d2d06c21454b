# SPDX-License-Identifier: Apache-2.0
"""What a run folder says of its machine, and who may work in it."""

import fcntl
from threading import Timer

import torch

from harprune.recipe.text import make_recipe
from harprune.run.environment import environment_of
from harprune.run.lock import lock


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
