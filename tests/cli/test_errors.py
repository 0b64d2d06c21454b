# SPDX-License-Identifier: Apache-2.0
"""Bad input: one line that names the value, the rule and the way out; nothing on disk is harmed."""

import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import harprune
from harprune.deploy.network import require_words
from harprune.files import make_folder, replacing, require_writable, write
from harprune.models import create_model
from harprune.recipe import training
from harprune.recipe.networks import load_network_weights
from harprune.recipe.text import read_recipe
from harprune.reporting.records import read_run
from harprune.robustness.attacks import APGD, FGSM, PGD, Margin
from harprune.robustness.autoattack import AutoAttack
from harprune.run.folder import RunFolder
from harprune.training import checkpoint
from harprune.training.splits import as_split
from tests.tiny import contents

PROGRAM = [sys.executable, "-c", "from harprune.cli.main import main; main()"]


PRUNE = ["prune", "--model", "small_cnn", "--weights", "tiny.toml", "--data", "digits",
         "--density", 0.1, "--out", "new"]  # fmt: skip


def run_with(command, *settings: str, out: str = "new", until: str = "report"):
    sets = [part for setting in settings for part in ("--set", setting)]
    return command("run", "tiny.toml", "--out", out, "--until", until, *sets)


# --- the command line and the recipe: refused before a folder is made ----------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["runn"], "No such command 'runn'. Did you mean 'run', 'prune'?; see `harprune --help`"),
        (["run"], "Missing argument 'recipe'; see `harprune run --help`"),
        (["run", "tiny.toml"], "Missing option '--out' / '-o'; see `harprune run --help`"),
        (["run", "tiny.toml", "--out", "new", "--untill", "x"], "No such option: --untill"),
        (["run", "tiny.toml", "--out", "new", "--until", "prun"], "Invalid value for '--until': "
         "'prun' is not one of 'pretrain', 'prune', 'finetune', 'attack', 'report'; see "),
        (["run", "none.toml", "--out", "new"], "recipe none.toml cannot be read: [Errno 2] No s"),
        (["run", "stripes_of_tests.py", "--out", "new"], "recipe stripes_of_tests.py cannot be re"),
        (["data", "cifar11"], "unknown data set 'cifar11'; there are cifar10, cifar100, digits, "),
        (["data", "cifar10:load"], "data set 'cifar10:load': cannot import 'cifar10' from "),
        (["report", "none"], "none is no run folder: it holds no recipe.json; see `harprune run`"),
        (["report", ".", "--out", "x.md"], ". is no run folder"),
        (["report", ".", "--out", "x.txt"], "a comparison is written to a Markdown file, not to x"),
        (["prune", "--model", "small_cnn", "--weights", "w", "--data", "digits", "--density", "x",
          "--out", "new"], "Invalid value for '--density': "),
        (["prune", "--model", "small_cnn", "--weights", "w", "--data", "digits", "--density", "1",
          "--out", "new"], "harprune prune: budget.density = 1.0: must lie strictly between 0 and"),
        (["prune", "--model", "small_cnn", "--weights", "w", "--data", "digits", "--density",
          "0.1", "--out", "new"], "model.weights = 'w': no such file; name a checkpoint"),
        (["evaluate", "--model", "small_cnn", "--weights", "w", "--data", "digits"],
         "model.weights = 'w': no such file; name a checkpoint"),
        (["evaluate", "--model", "small_cnn", "--weights", "w", "--data", "digits", "--size", "0"],
         "harprune evaluate: attack.size = 0: must be greater than or equal to 1"),
        (["evaluate", "--model", "small_cnn", "--weights", "tiny.toml", "--data", "digits",
          "--attack", "autoatack"], "attack 'autoatack' is unknown; choose among fgsm, pgd-STEPS"),
        (["evaluate", "--model", "small_cnn", "--weights", "tiny.toml", "--data", "digits",
          "--attack", "fgsm", "--set", "attack.attacks=['pgd-2']"],
         """--set "attack.attacks=['pgd-2']": the command says attack.attacks = ["fgsm"] alread"""),
        ([*PRUNE, "--set", "budget.density=0.2"],
         "--set 'budget.density=0.2': the command says budget.density = 0.1 already; give one of"),
        ([*PRUNE, "--set", "model={name='vgg16_bn'}"],
         """--set "model={name='vgg16_bn'}": the command says model.name = "small_cnn" already;"""),
        ([*PRUNE, "--set", "pretrain.epochs=3"],
         "--set 'pretrain.epochs=3' has no effect with model.weights = 'tiny.toml', which is the"),
        (["run", "tiny.toml", "--out", "new", "--execution", "dense", "--set",
          "execution.backend=auto"], "--set 'execution.backend=auto': the command says execution."),
        (["run", "tiny.toml", "--out", ""],
         "Invalid value for '--out' / '-o': it is empty; name a place, as runs/mine; see `harprun"),
        (["report", "run", "--baseline", "harp"],
         "--baseline 'harp' is of a comparison; name its file by --out"),
        (["compare", "tiny.toml", "--out", "new"],
         "tiny.toml is a recipe, not a grid; `harprune run tiny.toml` runs it"),
        (["evaluate", "--model", ".", "--data", "digits"],
         "model.name = '.' is a folder; give a run to `harprune evaluate` or `harprune export` by"),
        (["export", "tiny.toml", "--model", ".", "--data", "digits", "--out", "new"],
         "model.name = '.' is a folder; give a run to `harprune evaluate` or `harprune export` by"),
        (["evaluate", "a.hpn"], "a.hpn is an exported network, not a run; `harprune evaluate --m"),
        (["export", "a.hpn", "--out", "new"], "a.hpn is an exported network, not a run; `harpru"),
    ],
)  # fmt: skip
def test_a_wrong_command_is_one_line(command, here, arguments, text):
    assert command(*arguments).refusal.startswith(text)
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("budget.densty=0.1", "tiny.toml: unknown key 'budget.densty'; the nearest known is 'bu"),
        ("method.gama=0.1", "unknown key 'method.gama' of harp; the nearest known is 'method.gam"),
        ("prune.objective.betta=1", "tiny.toml: unknown key 'prune.objective.betta'; the nearest"),
        ("budget.density=0", "tiny.toml: budget.density = 0: must lie strictly between 0 and 1"),
        ("budget.density=1.5", "tiny.toml: budget.density = 1.5: must lie strictly between 0 and"),
        ("threat.epsilon=8/0", "tiny.toml: threat.epsilon = '8/0' is not a number; write"),
        ("threat.epsilon=abc", "tiny.toml: threat.epsilon = 'abc' is not a number; write"),
        ("threat.epsilon=-1", "tiny.toml: threat.epsilon = -1: epsilon = -1.0 must be finite and"),
        ("pretrain.epochs=-1", "tiny.toml: pretrain.epochs = -1: must be greater than or equal t"),
        ("attack.attacks=['autoatack']", "attack 'autoatack' is unknown; choose among fgsm, pgd-"),
        ("method.name=harpp", "method.name = 'harpp' is unknown; choose one of harp, hydra, mag"),
        ("prune.distillation.weight=2", "tiny.toml: prune.distillation.weight = 2: must be less"),
        (
            "finetune={distillation = {}, objective = {name = 'trades'}}",
            "distillation takes its at",
        ),
        ("finetune.awp.radius=0", "tiny.toml: finetune.awp.radius = 0: must be greater than 0"),
        ("pretrain={awp = {}, objective = {name = 'free'}}", "objective.name = 'free' moves"),
        (
            "execution={attack_precision = 'bf16', twin = false}",
            "execution.attack_precision = 'bf16' is the twin's",
        ),
        ("budget.allocation=erkk", "budget.allocation = 'erkk' is unknown; choose one of uniform"),
        ("prune.schedule=cosin", "tiny.toml: prune.schedule = 'cosin': must be 'cosine', 'one_cy"),
        ("density", "--set 'density' must have the form section.key=value, as --set prune.epochs"),
    ],
)
def test_a_wrong_recipe_is_one_line(command, here, setting, text, monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("data were loaded")

    monkeypatch.setattr("harprune.recipe.materials.load_dataset", loaded)
    assert run_with(command, setting).refusal.startswith(text)
    assert not Path("new").exists()


# --- data, weights and network: refused before training and before a folder is made ---------------


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (["data.name=cifar11"], "unknown data set 'cifar11'; there are "),
        (["data.name=cifar10", "data.folder=none"], "cifar10 not found in none or its cifar-10-b"),
        (["data.name=folder", "data.folder=none"], "folder not found in none (expected train/<cl"),
        (["data.name=stripes_of_tests:lod"], "data set 'stripes_of_tests:lod': stripes_of_tests "),
        (["data.name=stripes_of_tests:images"], "stripes_of_tests:images must return (train, test"),
        (["data.name=stripes_of_tests:too_bright"], "train images run from"),
        (["objective.beta=3"], "objective.beta = 3.0 has no effect with objective.name ="),
        (["model.name=./nets.py:made"], "model './nets.py:made' names a file where a module belon"),
        (["model.name=broken_of_tests:made"], "model 'broken_of_tests:made': importing broken_of_"),
        (["data.name=stripes_of_tests:unread"], "stripes_of_tests:unread fails in line "),
        (["data.name=raising_of_tests:load"], "data set 'raising_of_tests:load': importing raisin"),
        (["model.name=stripes_of_tests:fails"], "stripes_of_tests:fails fails in line "),
        (["model.name=stripes_of_tests:wants"], "stripes_of_tests:wants cannot be called with num"),
        (["model.name=stripes_of_tests:nan"], "the network's logits are not finite; its weights h"),
        (["model.name=smal_cnn"], "unknown model 'smal_cnn'; nearest: small_cnn"),
        (["model.name=stripes_of_tests:load"], "stripes_of_tests:load takes no width; leave out"),
        (["model.mean=[0.5, 0.5]", "model.std=[1, 1]"], "mean has 2 values but the images have 1"),
        (["model.mean=[0.5]"], "mean and std go together"),
        (["model.name=vgg16_bn"], "the network refuses images of shape (1, 8, 8) ("),
        (["model.name=stripes_of_tests:picky"], "the network refuses images of shape (1, 8, 8) ("),
        (["model.name=stripes_of_tests:lonely"], "the network refuses images of shape (1, 8, 8) i"),
        (["model.weights=tiny.toml"], "tiny.toml: not a PyTorch file (it starts with"),
        (["data.validation=1000"], "validation size 1000 of 72 images leaves a part empty; give"),
        (["data.validation=1.0"], "validation size 1.0 of 72 images leaves a part empty; give a"),
        (["finetune.batch_size=61"], "finetune.batch_size = 61 exceeds the 60 training images; l"),
        (["budget.density=0.0001"], "the budget of 0 is below 6, what the layers' floors alone "),
        (["budget.include=['blok*']"], "layer pattern 'blok*' matches no parameter of the model;"),
        (["budget.exclude=['*']"], "nothing to prune: no parameter with two or more axes is sele"),
        (["budget.allocation=wrong.json"], "allocation does not fit the model: 1 (x) unknown, 6 "),
        (["execution.device=cuda"], "execution.device = 'cuda', but torch sees no GPU; `harprune"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line_before_training(command, here, settings, text, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("wrong.json").write_text('{"x": 0.1}')
    Path("broken_of_tests.py").write_text("def made(:\n")
    Path("raising_of_tests.py").write_text('open("/nowhere/at/all")\n')
    refusal = run_with(command, *settings).refusal
    assert refusal.startswith(text)
    assert not Path("new").exists()


def test_batches_that_do_not_divide_among_processes_are_refused(command, here, monkeypatch):
    monkeypatch.setattr(training, "processes", lambda: 3)
    monkeypatch.setattr(training, "fabric", lambda section: Fabric(accelerator="cpu", devices=1))
    refusal = run_with(command, "prune.batch_size=21", "finetune.batch_size=24").refusal
    assert refusal.startswith("pretrain.batch_size = 20 does not divide among 3 processes; make it")


def test_a_wrong_data_folder_leaves_no_run_folder(command, here):
    save_file(create_model("small_cnn", 10).state_dict(), "w.safetensors")
    arguments = ("--model", "small_cnn", "--weights", "w.safetensors", "--density", 0.1)
    refusal = command(
        "prune", *arguments, "--data", "cifar10", "--data-dir", "none", "--out", "new"
    )
    assert refusal.refusal.startswith("cifar10 not found in none or its cifar-10-batches-bin/")
    assert not Path("new").exists()


def test_a_folder_in_which_nothing_was_done_takes_the_corrected_recipe(command, here):
    assert "the loss is nan" in run_with(command, "pretrain.learning_rate=1e30").last_line
    assert run_with(command, "pretrain.epochs=0", "seed=7", until="pretrain").code == 0
    assert json.loads(Path("new/recipe.json").read_text())["seed"] == 7
    assert "seed: 7 -> 8" in run_with(command, "pretrain.epochs=0", "seed=8").refusal


def test_missing_files_of_a_data_set_are_named(command, here):
    Path("d/cifar-10-batches-bin").mkdir(parents=True)
    Path("d/cifar-10-batches-bin/test_batch.bin").write_bytes(b"")
    refusal = run_with(command, "data.name=cifar10", "data.folder=d").refusal
    assert "is incomplete: data_batch_1.bin" in refusal and "harprune data cifar10" in refusal


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_weights_of_another_class_count_are_refused(command, here, kind):
    state = create_model("small_cnn", 5, in_channels=1, width=4).state_dict()
    path = Path(f"others.{kind}")
    torch.save(state, path) if kind == "pt" else save_file(state, path)
    refusal = run_with(command, f"model.weights={path}").refusal
    assert refusal.startswith(f"{path}: checkpoint has 5 classes, model 4; ")


def test_a_file_of_another_network_is_refused(command, here, finished):
    arguments = ("evaluate", "--model", "small_cnn", "--data", "digits", "--attack", "fgsm")
    refusal = command(*arguments, "--weights", finished / "dense.safetensors").refusal
    assert f"{finished / 'dense.safetensors'} does not fit the model in" in refusal
    refusal = command(
        *arguments, "--weights", finished / "dense.safetensors", "--set", "model.width=4"
    ).refusal
    assert "linear.bias is (4,) in the file and (10,) in the model; name the network" in refusal


@pytest.mark.parametrize(
    ("network", "text"),
    [
        ("narrow", "the network refuses images of shape (1, 8, 8) (Given groups=1, weight of size"),
        ("few", "the network gives (1, 3) for one image of 4 classes; it must give logits of shap"),
    ],
)
def test_a_network_for_other_images_is_neither_evaluated_nor_exported(command, here, network, text):
    Path("networks_of_tests.py").write_text(
        "from torch.nn import AdaptiveAvgPool2d, Conv2d, Flatten, Linear, Sequential\n"
        "def made(channels, logits):\n"
        "    return Sequential(Conv2d(channels, 4, 3), AdaptiveAvgPool2d(1), Flatten(),\n"
        "                      Linear(4, logits))\n"
        "def narrow(*_, **__):\n"
        "    return made(3, 4)\n"
        "def few(*_, **__):\n"
        "    return made(1, 3)\n"
    )
    channels, logits = {"narrow": (3, 4), "few": (1, 3)}[network]
    layers = nn.Conv2d(channels, 4, 3), nn.Identity(), nn.Identity(), nn.Linear(4, logits)
    torch.save(nn.Sequential(*layers).state_dict(), "w.pt")
    made = ("--model", f"networks_of_tests:{network}", "--data", "stripes_of_tests:load")
    attacked = command("evaluate", *made, "--weights", "w.pt", "--attack", "fgsm", "--out", "e")
    assert attacked.refusal.startswith(text)
    assert command("export", "w.pt", *made, "--out", "a.hpn").refusal.startswith(text)
    assert not Path("e").exists() and not Path("a.hpn").exists()


def test_truncated_weights_of_others_are_refused(command, here):
    state = create_model("small_cnn", 4, in_channels=1, width=4).state_dict()
    torch.save(state, "o.pt")
    save_file(state, "o.safetensors")
    for name in ("o.pt", "o.safetensors"):
        whole = Path(name).read_bytes()
        for size in (0, 7, 200, len(whole) // 2, len(whole) - 1):
            Path(name).write_bytes(whole[:size])
            assert run_with(command, f"model.weights={name}").refusal.startswith(f"{name}: not a ")


def test_a_flip_in_an_archive_of_others_is_noticed(here):
    network = create_model("small_cnn", 4, in_channels=1, width=1)
    torch.save(network.state_dict(), "o.pt")
    whole = Path("o.pt").read_bytes()
    kept = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for place in range(0, len(whole), 41):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        Path("o.pt").write_bytes(damaged)
        # A flip in the archive's own names or padding may be harmless; another is refused.
        with contextlib.suppress(ValueError):
            load_network_weights(network, "o.pt")
        assert all(torch.equal(t, kept[name]) for name, t in network.state_dict().items())
    damaged = bytearray(whole)
    damaged[whole.index(next(iter(kept.values())).numpy().tobytes()) + 1] ^= 4
    Path("o.pt").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"o\.pt is damaged \(.*fails its checksum\); get it"):
        load_network_weights(network, "o.pt")


# --- the package called from Python ---------------------------------------------------------------


def test_floats_outside_the_unit_are_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    x, y = torch.rand(40, 1, 8, 8), torch.arange(40) % 4
    for wrong in (x * 255, x - 0.5, x.masked_fill(x > 0.9, torch.nan)):
        for images in ((wrong, y), harprune.Split(wrong, y)):
            with pytest.raises(ValueError, match=r"floats must lie in \[0, 1\]"):
                harprune.prune(model, images, (x, y), density=0.1)
            with pytest.raises(ValueError, match=r"floats (must lie )?in \[0, 1\]"):
                harprune.evaluate(model, images, attacks=["fgsm"], quiet=True)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": "harpp"}, "method.name = 'harpp' is unknown"),
        ({"density": 2.0}, "harprune.prune: budget.density = 2.0: must lie strictly"),
        ({"options": {"prune": {"batch_size": 150}}}, "prune.batch_size = 150 exceeds the 140 "),
        ({"options": {"budget": {"include": ["x"]}}}, "layer pattern 'x' matches no parameter"),
        ({"threat": 8 / 255}, "threat = 0.03137254901960784 says no norm; give Linf(8 / 255) or"),
        ({"options": ["prune"]}, "options are a list; give sections by their names, as {'finet"),
        ({"options": {"prune.batch_size": 8}}, "write options = {'prune': {'batch_size': 8}}"),
        ({"options": {"execution": {"threads": 10**6}}}, "execution.threads = 1000000 exceeds"),
        ({"options": {"budgt": {}}}, "harprune.prune: unknown key 'budgt'; the nearest known is"),
    ],
)
def test_the_call_from_python_refuses_before_it_makes_a_folder(tmp_path, options, text):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    images = torch.rand(140, 1, 8, 8), torch.arange(140) % 4
    with pytest.raises(ValueError) as caught:
        harprune.prune(model, images, images, out=tmp_path / "run", **{"density": 0.1} | options)
    assert str(caught.value).startswith(text)
    assert not (tmp_path / "run").exists()


def test_what_is_no_network_is_refused(tmp_path):
    images = torch.rand(40, 1, 8, 8), torch.arange(40) % 4
    for call in (
        lambda: harprune.prune("resnet18", images, images, density=0.1),
        lambda: harprune.evaluate("resnet18", images),
        lambda: harprune.export("resnet18", tmp_path / "a.hpn", images[0]),
    ):
        with pytest.raises(ValueError, match=r"model is a str, not a torch\.nn\.Module; give"):
            call()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda x: (255 * x).byte(),
            r"images are torch.uint8 \(40, 1, 8, 8\); give float32 \(N, C",
        ),
        (lambda x: x[0], r"images are torch.float32 \(1, 8, 8\); give float32 \(N, C, H, W\) in"),
        (lambda x: x.permute(0, 2, 3, 1), r"the network refuses images of shape \(8, 8, 1\) \("),
        (lambda x: 255 * x, r"the images run from .* to 2\d\d.*; floats must lie in \[0, 1\]"),
        (lambda x: x * float("nan"), r"the images run from nan to nan; floats must lie in"),
        (lambda x: x[:0], r"images are none at all; give float32 \(N, C, H, W\) in \[0, 1\]"),
        (lambda x: x.tolist(), r"images are a list; give float32 \(N, C, H, W\) in \[0, 1\]"),
    ],
)
def test_what_is_no_batch_is_not_exported(tmp_path, change, text):
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 4))
    with pytest.raises(ValueError, match=text):
        harprune.export(network, tmp_path / "a.hpn", change(torch.rand(40, 1, 8, 8)))


