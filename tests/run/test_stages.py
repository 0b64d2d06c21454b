# SPDX-License-Identifier: Apache-2.0
"""What training stages leave behind and learn from: averages, and the dense network's answers."""

import json

import pytest
import torch
from torch import nn

from harprune.recipe.text import read_recipe
from harprune.reporting.records import STAGES, read_run
from harprune.robustness.threat import Linf
from harprune.run import learning, stages
from harprune.run.console import roughly
from harprune.run.evaluate import expected_passes
from harprune.run.opening import load_network, open_run
from harprune.run.stages import run_until
from harprune.sparsity.audit import audit
from harprune.sparsity.layers import prunable_layers
from harprune.training import checkpoint
from harprune.training.splits import to_float


def state(folder, *settings, last="finetune"):
    """Tensors and values of the last stage of a run of the tiny recipe with `settings`."""
    with open_run(read_recipe("tiny.toml", settings), folder) as run:
        run_until(run, last)
        return checkpoint.load(run.folder.network(last))


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_an_average_over_one_step_is_no_average(finished, here):
    """Decay 0 keeps each step's own weights: the same bits as without averaging."""
    one = ("pretrain.epochs=1",)  # nothing to select
    tensors, _ = state(here / "one", "pretrain.averaging=0.0", *one, last="pretrain")
    wanted, _ = state(here / "none", *one, last="pretrain")
    assert tensors.keys() == wanted.keys()
    learned = {n for n in wanted if "running" not in n and "num_batches" not in n}
    assert all(torch.equal(tensors[n], wanted[n]) for n in learned)


def test_the_average_is_what_is_validated_selected_and_kept(finished, here):
    averaged, values = state(here / "averaged", "pretrain.averaging=0.95", last="pretrain")
    plain, _ = checkpoint.load(finished / "dense.safetensors")
    assert averaged.keys() == plain.keys()  # a network like any other
    assert not same(averaged, plain)
    best = max(values["history"], key=lambda epoch: (epoch["robust"], epoch["clean"]))
    assert (values["clean"], values["robust"]) == (best["clean"], best["robust"])


def test_the_selected_epoch_of_each_stage_is_marked(finished, here):
    for stage, name in STAGES.items():
        epochs = [e for e in read_run(finished).epochs if e.stage == stage]
        (selected,) = [e for e in epochs if e.selected]
        assert (
            f"{stage}: epoch {selected.epoch + 1} of 2 selected"
            in (finished / "log.txt").read_text()
        )
        history = checkpoint.load(finished / f"{name}.safetensors")[1]["history"]
        assert history[selected.epoch]["selected"]


def test_the_accuracies_of_each_network_that_goes_on_are_kept(finished):
    for stage, name in STAGES.items():
        values = checkpoint.load(finished / f"{name}.safetensors")[1]
        left = read_run(finished).left[stage]
        assert (left.clean, left.robust) == (values["clean"], values["robust"])


def test_what_an_attack_will_take_is_said_where_it_is_long(finished, here, monkeypatch):
    settings = (f"model.weights={finished / 'dense.safetensors'}", "attack.dense_size=8")
    state(here / "short", *settings)
    assert "will take" not in (here / "short" / "log.txt").read_text()
    monkeypatch.setattr(stages, "_LONG", 0.0)
    state(here / "long", *settings)
    said = (here / "long" / "log.txt").read_text()
    dense, finetuned = [line for line in said.splitlines() if "will take about" in line]
    assert "attack on the dense network, 8 test images, will take about 0 minutes; " in dense
    assert "attack on the finetuned network, 16 test images, will take" in finetuned
    assert dense.endswith("; attack.dense_size can make it fewer")
    assert finetuned.endswith("; attack.size can make it fewer")


def test_attacks_go_against_what_is_right_and_the_parts_of_autoattack_against_what_stands():
    attacks = ("pgd-20", "autoattack")
    passes = expected_passes(attacks, Linf(8 / 255), clean=0.8, robust=0.5)
    assert passes == pytest.approx(0.8 * 20 + 0.5 * (1910 + 5000 / 3))


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(130, "2 minutes"), (7_000, "117 minutes"), (7_300, "2 hours"), (400_000, "5 days")],
)
def test_long_times_are_said_in_words(seconds, said):
    assert roughly(seconds) == said


