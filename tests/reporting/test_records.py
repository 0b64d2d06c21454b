# SPDX-License-Identifier: Apache-2.0
"""Reading run folders: what is there, what is not yet, and what is garbled."""

import json

import numpy as np
import pytest

from harprune.reporting.records import read_run


def test_a_finished_run_is_read_whole(make_run):
    folder = make_run(epochs=3, size=50)
    run = read_run(folder)
    assert run.missing == ()
    assert [(e.stage, e.epoch) for e in run.of_stage("prune")] == [("prune", k) for k in range(3)]
    assert len(run.epochs) == 9
    audit = json.loads((folder / "audit.json").read_text())
    assert run.audit.kept == audit["kept"]
    assert run.audit.layers["fc"].density == audit["layers"]["fc"]["kept"] / 640
    evaluation = json.loads((folder / "attack/dense/evaluation.json").read_text())
    read = run.attacked["dense"]
    assert read.attacks["autoattack"].correct == evaluation["attacks"]["autoattack"]["correct"]
    assert read.clean.interval == tuple(evaluation["clean"]["interval"])
    assert run.attacked["dense"].outcomes["index"].tolist() == list(range(50))


def test_what_a_stage_has_not_written_is_missing(make_run):
    run = read_run(make_run(until="pretrain"))
    assert run.missing == ("prune", "finetune", "attack/dense", "attack/finetuned")
    assert run.audit is None
    assert run.attacked == {}


def test_a_dense_attack_nobody_asked_for_is_not_missing(make_run):
    folder = make_run(until="finetune")
    recipe = json.loads((folder / "recipe.json").read_text())
    (folder / "recipe.json").write_text(json.dumps(recipe | {"attack": {"dense": False}}))
    assert read_run(folder).missing == ("attack/finetuned",)


def test_a_run_without_epochs_has_none(make_run):
    folder = make_run()
    (folder / "metrics.jsonl").unlink()
    assert read_run(folder).epochs == ()


def test_what_was_spent_on_scoring_counts_to_pruning(make_run):
    folder = make_run(epochs=2)
    spent = [read_run(folder).passes(stage) for stage in ("prune", "finetune")]
    (folder / "scoring.json").write_text('{"passes": 7}')
    assert [read_run(folder).passes(stage) for stage in ("prune", "finetune")] == [
        spent[0] + 7,
        spent[1],
    ]
    (folder / "metrics.jsonl").unlink()
    assert read_run(folder).passes("prune") == 7
    (folder / "scoring.json").write_text("{}")
    assert read_run(folder).passes("prune") == 0


def test_a_diverged_loss_is_read(make_run):
    folder = make_run(until="pretrain", epochs=1)
    line = json.loads((folder / "metrics.jsonl").read_text()) | {"loss": float("nan")}
    (folder / "metrics.jsonl").write_text(json.dumps(line))
    assert np.isnan(read_run(folder).epochs[0].loss)


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no run folder: it holds no recipe\.json"):
        read_run(tmp_path)


def swap(old: str, new: str):
    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    return change


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("recipe.json", lambda text: text[:-5], r"recipe\.json is garbled"),
        ("recipe.json", lambda text: "[1]", "should be an object"),
        ("environment.json", lambda text: "", r"environment\.json is garbled"),
        (
            "metrics.jsonl",
            lambda text: text + '{"stage": "pru',
            r"metrics\.jsonl line 13 is garbled",
        ),
        ("metrics.jsonl", swap('"clean": 0.525', '"clean": 52.5'), "line 1 .*clean: .* less than"),
        ("metrics.jsonl", swap('"loss": ', '"lost": '), "line 1 .*loss: Field required"),
        ("metrics.jsonl", swap('"pretrain"', '"train"'), "line 1 .*stage: "),
        ("metrics.jsonl", swap('"epoch": 0', '"epoch": "0"'), "line 1 .*epoch: .*integer"),
        ("audit.json", swap('"kept": ', '"kept": 1'), "kept .* but its layers sum to"),
        ("audit.json", lambda text: "\ufffd{", r"audit\.json is garbled"),
        ("warnings.json", swap("prune", "prone"), r"warnings\.json is garbled \(prone"),
        ("scoring.json", swap("passes", "passed"), r"scoring\.json is garbled \(passed"),
        ("validation.json", swap("0.5", "50"), r"validation\.json is garbled \(prune\.clean"),
        ("attack/dense/evaluation.json", swap('"correct": 1', '"correct": 2'), "is not correct"),
        ("attack/dense/evaluation.json", swap('"clean"', '"natural"'), "clean: Field required"),
    ],
)
def test_a_garbled_file_is_named_in_one_line(make_run, name, change, reason):
    folder = make_run()
    (folder / "warnings.json").write_text('{"prune": ["2 layers are thin"]}')
    (folder / "scoring.json").write_text('{"passes": 7}')
    (folder / "validation.json").write_text('{"prune": {"clean": 0.5, "robust": 0.2}}')
    path = folder / name
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=reason) as caught:
        read_run(folder)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    # No stage is repeated because a file beside its network is gone.
    way = {
        "recipe.json": "; restore it",
        "environment.json": "; restore it",
        "evaluation.json": "; restore it, or delete evaluation.json and repeat the command, which "
        "attacks anew",
    }.get(path.name, "repeat the command of its run, which makes it anew from the networks")
    assert str(caught.value).endswith(way)


def test_bytes_that_are_no_text_are_named(make_run):
    folder = make_run()
    (folder / "metrics.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 1 is garbled"):
        read_run(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda arrays: arrays.pop("labels"), "it lacks labels"),
        (lambda arrays: arrays.update(clean=arrays["clean"][:-1]), "differ in length"),
        (lambda arrays: arrays.update(clean=~arrays["clean"]), "correct under clean where"),
    ],
)
def test_outcomes_must_agree_with_the_evaluation(make_run, change, reason):
    path = make_run() / "attack/finetuned/outcomes.npz"
    arrays = dict(np.load(path))
    change(arrays)
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=reason):
        read_run(path.parents[2])


def test_outcomes_are_never_unpickled(make_run):
    path = make_run() / "attack/finetuned/outcomes.npz"
    np.savez(path, index=np.array([{}], dtype=object), labels=np.zeros(1))
    with pytest.raises(ValueError, match=r"outcomes\.npz is garbled .*allow_pickle"):
        read_run(path.parents[2])
    np.savez(path, index=np.zeros(1), labels=np.zeros(1))
    bent = bytearray(path.read_bytes())
    for start in (b"PK\x03\x04", b"PK\x01\x02"):
        at = bent.find(start) + (8 if start[2] == 3 else 10)
        bent[at] = 99  # no method of compression that there is
    path.write_bytes(bent)
    with pytest.raises(ValueError, match=r"outcomes\.npz is garbled .*compression"):
        read_run(path.parents[2])
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"outcomes\.npz is garbled"):
        read_run(path.parents[2])
