# SPDX-License-Identifier: Apache-2.0
"""Files for public leaderboards: their form, and the rules that keep a run out."""

import json
import re

import pytest
import torch

from harprune.delivery.leaderboards import Paper, write_entries
from harprune.models import create_model, load_weights
from harprune.training import checkpoint
from tests.reporting.conftest import write_run

PAPER = Paper("HARP", "Zhao2023Holistic", "Holistic", "Qi Zhao", "https://a.paper", "ICLR 2023")


@torch.no_grad()
def prune(model, structure, density, *, dense=()):
    """Keeps the first filters or channels of each layer, or the first weights of each filter."""
    for name, weight in model.named_parameters():
        if weight.dim() > (2 if structure == "filter" else 1) and name not in dense:
            axis = 0 if structure == "filter" else 1
            units = (weight.flatten(1) if structure == "weight" else weight).transpose(0, axis)
            units[int(density * len(units)) :] = 0.0


@pytest.fixture
def eligible(tmp_path):
    """A run as both boards take it, and what may be changed in its records."""

    def make(name="run", *, size=10_000, recipe=(), evaluation=(), **choices):
        folder = write_run(tmp_path / name, density=0.01, size=size, **choices)
        path = folder / "recipe.json"
        content = json.loads(path.read_text())
        content |= {"data": {"name": "cifar10"}, "model": {"name": "resnet18"}, **dict(recipe)}
        path.write_text(json.dumps(content))
        path = folder / "attack" / "finetuned" / "evaluation.json"
        content = json.loads(path.read_text())
        content["threat"] = "Linf(epsilon=0.03137254901960784)"
        for attack in content["attacks"].values():
            attack["attack"] = "AutoAttack(version='standard', seed=0)"
        content |= dict(evaluation)
        path.write_text(json.dumps(content))
        model = create_model("resnet18", 10)
        prune(model, "weight", 0.01)
        tensors = checkpoint.pack("model", model.state_dict())
        checkpoint.save(folder / "finetuned.safetensors", tensors, {})
        return folder, content, model

    return make


def test_both_boards_take_a_run_that_keeps_their_rules(eligible, tmp_path):
    folder, evaluation, model = eligible()
    found = write_entries(folder, tmp_path / "out", PAPER)
    key = "HARP_Zhao2023Holistic_R18_CIFAR10_US_99"
    record = tmp_path / "out" / "model_info" / "cifar10" / "Linf" / "Zhao2023Holistic.json"
    assert found == {
        "RobustBench": str(record),
        "pruning benchmark": str(tmp_path / "out" / f"{key}.md"),
    }
    content = json.loads(record.read_text())
    clean = f"{100 * evaluation['clean']['accuracy']:.2f}"
    robust = f"{100 * evaluation['attacks']['autoattack']['accuracy']:.2f}"
    assert content["clean_acc"] == clean and content["autoattack_acc"] == robust
    assert content["eps"] == "8/255" and content["architecture"] == "resnet18"
    assert content["additional_data"] is False and content["number_forward_passes"] == 1
    form = (tmp_path / "out" / f"{key}.md").read_text()
    assert f"_Clean Accuracy:_ {clean}" in form and f"_Robust Accuracy (AA):_ {robust}" in form
    assert "10,000 test images" in form and "Images are not normalised." in form
    again = create_model("resnet18", 10)
    load_weights(again, tmp_path / "out" / f"{key}.pt")
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())


def test_names_are_those_of_the_base_networks(eligible, tmp_path):
    """As kuangliu's pytorch-cifar calls them, from which the benchmark's base networks come."""
    write_entries(eligible()[0], tmp_path / "out", PAPER)
    path = tmp_path / "out" / "HARP_Zhao2023Holistic_R18_CIFAR10_US_99.pt"
    names = set(torch.load(path, weights_only=True)["state_dict"])
    blocks = [(stage, block) for stage in (1, 2, 3, 4) for block in (0, 1)]
    wanted = {"conv1.weight", "linear.weight", "linear.bias"}
    wanted |= {f"layer{s}.{b}.conv{n}.weight" for s, b in blocks for n in (1, 2)}
    wanted |= {f"layer{s}.0.shortcut.0.weight" for s in (2, 3, 4)}
    norms = ["bn1", *(f"layer{s}.{b}.bn{n}" for s, b in blocks for n in (1, 2))]
    norms += [f"layer{s}.0.shortcut.1" for s in (2, 3, 4)]
    kinds = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert names == wanted | {f"{norm}.{kind}" for norm in norms for kind in kinds}