def test_the_teacher_is_the_dense_network_in_eval_mode(finished, here):
    for settings in ((), ("execution.twin=false",), ("execution.attack_precision=bf16",)):
        with open_run(read_recipe("tiny.toml", settings), here / f"run{settings}") as run:
            stages.pretrain(run)
            x = torch.rand(7, 1, 8, 8)
            wanted = load_network(run, "pretrain").eval()(x)
            fixed = learning._fixed(run, load_network(run, "pretrain").eval())
            assert torch.allclose(fixed(x), wanted, atol=1e-5)


def test_distillation_changes_what_is_learned(finished, here):
    plain, _ = checkpoint.load(finished / "finetuned.safetensors")
    learned = [
        state(here / name, f"finetune.distillation.{name}={value}")[0]
        for name, value in (("weight", 0.1), ("temperature", 5.0))
    ]
    assert not any(same(*pair) for pair in zip(learned, [plain, learned[0]]))


def test_awp_changes_what_is_learned_and_counts_its_pass(finished, here):
    plain, values = checkpoint.load(finished / "finetuned.safetensors")
    for number, twin in enumerate(("true", "false")):
        settings = ("finetune.awp.radius=0.2", f"execution.twin={twin}")
        learned, perturbed = state(here / f"run{number}", *settings)
        assert not same(learned, plain)
        before, after = (v["history"][-1]["passes"] for v in (values, perturbed))
        assert before < after < 2 * before
        kept = checkpoint.unpack("mask", learned)
        network = checkpoint.unpack("model", learned)
        assert all(not network[name][~kept[name]].any() for name in kept)


def test_the_warm_up_of_awp_is_plain_finetuning(finished, here):
    plain, _ = checkpoint.load(finished / "finetuned.safetensors")
    warming, _ = state(here / "warm", "finetune.awp.warm_up=0.999")
    assert same(warming, plain)


def test_a_network_is_connected_if_any_image_reaches_its_logits(finished, here):
    """One validation image meets dead units alone: the run goes on."""
    with open_run(read_recipe("tiny.toml"), here / "run2") as run:
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1), nn.ReLU(), nn.Linear(1, 4))
        x = to_float(run.materials.validation.images).flatten(1)
        with torch.no_grad():
            model[1].weight.fill_(1.0)
            model[1].bias.copy_(-x.sum(1)[0] - 1e-3)  # dead for the first
            model[3].weight.fill_(1.0)
        assert (model[1](x) > 0).any() and not (model[1](x[:1]) > 0).any()
        stages._alarm(run, model, audit(prunable_layers(model)))
        with torch.no_grad():
            model[1].bias.fill_(-1e6)
        with pytest.raises(ValueError, match="layer collapse"):
            stages._alarm(run, model, audit(prunable_layers(model)))


def test_a_method_may_report_what_it_likes():
    assert learning._summary({"loss": 1.0, "density": 0.5}) == "loss 1.000, density 0.5000"
    assert learning._summary({"loss": 1.0, "gamma": 2.0}) == "loss 1.000, gamma 2"
    assert learning._summary({"loss": 1.0, "mine": [3]}) == "loss 1.000"


def said(here, folder, *settings, last="prune"):
    with open_run(read_recipe("tiny.toml", settings), here / folder) as run:
        stages.run_until(run, last)
    return (here / folder / "log.txt").read_text()


def test_densities_that_never_came_down_are_warned_of_where_they_are_learned(finished, here):
    warning = "densities learned have not come down"
    # One epoch without a penalty leaves HARP's where they began; ADMM is by design never within.
    assert warning in said(here, "a", "method.gamma=0.0", "pretrain.epochs=0")
    started = ("method.start_factor=1.0", "method.enforce_after=0", "pretrain.epochs=0")
    assert warning not in said(here, "b", *started)
    assert warning not in said(here, "c", "method.name=admm", "pretrain.epochs=0")


