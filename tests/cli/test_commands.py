# SPDX-License-Identifier: Apache-2.0
"""The commands as a user gives them: help, results on the two streams, repeating, interrupting."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import harprune
from harprune import outcomes
from harprune.kernels import native
from harprune.models import create_model
from harprune.recipe.schema import Recipe
from harprune.recipe.text import make_recipe, read_recipe
from harprune.reporting.records import read_run
from harprune.robustness import evaluation
from harprune.run.lock import lock
from harprune.training import checkpoint
from harprune.training.data import load_dataset
from harprune.training.splits import to_float
from tests.tiny import contents

COMMANDS = ("run", "prune", "evaluate", "export", "report", "data", "recipe", "doctor")


def test_help_names_every_command_and_an_example(command):
    said = command("--help")
    assert said.code == 0 and said.err == ""
    assert all(re.search(rf"│ {name} +[A-Z]", said.out) for name in COMMANDS)
    assert "harprune run recipes/digits.toml --out runs/digits" in said.out
    assert command() == said


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help(command, name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    said = command(name, "--help")
    assert said.code == 0 and said.err == ""
    options = [line for line in said.out.splitlines() if re.match(r"│ [* ]*--", line)]
    assert options
    for line in options:
        text = re.split(r"<[^>]*>|SECTION\.KEY=VALUE", line)[-1].strip(" │")
        assert re.match(r"[A-Z$a-z].{8,}", text), line


def test_help_fills_its_lines(command, monkeypatch):
    """Wherever a line of a paragraph ends, the next word had no room."""
    monkeypatch.setenv("COLUMNS", "80")
    for name in (["compare"], ["export"], ["prune"], ["report"], ["bench", "deploy"]):
        text = command(*name, "--help").out.partition("╭")[0].partition("]")[2]
        for paragraph in re.split(r"\n *\n", text)[1:]:
            lines = [line.strip() for line in paragraph.strip().splitlines()]
            for line, following in pairwise(lines):
                assert len(line) + 1 + len(following.split()[0]) > 78, (name, line)


def test_torchs_idle_threads_leave_their_cores():
    asked = "import os, harprune.cli.main; print(os.environ['OMP_WAIT_POLICY'])"
    for given, wanted in ((None, "passive"), ("active", "active")):
        environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
        environment |= {"OMP_WAIT_POLICY": given} if given else {}
        done = subprocess.run(
            [sys.executable, "-c", asked], capture_output=True, text=True, env=environment
        )
        assert done.stdout.strip() == wanted


def test_help_needs_no_torch():
    code = (
        "import sys; sys.argv = ['harprune', 'run', '--help']\n"
        "from harprune.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_printed_recipe_is_a_recipe(command, here):
    said = command("recipe")
    assert said.code == 0 and said.err == ""
    Path("full.toml").write_text(said.out)
    assert read_recipe("full.toml") == Recipe()


def test_doctor_says_what_is_there(command, monkeypatch, tmp_path):
    monkeypatch.setenv("HARPRUNE_DATA", str(tmp_path / "images"))
    said, plain = command("doctor", "--json"), command("doctor")
    findings = json.loads(said.out)
    assert said.err == plain.err == ""
    assert findings["data"].startswith(f"{tmp_path / 'images'} (not there yet")
    assert "small_cnn" in findings["models"]
    assert [line.split("  ")[0] for line in plain.out.splitlines()] == list(findings)


@pytest.mark.parametrize(("name", "low"), [("avx512_bf16", True), ("avx2", False)])
def test_doctor_names_the_kernels_that_run(command, monkeypatch, name, low):
    kernels = native.named(name)
    if kernels is None:
        pytest.skip(f"this machine or this build has no {name}")
    monkeypatch.setattr(native, "best", lambda: kernels)
    line = json.loads(command("doctor", "--json").out)["kernels"]
    assert line.startswith(name) and ("bf16 in weight gradients" in line) == low


def _foreign_library():
    raise OSError("wrong ELF class")


@pytest.mark.parametrize(
    ("best", "reason"),
    [(lambda: None, "not built; "), (_foreign_library, "cannot be loaded (wrong ELF class); ")],
)
def test_doctor_says_what_is_slower_without_kernels(command, monkeypatch, best, reason):
    monkeypatch.setattr(native, "best", best)
    line = json.loads(command("doctor", "--json").out)["kernels"]
    assert line.startswith(reason) and "attacks on pruned networks and their finetuning" in line
    assert "install a C compiler" in line and "reinstall harprune" in line


def test_data_says_what_is_in_a_set(command):
    said = command("data", "digits")
    assert (said.code, said.err) == (0, "")
    expected = "digits: 1437 training and 360 test images of shape (1, 8, 8), 10 classes\n"
    assert said.out == expected


def test_a_run_prints_json_alone_and_can_be_repeated(command, here):
    first = command("run", "tiny.toml", "--out", "run", "--json")
    assert first.code == 0
    assert json.loads(first.out)["missing"] == []
    assert Path("run/recipe.toml").read_text() == Path("tiny.toml").read_text()
    other = ("--out", "b", "--until", "pretrain", "--set", "seed=7")
    assert command("run", "tiny.toml", *other).code == 0
    assert read_recipe("b/recipe.toml") == read_recipe("tiny.toml", ["seed=7"])
    before = contents(here / "run")
    again = command("run", "tiny.toml", "--out", "run", "--json")
    assert again.code == 0 and again.out == first.out
    assert contents(here / "run") == before
    assert "finetune 1/2" in first.err and "finetune 1/2" not in again.err
    assert {p.stat().st_mode & 0o777 for p in (here / "run").glob("*.safetensors")} == {0o644}


def test_until_stops_after_the_stage_and_the_rest_follows(command, here, finished):
    said = command("run", "tiny.toml", "--out", "other", "--until", "pretrain", "--json")
    assert said.code == 0 and json.loads(said.out) == {}
    assert read_run("other").finished == {"pretrain"}
    assert command("run", "tiny.toml", "--out", "other").code == 0
    for name in ("dense", "pruned", "finetuned"):
        ours, values = checkpoint.load(here / "other" / f"{name}.safetensors")
        theirs, others = checkpoint.load(finished / f"{name}.safetensors")
        assert values == others and ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    ours, theirs = contents(here / "other"), contents(finished)
    same = [n for n in ours if n.startswith("attack/") or n in ("audit.json", "metrics.jsonl")]
    assert len(same) == 6
    assert all(ours[name] == theirs[name] for name in same)


def test_reports_of_finished_runs(command, finished):
    said = command("report", finished, "--json")
    assert said.code == 0 and said.err == ""
    assert list(json.loads(said.out)) == [str(finished)]
    plain = command("report", finished)
    assert plain.out == f"{finished / 'report' / 'report.html'}\n"


def test_a_comparison_touches_no_run(command, finished):
    shutil.rmtree(finished / "report")
    before = contents(finished)
    said = command("report", finished, "--out", "table.md", "--title", "Mine")
    assert said.out == "table.md\n" and contents(finished) == before
    said = command("report", finished, "--out", "table.md", "--title", "Mine", "--json")
    assert json.loads(said.out)["title"] == "Mine" and "# Mine" in Path("table.md").read_text()


@pytest.mark.parametrize("name", ["recipe.md", "report/report.md", "new/deep.md"])
def test_a_comparison_is_written_in_no_run_folder(command, finished, name):
    before = contents(finished)
    said = command("report", finished, "--out", finished / name).refusal
    assert said == f"{finished / name} lies in the run folder {finished}; name a file elsewhere"
    assert contents(finished) == before


@pytest.mark.parametrize("name", ["mine.json", "mine.svg", "mine-strategies.svg"])
def test_a_comparison_replaces_only_a_comparison(command, finished, name):
    beside = finished.with_name(name)
    beside.write_text('{"rows": 1}')
    said = command("report", finished, "--out", "mine.md").refusal
    assert said.startswith(f"{name} would be written beside mine.md, but it is there and of no")
    assert beside.read_text() == '{"rows": 1}' and not Path("mine.md").exists()
    beside.unlink()
    for _ in range(2):
        assert command("report", finished, "--out", "mine.md").code == 0


def test_files_beside_runs_are_passed_over(command, finished):
    beside = finished.with_name("run.log")
    beside.touch()
    said = command("report", beside, finished)
    assert said.out == f"{finished / 'report' / 'report.html'}\n"
    assert command("report", beside).refusal == f"{beside} is a file; name run folders"


def test_a_folder_of_runs_says_how_to_name_them(command, finished):
    place = finished.parent
    said = command("report", place).refusal
    assert said == f"{place} is no run folder but holds 1 of them; name those: {place}/*"


def test_a_report_says_how_far_an_unfinished_run_is(command, finished):
    for name in ("finetuned.safetensors", "pruned.safetensors", "attack/dense/evaluation.json"):
        (finished / name).unlink()
    lines = (finished / "metrics.jsonl").read_text().splitlines()
    (finished / "metrics.jsonl").write_text("\n".join(lines[:3]))
    page, state = command("report", finished).out.splitlines()
    assert page == str(finished / "report" / "report.html")
    assert (
        state
        == f"{finished} is not finished; to come: prune (epochs done: 1), finetune, attack/dense"
    )


def test_evaluate_resumes_and_refuses_another_model(command, finished):
    def evaluate(weights: str, *more: object):
        return command(
            "evaluate", "--model", "small_cnn", "--set", "model.width=4", "--weights",
            finished / weights, "--data", "stripes_of_tests:load", "--attack", "pgd-10", *more,
        )  # fmt: skip

    first = evaluate("finetuned.safetensors", "--out", "e", "--json")
    record = json.loads(first.out)
    assert first.code == 0 and first.err == ""
    assert record["size"] == 24 and list(record["attacks"]) == ["pgd-10"]
    before = contents(Path("e"))
    assert evaluate("finetuned.safetensors", "--out", "e", "--json").out == first.out
    assert contents(Path("e")) == before
    refusal = evaluate("dense.safetensors", "--out", "e").refusal
    assert refusal.startswith("e holds an evaluation whose model differs")
    assert contents(Path("e")) == before
    Path("e/.outcomes.npz.abcdefgh").write_text("half")  # by an evaluation that was killed
    assert evaluate("finetuned.safetensors", "--out", "e").code == 0
    assert contents(Path("e")) == before
    with lock(Path("e")):
        occupied = evaluate("finetuned.safetensors", "--out", "e").refusal
    assert occupied.startswith(f"e is in use by process {os.getpid()}")
    lines = evaluate("finetuned.safetensors").out.splitlines()
    assert lines[0].startswith("clean ") and lines[1].startswith("pgd-10 ")


def test_weights_with_a_normalisation_of_their_own(command, here):
    """Evaluated and exported as the network with the normalisation written out by hand."""

    class ByHand(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.tensor([0.3]))
            self.register_buffer("std", torch.tensor([0.2]))
            self.model = create_model("small_cnn", 4, in_channels=1, width=4)

        def forward(self, x):
            return self.model((x - self.mean[:, None, None]) / self.std[:, None, None])

    by_hand = ByHand().eval()
    torch.save(by_hand.state_dict(), "w.pt")
    network = ("--model", "small_cnn", "--data", "stripes_of_tests:load", "--set", "model.width=4")
    evaluate = ("evaluate", *network, "--weights", "w.pt", "--attack", "fgsm", "--json")
    refusal = command(*evaluate).refusal
    assert "its own normalisation (mean = [0.3], std = [0.2]); create" in refusal
    said = ("--set", "model.mean=[0.3]", "--set", "model.std=[0.2]")
    record = json.loads(command(*evaluate, *said).out)
    test = load_dataset("stripes_of_tests:load").test
    expected = harprune.evaluate(by_hand, test, attacks=["fgsm"], quiet=True)
    assert record["clean"]["accuracy"] == expected.clean.accuracy
    assert record["attacks"]["fgsm"]["accuracy"] == expected.attacks["fgsm"].accuracy
    assert command("export", "w.pt", *network, *said, "--out", "w.hpn").code == 0
    x = to_float(test.images)
    logits = torch.from_numpy(harprune.deploy.load("w.hpn")(x.numpy()))
    assert torch.allclose(logits, by_hand(x), atol=1e-5)


def test_evaluate_a_run_as_its_own_attack_stage_did(command, finished):
    kept = finished / "attack" / "finetuned"
    again = command("evaluate", finished, "--against", kept)
    assert again.code == 0
    assert again.out.splitlines()[-1] == f"pgd-2: 0 of 16 images differ from {kept}"
    dense = json.loads(command("evaluate", finished / "dense.safetensors", "--json").out)
    record = json.loads((finished / "attack" / "dense" / "evaluation.json").read_text())
    assert dense["attacks"] == record["attacks"] and dense["threat"] == record["threat"]


def test_evaluate_a_run_otherwise_where_something_is_said(command, finished):
    said = command(
        "evaluate", finished, "--attack", "fgsm", "--size", 12, "--epsilon", 0.01, "--json"
    )
    record = json.loads(said.out)
    assert list(record["attacks"]) == ["fgsm"] and record["size"] == 12
    assert record["threat"] == "Linf(epsilon=0.01)"
    plain = ("evaluate", finished, "--attack", "fgsm", "--size", 12, "--epsilon", 0.01)
    assert command(*plain).out.splitlines()[-1] == "attacked under Linf(epsilon=0.01)"


def test_evaluate_takes_a_run_or_a_network_and_images(command, finished):
    network, images = ("--model", "small_cnn"), ("--data", "digits")
    for given in ((), network, images, (finished, *network), (finished, *network, *images)):
        refusal = command("evaluate", *given).refusal
        assert refusal.startswith("name either a run folder, or a network by --model")
    weights = command("evaluate", finished, "--weights", "w.pt").refusal
    assert weights == f"--weights w.pt beside {finished}, whose weights are its own"
    assert "neither a run folder" in command("evaluate", finished.parent).refusal


def test_a_run_that_began_with_scores_is_evaluated_by_its_own_weights(command, finished):
    path = finished / "recipe.json"
    recipe = json.loads(path.read_text())
    recipe["model"] |= {"weights": "scores.pt", "weights_density": 0.1}
    path.write_text(json.dumps(recipe))
    kept = finished / "attack" / "finetuned"
    again = command("evaluate", finished, "--attack", "none", "--out", "clean", "--json")
    assert (
        json.loads(again.out)["clean"]
        == json.loads((kept / "evaluation.json").read_text())["clean"]
    )
    exported = command("export", finished, "--out", "mine.hpn")
    assert exported.code == 0 and Path("mine.hpn").exists()
    network = ("--model", "small_cnn", "--weights", "mine.hpn", "--data", "digits")
    assert "is an exported network, not the weights" in command("evaluate", *network).refusal


def test_evaluate_against_what_was_kept_before(command, finished):
    def evaluate(weights: str, *more: object):
        return command(
            "evaluate", "--model", "small_cnn", "--set", "model.width=4", "--weights",
            finished / weights, "--data", "stripes_of_tests:load", *more,
        )  # fmt: skip

    assert evaluate("finetuned.safetensors", "--attack", "fgsm", "--out", "e").code == 0
    same = evaluate("finetuned.safetensors", "--attack", "fgsm", "--against", "e")
    assert same.code == 0
    assert same.out.splitlines()[-1] == "fgsm: 0 of 24 images differ from e"
    folder, right = Path("e"), json.loads(Path("e/evaluation.json").read_text())
    with np.load(folder / "outcomes.npz") as held:
        arrays = dict(held)
    fgsm = arrays["fgsm"]
    swapped = [fgsm.argmax(), fgsm.argmin()]  # as many are right, but not the same
    fgsm[swapped] = ~fgsm[swapped]
    np.savez(folder / "outcomes.npz", **arrays)
    other = evaluate("finetuned.safetensors", "--attack", "fgsm", "--against", "e", "--json")
    assert other.code == 1
    assert json.loads(other.out)["differing"] == {"clean": 0, "fgsm": 2}
    assert json.loads(other.out)["clean"] == right["clean"]
    attacks = evaluate("finetuned.safetensors", "--attack", "pgd-2", "--against", "e").refusal
    assert attacks.startswith("e holds outcomes under fgsm, not under pgd-2")
    unattacked = evaluate("finetuned.safetensors", "--attack", "none", "--against", "e").refusal
    assert unattacked.startswith("e holds outcomes under fgsm, not under none")
    fewer = evaluate("finetuned.safetensors", "--attack", "fgsm", "--against", "e", "--size", 12)
    assert "evaluate both on the same subset" in fewer.refusal
    itself = evaluate("finetuned.safetensors", "--out", "e", "--against", "./e").refusal
    assert "--against and --out both name e" in itself
    absent = evaluate("finetuned.safetensors", "--attack", "fgsm", "--against", "nowhere")
    assert absent.refusal.startswith("nowhere holds no finished evaluation")


def test_evaluate_against_something_else_is_refused_before_attacks(command, finished, monkeypatch):
    def evaluate(*more: object, attack: str = "fgsm", data: str = "stripes_of_tests:load"):
        return command(
            "evaluate", "--model", "small_cnn", "--set", "model.width=4", "--weights",
            finished / "finetuned.safetensors", "--data", data, "--attack", attack, *more,
        )  # fmt: skip

    assert evaluate("--out", "e", "--epsilon", 0.1).code == 0
    assert evaluate("--out", "clean", attack="none").code == 0
    other = ("--epsilon", 0.1, "--seed", 1)
    assert evaluate("--against", "clean", *other, attack="none").code == 0

    def attacked(*_, **__):
        raise AssertionError("images were attacked")

    monkeypatch.setattr(evaluation, "evaluate", attacked)
    against = ("--against", "e", "--epsilon", 0.1)
    radius = evaluate(*against, "--epsilon", 0.2).refusal
    assert radius == (
        "e holds outcomes under Linf(epsilon=0.1), not under Linf(epsilon=0.2); give both the same "
        "norm and epsilon"
    )
    assert "not under L2(epsilon=0.1)" in evaluate(*against, "--norm", "l2").refusal
    seed = evaluate(*against, "--seed", 1).refusal
    assert seed == "e holds outcomes with seed 0, not 1; evaluate with the same seed"
    names = evaluate(*against, attack="pgd-2").refusal
    assert names.startswith("e holds outcomes under fgsm, not under pgd-2")
    fewer = evaluate(*against, "--size", 12).refusal
    assert fewer.startswith("e (24 images) and this evaluation (12 images) differ in index")
    data = evaluate(*against, data="stripes_of_tests:relabelled").refusal
    assert data.startswith("e (24 images) and this evaluation (24 images) differ in labels")
    with pytest.raises(AssertionError, match="images were attacked"):
        evaluate(*against)


def test_evaluate_says_where_there_are_fewer_images(command, finished):
    said = command("evaluate", finished, "--attack", "none", "--size", 1000)
    assert "attacked" not in said.out
    assert said.code == 0 and said.out.startswith("clean ") and " of 24" in said.out
    assert "note: there are 24 test images, not 1000; all are taken" in said.err.splitlines()
    assert "note" not in command("evaluate", finished, "--attack", "none", "--size", 24).err


def test_evaluate_prints_its_result_before_it_compares(command, finished, monkeypatch):
    def unlike(*_):
        raise ValueError("unlike")

    given = (
        "evaluate", "--model", "small_cnn", "--set", "model.width=4", "--weights",
        finished / "finetuned.safetensors", "--data", "stripes_of_tests:load", "--attack", "none",
    )  # fmt: skip
    assert command(*given, "--out", "e").code == 0
    monkeypatch.setattr(outcomes, "differing", unlike)
    said = command(*given, "--against", "e")
    assert said.last_line == "unlike" and said.out.startswith("clean ")


def test_evaluate_clean_images_alone(command, finished):
    def evaluate(*more: object):
        return command(
            "evaluate", "--model", "small_cnn", "--set", "model.width=4", "--weights",
            finished / "finetuned.safetensors", "--data", "stripes_of_tests:load",
            "--attack", "none", *more,
        )  # fmt: skip

    said = evaluate("--out", "clean")
    assert said.code == 0 and said.out.startswith("clean ")
    assert json.loads(Path("clean/evaluation.json").read_text())["attacks"] == {}
    again = evaluate("--against", "clean")
    assert again.code == 0
    assert again.out.splitlines()[-1] == "clean: 0 of 24 images differ from clean"
    assert "'none'" in evaluate("--attack", "fgsm").refusal


def test_evaluate_attacks_the_plain_model_where_the_recipe_says_so(command, finished, monkeypatch):
    def function_that_is_attacked(*more: object):
        said = command(
            "evaluate", "--model", "small_cnn", "--set", "model.width=4", "--weights",
            finished / "finetuned.safetensors", "--data", "stripes_of_tests:load",
            "--attack", "fgsm", *more,
        )  # fmt: skip
        assert said.code == 0, said.err
        return attacked.pop()

    attacked, whole = [], evaluation.evaluate

    def seen(*arguments, twin, **options):
        attacked.append(twin)
        return whole(*arguments, twin=twin, **options)

    monkeypatch.setattr(evaluation, "evaluate", seen)
    assert function_that_is_attacked() is not None
    assert function_that_is_attacked("--set", "execution.twin=false") is None


def test_device_and_execution_are_the_recipes(command, here):
    Path("d.toml").write_text("pretrain.epochs = 0\n")
    given = ("--until", "pretrain", "--execution", "dense", "--device", "cpu")
    assert command("run", "d.toml", "--out", "d", *given).code == 0
    held = json.loads(Path("d/recipe.json").read_text())["execution"]
    assert (held["backend"], held["device"]) == ("dense", "cpu")
    if not torch.cuda.is_available():
        refused = command("run", "d.toml", "--out", "g", "--device", "cuda").refusal
        assert "torch sees no GPU" in refused


def test_evaluate_on_digits(command, here):
    Path("d.toml").write_text("validation.size = 20\npretrain.epochs = 0\nmodel.width = 4\n")
    assert command("run", "d.toml", "--out", "d", "--until", "pretrain").code == 0
    said = command(
        "evaluate", "--model", "small_cnn", "--set", "model.width=4", "--data", "digits",
        "--weights", "d/dense.safetensors", "--attack", "pgd-10", "--size", 40,
    )  # fmt: skip
    assert said.code == 0 and re.search(r"pgd-10 [0-9.]+ % \[.*\] of 40", said.out)


def test_prune_takes_given_weights_and_leaves_a_recipe(command, finished):
    sets = ["model.width=4", "prune.batch_size=20", "finetune.batch_size=20", "objective.steps=1",
            "attack.attacks=['fgsm']", "validation.steps=1", "data.validation=12"]  # fmt: skip
    said = command(
        "prune", "--model", "small_cnn", "--weights", finished / "dense.safetensors",
        "--data", "stripes_of_tests:load", "--density", 0.1, "--out", "pruned", "--method", "hydra",
        "--prune-epochs", 1, "--finetune-epochs", 1, "--json",
        *[part for value in sets for part in ("--set", value)],
    )  # fmt: skip
    assert said.code == 0, said.err
    audit = json.loads(Path("pruned/audit.json").read_text())
    assert audit["kept"] == audit["budget"] == audit["total"] // 10
    assert json.loads(said.out)["method"] == "hydra"
    resolved = make_recipe(json.loads(Path("pruned/recipe.json").read_text()))
    assert read_recipe("pruned/recipe.toml") == resolved
    assert tomllib.loads(Path("pruned/recipe.toml").read_text())["prune"]["epochs"] == 1


def test_an_interrupted_run_says_how_to_go_on_and_goes_on(command, here, finished):
    # Started in the background of a shell, a process would ignore the signal.
    heeding = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = [sys.executable, "-c", f"{heeding}; from harprune.cli.main import main; main()"]
    arguments = ["run", "tiny.toml", "--out", "long", "--set", "pretrain.epochs=5000"]
    with subprocess.Popen([*program, *arguments], stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("pretrain 2/"):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read().splitlines()
    assert process.returncode == 130
    assert rest[-1] == "harprune: interrupted; give the same command again to go on"
    assert not any("Traceback" in line for line in rest)
    assert not list(Path("long").glob(".pretrain*"))
    said = command("run", "tiny.toml", "--out", "long")
    assert "pretrain.epochs: 5000 -> 2" in said.refusal


def test_termination_anywhere_ends_with_143(command, here, monkeypatch):
    def terminated(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("harprune.run.stages.prune", terminated)
    before = signal.getsignal(signal.SIGTERM)
    said = command("run", "tiny.toml", "--out", "run")
    assert said.code == 143
    assert said.err.endswith("harprune: ended by SIGTERM; give the same command again to go on\n")
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interrupt_anywhere_ends_with_130(command, here, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("harprune.run.stages.prune", interrupted)
    said = command("run", "tiny.toml", "--out", "run")
    assert said.code == 130
    assert said.err.endswith("harprune: interrupted; give the same command again to go on\n")