def test_images_that_are_no_pair_of_arrays_are_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    images = [(torch.rand(1, 8, 8), 0), (torch.rand(1, 8, 8), 1), (torch.rand(1, 8, 8), 2)]
    with pytest.raises(ValueError, match=r"images are a list; give a pair"):
        harprune.evaluate(model, images, attacks=["fgsm"], quiet=True)


@pytest.mark.parametrize(
    ("change", "images", "text"),
    [
        (nn.Module.double, torch.rand(40, 1, 8, 8), r"has weights of torch.float64; call model.fl"),
        (
            lambda model: model.requires_grad_(False),
            torch.rand(40, 1, 8, 8),
            r"finetune would train the network's parameters, of which none has requires_grad; call",
        ),
        (
            lambda model: model,
            torch.rand(40, 1, 8, 6),
            r"images are \(1, 8, 8\), validation images \(1, 8, 6\); bring them to one shape",
        ),
    ],
)
def test_a_run_that_could_not_end_is_refused_before_it_begins(tmp_path, change, images, text):
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    labels = torch.arange(40) % 4
    pairs = (torch.rand(40, 1, 8, 8), labels), (images, labels)
    options = {s: {"batch_size": 8} for s in ("prune", "finetune")}
    with pytest.raises(ValueError, match=text):
        harprune.prune(change(network), *pairs, density=0.2, out=tmp_path / "run", options=options)
    assert not (tmp_path / "run").exists()