def test_weights_that_only_guess_are_warned_of_where_they_were_given(finished, here, monkeypatch):
    warning, given = "is what guessing gives", f"model.weights={finished / 'dense.safetensors'}"
    for accuracy, setting, warned in (
        (0.26, given, True),  # four classes
        (0.9, given, False),
        (0.26, "pretrain.epochs=0", False),
    ):
        monkeypatch.setattr(stages, "validate", lambda *_, clean=accuracy: (clean, 0.0))
        folder = f"{accuracy}{len(setting)}"
        assert (warning in said(here, folder, setting, last="pretrain")) is warned


def test_a_dense_network_that_may_know_the_validation_images_is_warned_of(finished, here):
    given = f"model.weights={finished / 'dense.safetensors'}"
    warning = "trained beside other validation images"
    assert warning not in said(here, "same", given, last="pretrain")
    assert warning in said(here, "other", given, "seed=1", last="pretrain")
    # What a run was given it hands on with the images that it was trained beside.
    on = f"model.weights={here / 'other' / 'dense.safetensors'}"
    assert warning in said(here, "next", on, "seed=1", last="pretrain")
    assert warning not in said(here, "back", on, last="pretrain")


def test_a_warning_is_kept_until_its_stage_is_made_again(finished, here):
    said(here, "a", "method.gamma=0.0", "pretrain.epochs=0")
    assert any("have not come down" in w for w in read_run(here / "a").warnings["prune"])
    (here / "a" / "pruned.safetensors").unlink()
    again = ("method.start_factor=1.0", "method.enforce_after=0", "pretrain.epochs=0")
    said(here, "a", *again)
    assert not any("come down" in w for w in read_run(here / "a").warnings.get("prune", ()))


def test_a_stage_that_goes_wrong_is_warned_of_once():
    def doubts(*losses: float, clean: float) -> list[list[str]]:
        history = [{"loss": loss, "clean": clean} for loss in losses]
        return [list(learning._doubts(history[: n + 1], 4, classes=4)) for n in range(4)]

    # Guessing among four classes costs 1.4.
    grown = doubts(0.1, 13.0, 14.0, 15.0, clean=0.9)
    assert grown == [[], [], ["the loss has grown from 0.1 to 14"], []]
    assert doubts(2.0, 13.0, 14.0, 15.0, clean=0.31) == [[], [], [], []]
    guessed = ["clean accuracy, 30.0 % at best, is still what guessing gives"]
    assert doubts(1.0, 1.0, 1.0, 1.0, clean=0.3) == [[], guessed, [], []]


def test_a_stage_that_learns_nothing_is_warned_of_in_the_log(finished, here, monkeypatch):
    monkeypatch.setattr(stages, "validate", lambda *_: (0.25, 0.0))
    assert "still what guessing gives; lower pretrain.learning_rate in a new run" in said(
        here, "a", last="pretrain"
    )


def test_logits_cut_off_from_the_image_are_warned_of(finished, here):
    warning = "the same for 12 images"
    settings = (
        "pretrain.epochs=0",
        "method.name=magnitude",
        "budget.granularity=filter",
        "budget.density=0.4",
        "budget.allocation=uniform",
    )
    cut_off = said(here, "a", *settings)
    assert warning in cut_off and "budget.exclude" in cut_off
    assert warning not in said(here, "b", *settings, "budget.exclude=['linear']")


@pytest.mark.parametrize("cost", ["parameters", "multiply-adds"])
@pytest.mark.parametrize("name", ["uniform", "erk", "lamp"])
def test_the_allocations_beside_an_audit_are_what_they_would_keep(here, cost, name):
    settings = ("pretrain.epochs=0", "prune.epochs=0", "method.name=magnitude")
    said(here, "run", *settings, f"budget.cost={cost}", f"budget.allocation={name}")
    audit = json.loads((here / "run" / "audit.json").read_text())
    kept = {layer: count["kept"] / count["total"] for layer, count in audit["layers"].items()}
    assert audit["allocations"][name] == kept
    assert audit["spent"] > 0.98 * audit["budget"]
