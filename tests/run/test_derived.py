# SPDX-License-Identifier: Apache-2.0
"""What of a run folder can be lost: what derives from networks comes back, a source does not."""

import json
import shutil

import pytest

from harprune.run.state import TrainingState
from harprune.training import checkpoint
from tests.tiny import contents

DERIVED = ("audit.json", "metrics.jsonl", "warnings.json")


def go_on(command, *settings: str):
    sets = [part for setting in settings for part in ("--set", setting)]
    return command("run", "tiny.toml", "--out", "run", *sets)


def derived(folder) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in DERIVED}


def change(path, **values) -> None:
    """Other values in a network's file; None takes one away, as in files of an earlier version."""
    tensors, held = checkpoint.load(path)
    checkpoint.save(path, tensors, {k: v for k, v in {**held, **values}.items() if v is not None})


def test_what_networks_know_is_written_anew(command, finished):
    before = contents(finished)
    (finished / "metrics.jsonl").unlink()
    (finished / "audit.json").write_text('{"kept": 7}')
    (finished / "warnings.json").write_text("[")
    (finished / "scoring.json").write_text('{"passes": 7}')  # of a method that was here before
    assert go_on(command).code == 0
    assert contents(finished) == before


@pytest.mark.parametrize("name", ["dense", "pruned"])
def test_a_network_made_anew_takes_nothing_from_later_ones(command, finished, name):
    before, network = derived(finished), finished / f"{name}.safetensors"
    tensors, values = checkpoint.load(network)
    network.unlink()
    assert go_on(command).code == 0
    assert derived(finished) == before
    again = checkpoint.load(network)
    assert again[1] == values and checkpoint.digest(again[0]) == checkpoint.digest(tensors)


def test_what_a_later_stage_went_on_from_may_not_change(command, finished):
    (finished / "pruned.safetensors").unlink()
    before = contents(finished)
    assert "(budget.density: 0.2 -> 0.5)" in go_on(command, "budget.density=0.5").refusal
    shutil.rmtree(finished / "attack" / "finetuned")
    (finished / "finetuned.safetensors").rename(finished / "finetune.progress")
    assert "(method.name: 'harp' -> 'magnitude')" in go_on(command, "method.name=magnitude").refusal
    (finished / "finetune.progress").rename(finished / "finetuned.safetensors")
    assert contents(finished).items() <= before.items()


def test_a_network_of_another_origin_is_refused(command, finished):
    dense, pruned = finished / "dense.safetensors", finished / "pruned.safetensors"
    text = "run/pruned.safetensors was made from another network than dense.safetensors is now"
    change(pruned, origin="0" * 64)
    before = contents(finished)
    assert go_on(command).refusal.startswith(text)
    assert contents(finished) == before
    dense.unlink()
    assert go_on(command).last_line.startswith(text)
    assert not dense.exists() and (finished / "pretrain.progress").exists()
    assert (finished / "pruned.safetensors").read_bytes() == before["pruned.safetensors"]


def test_a_stage_half_done_goes_on_from_its_own_network_alone(command, finished, monkeypatch):
    shutil.rmtree(finished / "attack" / "finetuned")
    (finished / "finetuned.safetensors").unlink()
    ended = TrainingState.epoch_ended

    def killed(course, *arguments, **options):
        ended(course, *arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "epoch_ended", killed)
        assert go_on(command).code == 130
    pruned, progress = finished / "pruned.safetensors", finished / "finetune.progress"
    tensors, values = checkpoint.load(pruned)
    next(tensor for tensor in tensors.values() if tensor.is_floating_point()).neg_()
    checkpoint.save(pruned, tensors, values)
    before = contents(finished)
    assert go_on(command).refusal == (
        "run/finetune.progress was made from another network than pruned.safetensors is now; "
        "restore that one, or delete finetune.progress and what was made from it"
    )
    assert contents(finished) == before
    change(progress, origin=None)  # a file of an earlier version does not say
    assert "finetune: going on at step 3" in go_on(command).err


def test_networks_of_an_earlier_version_know_their_epochs_alone(command, finished):
    before = derived(finished)
    for name in ("dense", "pruned", "finetuned"):
        lost = dict.fromkeys(("warnings", "audit", "scoring", "origin"))
        change(finished / f"{name}.safetensors", **lost)
    (finished / "metrics.jsonl").unlink()
    assert go_on(command).code == 0
    assert derived(finished) == before
    (finished / "warnings.json").write_text("[")
    assert go_on(command).refusal.startswith("run/warnings.json is damaged; restore it")


@pytest.mark.parametrize("name", ["recipe.json", "environment.json"])
def test_a_damaged_source_is_found_before_the_work(command, finished, name):
    (finished / "finetuned.safetensors").unlink()
    (finished / name).write_text("[")
    before = contents(finished)
    assert go_on(command).refusal.startswith(f"run/{name} is damaged; restore it")
    assert contents(finished) == before


def test_networks_without_their_recipe_are_nobodys(command, finished):
    (finished / "recipe.json").unlink()
    before = contents(finished)
    said = go_on(command, "budget.density=0.7").refusal
    assert said == "run/recipe.json is missing; restore it or choose another --out"
    assert contents(finished) == before
    shutil.rmtree(finished / "attack" / "dense")
    for name in ("dense", "pruned", "finetuned"):
        (finished / f"{name}.safetensors").unlink()
    assert go_on(command).refusal == said  # for what was attacked is there


def test_a_network_says_what_it_was_made_from(finished):
    digests = {}
    for name, before in (("dense", None), ("pruned", "dense"), ("finetuned", "pruned")):
        tensors, values = checkpoint.load(finished / f"{name}.safetensors")
        digests[name] = checkpoint.digest(tensors)
        assert values.get("origin") == digests.get(before)
    assert json.loads((finished / "audit.json").read_text()) == values["audit"]