def test_a_model_of_too_few_logits_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    images = torch.rand(140, 1, 8, 8), torch.arange(140) % 4
    with pytest.raises(ValueError, match="it must give logits of shape"):
        harprune.prune(model, images, images, density=0.1)


SPLIT = harprune.Split(torch.rand(8, 1, 4, 4), torch.arange(8) % 2)
LINF = harprune.Linf(0.1)


def evaluated(**options):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    harprune.evaluate(model, SPLIT, quiet=True, **{"attacks": ["fgsm"]} | options)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: create_model(Path("resnet18"), 10), "name = PosixPath('resnet18') must be te"),
        (lambda: create_model("resnet18", "10"), "num_classes = '10' must be a whole number"),
        (lambda: create_model("resnet18", 10, width=True), "width = True must be a whole number"),
        (lambda: create_model("resnet18", 2, mean=0.5, std=1), "mean = 0.5 must be a list of numb"),
        (lambda: create_model("resnet18", 2, mean=["a"] * 3, std=[1] * 3), "mean = ['a', 'a', "),
        (lambda: harprune.list_models(None), "pattern = None must be text, as 'resnet*'"),
        (lambda: harprune.load_weights("resnet18", "w.pt"), "model is a str, not a torch.nn.Modu"),
        (lambda: harprune.load_dataset(Path("digits")), "name = PosixPath('digits') must be text"),
        (lambda: harprune.split_validation(SPLIT, True, 0), "size = True must be a whole number"),
        (lambda: harprune.split_validation(SPLIT, -1, 0), "validation size -1 of 8 images leaves"),
        (lambda: harprune.split_validation(SPLIT, 1.5, 0), "validation size 1.5 of 8 images leave"),
        (lambda: harprune.split_validation(SPLIT, float("nan"), 0), "validation size nan of 8 ima"),
        (lambda: harprune.split_validation(SPLIT, float("inf"), 0), "validation size inf of 8 ima"),
        (lambda: harprune.split_validation(SPLIT, 2, 0.5), "seed = 0.5 must be a whole number"),
        (lambda: harprune.split_validation((1, 2), 1, 0), "split is a tuple, not a harprune.Sp"),
        (lambda: harprune.Dataset("d", (1, 2), SPLIT, ("a", "b")), "train is a tuple, not a harp"),
        (lambda: harprune.Dataset("d", SPLIT, SPLIT, 2), "classes = 2 must be names, one for each"),
        (lambda: as_split(([[1], [1, 2]], [0, 1])), "values are lists of different lengths; give"),
        (lambda: harprune.Linf(True), "epsilon = True is not a number; give one such as 8 / 255"),
        (lambda: harprune.L2(float("nan")), "epsilon = nan must be finite and above 0; give one"),
        (lambda: PGD(0.1, 3), "threat = 0.1 says no norm; give Linf(8 / 255) or L2(0.5)"),
        (lambda: PGD(LINF, 1.5), "steps = 1.5 must be a whole number"),
        (lambda: PGD(LINF, 3, True), "step_size = True must be a finite number above 0, or None"),
        (lambda: PGD(LINF, 3, float("inf")), "step_size = inf must be a finite number above 0, or"),
        (lambda: FGSM(LINF, loss="ce"), "loss = 'ce' must be a function of (logits, target), as c"),
        (lambda: APGD(LINF, restarts=0), "restarts = 0 must be at least 1"),
        (lambda: Margin(float("nan")), "kappa = nan must be a number of at least 0"),
        (lambda: AutoAttack(LINF, batch_size="8"), "batch_size = '8' must be a whole number"),
        (lambda: AutoAttack(LINF, seed=None), "seed = None must be a whole number"),
        (lambda: harprune.paired(None, None), "None is no evaluation; give what harprune.evaluate"),
        (lambda: evaluated(attacks=None), "attacks = None must be names in a list, as ['autoatta"),
        (lambda: evaluated(attacks=["fgms"], out="new"), "attack 'fgms' is unknown; choose among"),
        (lambda: evaluated(batch_size=None), "batch_size = None must be a whole number"),
        (lambda: evaluated(size=True), "size = True must be a whole number"),
        (lambda: evaluated(seed=0.5), "seed = 0.5 must be a whole number"),
        (lambda: evaluated(name=Path("mine")), "name = PosixPath('mine') must be text, as 'model'"),
        (lambda: evaluated(execution="fast"), "execution = 'fast' is unknown; choose one of auto,"),
        (lambda: evaluated(out=""), "out = '' names no folder; give one, as 'runs/mine', or None"),
        (lambda: require_words("ab", {}, 2), "classes = 'ab' must be names in a list, one for eac"),
        (lambda: require_words(None, {}, 2), "classes = None must be names in a list, one for eac"),
    ],
)  # fmt: skip
def test_values_of_another_kind_are_named(call, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value).startswith(text) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_numbers_of_numpy_are_numbers(here):
    assert create_model("small_cnn", np.int64(3), width=np.int32(4)).linear.out_features == 3
    assert len(harprune.split_validation(SPLIT, np.int64(2), np.uint8(0))[1]) == 2
    assert PGD(harprune.Linf(np.float32(0.1)), np.int64(3), np.float64(0.1)).passes == 3