RULES = {
    "fewer images": ({"size": 1000}, "1,000 test images were attacked and 10,000 are asked for"),
    "no autoattack": ({"attacks": ("pgd-20",)}, "was not measured by autoattack"),
    "a flag": ({"flags": ("zero gradients",)}, "the evaluation is in doubt (zero gradients)"),
    "a failing check": ({"failing": ("gradients",)}, "in doubt (gradients)"),
    "no finetuning": ({"until": "prune"}, "is not finished (finetune, attack/dense"),
    "other data": ({"recipe": {"data": {"name": "digits"}}}, "it ranks cifar10 and cifar100"),
}


@pytest.mark.parametrize("rule", RULES)
def test_what_breaks_the_rules_of_both_is_refused_in_one_line(rule, eligible, tmp_path):
    choices, said = RULES[rule]
    if rule == "no finetuning":
        folder = write_run(tmp_path / "run", **choices)
    else:
        folder, *_ = eligible(**choices)
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        write_entries(folder, tmp_path / "out", PAPER)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "recipe, said",
    [
        ({"model": {"name": "resnet18", "width": 16}}, "resnet18 of another width; it ranks"),
        ({"model": {"name": "small_cnn"}}, "the network is small_cnn; it ranks resnet18"),
        ({"budget": {"density": 0.01, "cost": "multiply-adds"}}, "the budget counts multiply-adds"),
        ({"budget": {"density": 0.02}}, "the sparsity is 98 %; of weights it ranks 90, 95, 99"),
        ({"data": {"name": "cifar100"}}, "the data set is cifar100"),
    ],
)
def test_one_board_may_take_what_the_other_refuses(recipe, said, eligible, tmp_path):
    folder, *_ = eligible(recipe=recipe)
    found = write_entries(folder, tmp_path / "out", PAPER)
    assert said in found["pruning benchmark"] and found["RobustBench"].endswith("Holistic.json")
    assert not list((tmp_path / "out").glob("*.pt"))


@pytest.mark.parametrize(
    ("structure", "density"), [("weight", 0.1), ("filter", 0.5), ("channel", 0.5)]
)
def test_the_network_written_must_be_as_sparse_as_its_key(structure, density, eligible, tmp_path):
    """The budget may have left a layer out, and zeros within a filter prune no filter."""

    def verdict(name):
        tensors = checkpoint.pack("model", model.state_dict())
        checkpoint.save(folder / "finetuned.safetensors", tensors, {})
        return write_entries(folder, tmp_path / name, PAPER)["pruning benchmark"]

    budget = {"density": density, "granularity": structure, "exclude": ["layer4.0.conv1"]}
    folder, *_ = eligible(recipe={"budget": budget})
    model = create_model("resnet18", 10)
    prune(model, structure, density, dense=("layer4.0.conv1.weight",))
    assert f"weights are kept{'' if structure == 'weight' else f' in {structure}s'}" in verdict("a")
    prune(model, structure, density)
    assert verdict("b").endswith(f"S_{100 * (1 - density):g}.md")
    scattered = create_model("resnet18", 10)
    prune(scattered, "weight", 0.1)
    model.load_state_dict(scattered.state_dict())
    assert ("more than" in verdict("c")) is (structure == "filter")


def test_another_threat_is_for_the_pruning_benchmark_alone(eligible, tmp_path):
    folder, *_ = eligible(evaluation={"threat": "Linf(epsilon=0.031)"})
    found = write_entries(folder, tmp_path / "out", PAPER)
    assert "the threat is Linf(epsilon=0.031); it ranks Linf" in found["RobustBench"]
    assert found["pruning benchmark"].endswith("US_99.md")


def test_another_norm_is_for_robustbench_alone(eligible, tmp_path):
    folder, *_ = eligible(evaluation={"threat": "L2(epsilon=0.5)"})
    found = write_entries(folder, tmp_path / "out", PAPER)
    assert found["RobustBench"].endswith("L2/Zhao2023Holistic.json")
    assert "the threat is L2(epsilon=0.5); it ranks Linf" in found["pruning benchmark"]