# --- the run folder -------------------------------------------------------------------------------


def test_what_a_stage_to_come_does_may_still_be_changed(command, here, finished):
    (finished / "finetuned.safetensors").unlink()
    shutil.rmtree(finished / "attack")
    before = contents(finished)
    assert "exceeds the 60" in run_with(command, "finetune.batch_size=99", out="run").refusal
    assert contents(finished) == before
    changed = ("finetune.batch_size=12", "attack.size=8")
    assert run_with(command, *changed, out="run").code == 0
    held = json.loads((finished / "recipe.json").read_text())
    assert (held["finetune"]["batch_size"], held["attack"]["size"]) == (12, 8)
    again = run_with(command, "finetune.batch_size=10", "attack.size=8", out="run").refusal
    assert "(finetune.batch_size: 12 -> 10)" in again
    assert (
        "(prune.epochs: 2 -> 3)" in run_with(command, *changed, "prune.epochs=3", out="run").refusal
    )


def test_while_the_dense_network_is_trained_budget_and_method_may_still_change(command, here):
    run_with(command, out="run", until="pretrain")
    (here / "run" / "dense.safetensors").rename(here / "run" / "pretrain.progress")
    with RunFolder(
        here / "run", read_recipe("tiny.toml", ["budget.density=0.3", "method.name=hydra"])
    ):
        pass
    (here / "run" / "prune.progress").touch()
    with pytest.raises(ValueError, match=r"\(budget\.density: 0\.2 -> 0\.3\)"):
        RunFolder(here / "run", read_recipe("tiny.toml", ["budget.density=0.3"]))


def test_the_dense_network_may_be_attacked_later_and_on_fewer_images(command, here, finished):
    whole = outcomes_of(finished / "attack" / "dense")
    shutil.rmtree(finished / "attack" / "dense")
    changed = ("attack.dense_size=7",)
    before = (finished / "attack" / "finetuned" / "evaluation.json").read_bytes()
    assert run_with(command, *changed, out="run").code == 0
    assert (finished / "attack" / "finetuned" / "evaluation.json").read_bytes() == before
    fewer = outcomes_of(finished / "attack" / "dense")
    assert len(fewer) == 7 and fewer.items() <= whole.items()
    again = run_with(command, "attack.dense_size=8", out="run").refusal
    assert "(attack.dense_size: 7 -> 8)" in again
    assert run_with(command, "attack.dense=false", out="run").code == 0
    assert outcomes_of(finished / "attack" / "dense") == fewer
    shutil.rmtree(finished / "attack" / "dense")
    assert read_run(finished).missing == ()
    assert run_with(command, "attack.dense_size=1000", out="run").code == 0
    assert outcomes_of(finished / "attack" / "dense") == whole


def outcomes_of(folder: Path) -> dict[int, bool]:
    """Whether the clean image is right, by its position in the test set."""
    with np.load(folder / "outcomes.npz") as arrays:
        return dict(zip(arrays["index"].tolist(), arrays["clean"].tolist(), strict=True))


def test_a_folder_of_another_recipe_is_refused_and_left_alone(command, here, finished):
    before = contents(finished)
    said = run_with(command, "seed=1", "budget.density=0.3", out="run")
    assert said.refusal == (
        "run holds a run of another recipe (budget.density: 0.2 -> 0.3; seed: 0 -> 1); "
        "choose another --out"
    )
    assert contents(finished) == before
    (finished / "recipe.json").write_text("[")
    assert run_with(command, out="run").refusal.startswith("run/recipe.json is damaged; restore it")
    (finished / "recipe.json").write_text("[1]")
    assert run_with(command, out="run").refusal.startswith("run/recipe.json is damaged; restore it")
    (finished / "recipe.json").write_bytes(before["recipe.json"])
    assert contents(finished) == before


def test_a_suggested_command_is_one_that_a_shell_takes(command, here, finished):
    finished.rename(here / "my run")
    said = run_with(command, "attack.size=8", out="my run").refusal
    assert "`harprune evaluate 'my run' --size 8 --out FOLDER`" in said


def test_how_often_progress_is_saved_may_change(command, here, finished):
    assert run_with(command, "execution.checkpoint_minutes=3", out="run").code == 0


def test_given_weights_are_known_by_what_is_in_them(command, here, finished):
    shutil.copy(finished / "dense.safetensors", "a.safetensors")
    assert run_with(command, "model.weights=a.safetensors", until="pretrain").code == 0
    Path("a.safetensors").rename("b.safetensors")
    assert run_with(command, "model.weights=b.safetensors", until="prune").code == 0
    held = json.loads(Path("new/recipe.json").read_text())
    assert held["model"]["weights"] == "b.safetensors"
    shutil.copy(finished / "finetuned.safetensors", "c.safetensors")
    refusal = run_with(command, "model.weights=c.safetensors").refusal
    assert refusal.startswith("new holds a run that began with another dense network; choose")
    (here / "new" / "inputs.json").unlink()
    assert "(model.weights: 'b" in run_with(command, "model.weights=c.safetensors").refusal


@pytest.mark.parametrize("in_memory", [2**20, 0])
def test_images_are_known_by_what_they_are_wherever_they_lie(command, here, monkeypatch, in_memory):
    monkeypatch.setattr("harprune.training.data.IN_MEMORY_BYTES", in_memory)
    images = ("data.name=folder", "method.name=magnitude", "budget.density=0.9")
    paint(here / "images", red=0)
    assert run_with(command, *images, "data.folder=images", until="pretrain").code == 0
    (here / "images").rename(here / "moved")
    assert run_with(command, *images, "data.folder=moved", until="prune").code == 0
    assert json.loads(Path("new/recipe.json").read_text())["data"]["folder"] == "moved"
    paint(here / "others", red=9)
    refusal = run_with(command, *images, "data.folder=others").refusal
    assert refusal.startswith("new holds a run that began with another ")
    (here / "new" / "inputs.json").unlink()
    assert "(data.folder: 'mo" in run_with(command, *images, "data.folder=others").refusal


def paint(folder: Path, red: int) -> None:
    """An image folder of two classes, 40 images to train and 4 to test."""
    for number in range(44):
        place = folder / ("test" if number < 4 else "train") / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (red, 90 * (number % 2), number)).save(place / f"{number}.png")


def test_another_attack_of_a_finished_run_is_an_evaluation(command, here, finished):
    assert run_with(
        command, "attack.size=8", "attack.attacks=['fgsm', 'pgd-2']", out="run"
    ).refusal == (
        "run holds a run of another recipe (attack.attacks: ['pgd-2'] -> ['fgsm', 'pgd-2']; "
        "attack.size: 16 -> 8); choose another --out, or attack its network by `harprune evaluate "
        "run --attack fgsm --attack pgd-2 --size 8 --out FOLDER`"
    )
    assert run_with(command, "attack.size=8", "seed=1", out="run").refusal.endswith("another --out")


def test_a_second_process_is_refused(command, here, finished):
    before = contents(finished)
    with RunFolder("run", read_recipe("tiny.toml")):
        text = f"run is in use by process {os.getpid()}; wait for it or choose another --out"
        assert run_with(command, out="run").refusal == text
    assert contents(finished) == before
    assert run_with(command, out="run").code == 0


def test_a_file_in_the_place_of_the_folder_is_refused(command, here):
    Path("new").write_text("mine")
    assert run_with(command).refusal == "new is a file, not a run folder; choose another --out"
    refusal = run_with(command, out="new/below").refusal
    assert refusal == (
        "new/below could not be written (Not a directory): allow writing there, or name another "
        "place"
    )
    assert Path("new").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_refused(command, here):
    run_with(command, "model.name=none")  # whoever takes over may not read the program's files
    (here / "locked").mkdir(mode=0o555)
    (here / "held").mkdir()
    (here / "held" / "kept.md").write_text("old")
    (here / "held").chmod(0o555)
    here.chmod(0o755)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        refusal = run_with(command, out="locked/run").refusal
        held = run_with(command, out="held").refusal
        with pytest.raises(OSError) as caught:
            write("held/kept.md", "new")
    finally:
        if root:
            os.seteuid(0)
    assert refusal == (
        "locked/run could not be written (Permission denied): allow writing there, or name "
        "another place"
    )
    assert held == "held cannot be written to (Permission denied); allow it, or name another place"
    assert str(caught.value) == (
        "held/kept.md could not be written (Permission denied); what was there before is intact: "
        "allow writing there, or name another place"
    )


# --- damaged files --------------------------------------------------------------------------------


def small_checkpoint(path: Path) -> bytes:
    tensors = {"model/w": torch.arange(6.0).view(2, 3), "mask/w": torch.ones(2, dtype=torch.bool),
               "n": torch.tensor(3)}  # fmt: skip
    checkpoint.save(path, tensors, {"epoch": 3, "history": [{"loss": 0.5}]})
    return path.read_bytes()


def test_a_flip_anywhere_is_noticed(tmp_path):
    path = tmp_path / "c.safetensors"
    whole = small_checkpoint(path)
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError) as caught:
            checkpoint.load(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_truncation_anywhere_is_noticed(tmp_path):
    path = tmp_path / "c.safetensors"
    whole = small_checkpoint(path)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="is damaged or no checkpoint"):
            checkpoint.load(path)


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[-5] ^= 4
    path.write_bytes(content if how == "flipped" else content[: len(content) // 2])


@pytest.mark.parametrize("how", ["flipped", "truncated"])
@pytest.mark.parametrize(
    ("stage", "name", "later"),
    [
        ("pretrain", "dense", ("pruned", "finetuned")),
        ("prune", "pruned", ("finetuned",)),
        ("finetune", "finetuned", ()),
    ],
)
def test_a_damaged_network_is_named_and_made_anew_when_deleted(
    command, here, finished, stage, name, later, how
):
    for each in (*later, "attack", "report"):
        place = finished / each
        shutil.rmtree(place) if place.is_dir() else place.with_suffix(".safetensors").unlink()
    path = finished / f"{name}.safetensors"
    whole, _ = checkpoint.load(path)
    damage(path, how)
    before = contents(finished)
    line = run_with(command, out="run").last_line
    assert line.startswith(f"run/{name}.safetensors is damaged")
    assert line.endswith("restore it or delete it and run the command again")
    assert contents(finished).items() >= before.items()
    path.unlink()
    assert run_with(command, out="run", until=stage).code == 0
    again, _ = checkpoint.load(path)
    assert all(torch.equal(whole[key], again[key]) for key in whole)


@pytest.fixture
def stopped(command, here, monkeypatch) -> Path:
    """A run stopped in the middle of its first stage, as by a kill: progress and best epoch."""

    def killed(course, *_):
        if course.step == 4:
            raise KeyboardInterrupt

    from harprune.run.state import TrainingState

    counted = TrainingState.step_ended
    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "step_ended", lambda c, *a: (counted(c, *a), killed(c))[0])
        assert run_with(command, out="run").code == 130
    assert {p.name for p in Path("run").glob("pretrain.*")} == {
        "pretrain.progress",
        "pretrain.best",
    }
    return Path("run")


@pytest.mark.parametrize("how", ["flipped", "truncated"])
@pytest.mark.parametrize("name", ["pretrain.progress", "pretrain.best"])
def test_damage_to_what_a_stage_goes_on_from_is_named(command, here, stopped, name, how):
    damage(stopped / name, how)
    before = contents(stopped)
    line = run_with(command, out="run").last_line
    assert line.startswith(f"run/{name} is damaged") and "delete it" in line
    assert contents(stopped) == before
    (stopped / name).unlink()
    said = run_with(command, out="run", until="pretrain")
    if name == "pretrain.best":
        assert said.last_line == (
            "run/pretrain.best is missing, to which run/pretrain.progress refers; restore it, "
            "or delete the other as well and the stage starts again"
        )
        (stopped / "pretrain.progress").unlink()
        said = run_with(command, out="run", until="pretrain")
    assert said.code == 0


def test_a_stopped_stage_goes_on(command, here, stopped, finished_dense):
    said = run_with(command, out="run", until="pretrain")
    assert said.code == 0 and "pretrain: going on at step 3" in said.err
    tensors, _ = checkpoint.load(stopped / "dense.safetensors")
    assert all(torch.equal(tensors[key], finished_dense[key]) for key in tensors)


@pytest.fixture
def finished_dense(_finished) -> dict[str, torch.Tensor]:
    return checkpoint.load(_finished / "dense.safetensors")[0]


# --- a loss that is not finite --------------------------------------------------------------------


def test_a_diverged_stage_names_its_step_and_the_last_good_checkpoint(command, here, finished):
    before = contents(finished)
    line = run_with(command, "pretrain.learning_rate=1e30").last_line
    assert line.startswith("pretrain stopped: the ") and " step " in line
    assert line.endswith("lower pretrain.learning_rate in a new run")
    assert "no checkpoint was written yet" in line
    assert contents(finished) == before


def test_the_last_good_checkpoint_is_intact_after_divergence(command, here, monkeypatch):
    from harprune.run.state import TrainingState

    counted = TrainingState.step_ended

    def overflows(course, step, loss, images):
        if step == 5:  # after the first epoch of three steps was saved: its update was too much
            with torch.no_grad():
                next(course.model.parameters()).mul_(torch.inf)
        counted(course, step, loss, images)

    monkeypatch.setattr(TrainingState, "step_ended", overflows)
    line = run_with(command).last_line
    assert line == (
        "pretrain stopped: the weights are not finite after step 5; the last good checkpoint is "
        "new/pretrain.progress; lower pretrain.learning_rate in a new run"
    )
    for name in ("pretrain.progress", "pretrain.best"):
        tensors, _ = checkpoint.load(Path("new") / name)
        assert all(t.isfinite().all() for t in tensors.values())


# --- a full disk ----------------------------------------------------------------------------------


@pytest.fixture
def small_files():
    """No file may grow beyond 4 KiB: as on a full disk, every longer write fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_that_does_not_fit_leaves_the_old_one(tmp_path, small_files):
    path = tmp_path / "c.safetensors"
    old = small_checkpoint(path)
    with pytest.raises(OSError, match=r"c\.safetensors could not be written .*make room and give"):
        checkpoint.save(path, {"w": torch.ones(4096)}, {})
    with pytest.raises(OSError, match=r"t\.txt could not be written .*File too large"):
        write(tmp_path / "t.txt", "x" * 8192)
    within = pytest.raises(OSError, match=r"u\.txt could not be written \(File too large\); what w")
    with within, replacing(tmp_path / "u.txt") as temporary:
        write(temporary, "x" * 8192)
    assert contents(tmp_path) == {"c.safetensors": old}


def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    link, fifo = tmp_path / "link.txt", tmp_path / "fifo"
    link.symlink_to(tmp_path / "target.txt")
    os.mkfifo(fifo)
    for text in ("old", "new"):
        write(link, text)
        assert link.is_symlink() and (tmp_path / "target.txt").read_text() == text
    with pytest.raises(OSError, match=r"fifo could not be written \(what is there is no regular"):
        write(fifo, "new")
    with pytest.raises(ValueError, match=r"fifo is no regular file; give the name of one"):
        require_writable(fifo)
    assert fifo.is_fifo() and {p.name for p in tmp_path.iterdir()} == {*contents(tmp_path), "fifo"}


def test_only_a_full_disk_wants_room(tmp_path):
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere" / "at all")
    for place in (Path("/proc/run"), tmp_path / "gone"):
        with pytest.raises(OSError, match=r"could not be written .* name another place") as caught:
            make_folder(place)
        assert "make room" not in str(caught.value)


def test_a_full_disk_names_the_way_out_once(command, here, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert run_with(command).refusal.count("make room") == 1


def test_a_failing_flush_leaves_the_old_file(tmp_path, monkeypatch):
    write(tmp_path / "t.txt", "old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"t\.txt could not be written .*No space left"):
        write(tmp_path / "t.txt", "new")
    assert contents(tmp_path) == {"t.txt": b"old"}


@pytest.mark.parametrize("empty", [torch.empty, np.empty])
def test_too_little_memory_ends_a_command_in_one_line(command, here, monkeypatch, empty):
    kind = {torch.empty: torch.uint8, np.empty: np.uint8}[empty]
    # More than a process can address, so that no machine lends it.
    monkeypatch.setattr("harprune.recipe.checks.check", lambda *_, **__: empty(2**48, dtype=kind))
    refusal = run_with(command).refusal
    assert "allocate" in refusal and "; choose a smaller network, or lower the batch_s" in refusal


def test_a_disk_that_fills_up_ends_a_run_in_one_line(command, here, finished):
    for path in ("pruned.safetensors", "finetuned.safetensors"):
        (finished / path).unlink()
    shutil.rmtree(finished / "attack")
    before = contents(finished)
    limited = (
        "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (6000, r.RLIM_INFINITY))\n"
        "from harprune.cli.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, "run", "tiny.toml", "--out", "run"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("harprune: run/prune.best could not be written (")
    assert last.endswith("make room and give the same command again")
    assert contents(finished) == before
    assert run_with(command, out="run").code == 0


def test_a_full_file_system_leaves_the_old_checkpoint(tmp_path):
    program = (
        "import os, torch\n"
        "from harprune.training import checkpoint\n"
        "checkpoint.save('c', {'w': torch.zeros(4000)}, {})\n"
        "try: checkpoint.save('c', {'w': torch.ones(40000)}, {})\n"
        "except OSError as error: print(error)\n"
        "assert os.listdir() == ['c'] and not checkpoint.load('c')[0]['w'].any()\n"
    )
    mount = ["unshare", "--mount", "sh", "-c",
             'mount -t tmpfs -o size=64k tmpfs "$0" && cd "$0" && "$@"', tmp_path]  # fmt: skip
    if (
        not shutil.which("unshare")
        or subprocess.run([*mount, "true"], capture_output=True).returncode
    ):
        pytest.skip("a file system of 64 KiB cannot be mounted here")
    done = subprocess.run([*mount, sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "No space left on device" in done.stdout and "make room" in done.stdout
