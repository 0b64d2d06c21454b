# SPDX-License-Identifier: Apache-2.0
"""Any network, pruned by one call: exact to the unit, plain again afterwards."""

import copy
import random
import runpy
import sys
from functools import partial
from math import floor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import harprune
from harprune import Linf
from harprune.kernels import native
from harprune.reporting.report import write_report
from harprune.sparsity.bridge import FunctionRegion
from harprune.sparsity.layers import prunable_layers
from harprune.training.splits import Split

EXAMPLE = Path(__file__).parents[2] / "examples" / "prune_your_model.py"


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.position = nn.Parameter(torch.zeros(1, 4, 16))
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        seen = self.norm(tokens)
        tokens = tokens + self.attention(seen, seen, seen, need_weights=False)[0]
        return self.head((tokens + self.mlp(tokens)).mean(dim=1))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(192, 32)
        self.one, self.two = nn.Linear(32, 32), nn.Linear(32, 32)
        self.two.weight = self.one.weight
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        hidden = torch.relu(self.inner(x.flatten(1)))
        return self.head(torch.relu(self.two(torch.relu(self.one(hidden)))))


def depthwise():
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, groups=64, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2, groups=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4),
    )  # fmt: skip


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 4))


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(64, 3, 8, 8, generator=generator)
    return x, torch.arange(64) % 4


@pytest.mark.parametrize("build", [Transformer, depthwise, Tied, mlp])
@pytest.mark.parametrize("method", ["harp", "hydra", "magnitude", "random"])
@pytest.mark.parametrize("cost", ["parameters", "multiply-adds"])
def test_any_model_is_pruned_to_the_unit_and_plain_again(build, method, cost, images):
    torch.manual_seed(0)
    model = build()
    before = copy.deepcopy(model.state_dict())
    pruned = harprune.prune(
        model,
        images,
        images,
        density=0.05,
        method=method,
        prune_epochs=1,
        finetune_epochs=1,
        options={
            "objective": {"steps": 2},
            "validation": {"size": 16, "steps": 1},
            "prune": {"batch_size": 32},
            "finetune": {"batch_size": 32},
            "budget": {"cost": cost},
        },
        quiet=True,
    )
    total = sum(layer.size for layer in prunable_layers(model).values())
    counted = sum(
        int(layer.weight.count_nonzero()) for layer in prunable_layers(pruned.model).values()
    )
    assert counted == pruned.audit.kept
    if cost == "parameters":
        assert counted == floor(0.05 * total) == pruned.audit.budget
    plain = build()
    plain.load_state_dict(pruned.model.state_dict(), strict=True)
    assert torch.equal(plain.eval()(images[0]), pruned.model(images[0]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Frozen(nn.Module):
    """Normalisation as parameters, and a first layer, that are not to be trained."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.full((3, 1, 1), 0.5), requires_grad=False)
        self.std = nn.Parameter(torch.full((3, 1, 1), 0.25), requires_grad=False)
        self.first = nn.Conv2d(3, 8, 3).requires_grad_(False)
        self.unused = nn.Linear(8, 8)
        self.last = nn.Linear(8 * 36, 4)

    def forward(self, x):
        return self.last(self.first((x - self.mean) / self.std).relu().flatten(1))


QUICK = {
    "density": 0.3, "prune_epochs": 1, "finetune_epochs": 1, "quiet": True,
    "options": {"objective": {"steps": 1}, "validation": {"size": 8, "steps": 1},
                "prune": {"batch_size": 32}, "finetune": {"batch_size": 32}},
}  # fmt: skip


PRETRAINED = QUICK | {
    "quiet": False, "options": {**QUICK["options"], "pretrain": {"batch_size": 32}}
}  # fmt: skip


@pytest.mark.parametrize("method", ["harp", "li20", "snip", "grasp", "synflow", "mad"])
def test_what_is_frozen_is_pruned_but_not_trained(method, images):
    torch.manual_seed(0)
    model = Frozen()
    pruned = harprune.prune(model, images, images, method=method, **QUICK).model
    assert torch.equal(pruned.mean, model.mean) and torch.equal(pruned.std, model.std)
    kept = pruned.first.weight != 0
    assert 0 < kept.sum() < kept.numel()
    assert torch.equal(pruned.first.weight[kept], model.first.weight[kept])
    assert not torch.equal(pruned.last.bias, model.last.bias)
    assert not pruned.first.weight.requires_grad and pruned.last.weight.requires_grad


class ByWeight(nn.Module):
    """Reads the weight of a layer that it does not call."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        maps = torch.relu(self.norm(self.first(x)))
        return nn.functional.linear(maps.mean((2, 3)), self.last.weight, self.last.bias)


class Averaging(ByWeight):
    """Keeps a running mean of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        logits = super().forward(x)
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * logits.detach().mean(0))
        return logits - self.mean


@pytest.mark.parametrize("build", [ByWeight, Averaging])
@pytest.mark.parametrize("method", ["magnitude", "harp"])
def test_what_the_kernels_cannot_run_rightly_trains_in_torch(build, method, images):
    torch.manual_seed(0)
    model, found = build(), []
    for backend in ("auto", "dense"):
        options = QUICK["options"] | {"execution": {"backend": backend}}
        torch.manual_seed(0)
        pruned = harprune.prune(
            model, images, images, method=method, **(QUICK | {"options": options})
        )
        found.append(pruned.model.state_dict())
    for name, tensor in found[0].items():
        assert torch.allclose(tensor, found[1][name], atol=1e-4), name
    assert not torch.equal(found[0]["last.weight"], model.last.weight)
    if build is Averaging:
        assert found[0]["mean"].abs().sum() > 0


class Rounded(torch.autograd.Function):
    """Four levels, through which gradients pass straight."""

    @staticmethod
    def forward(ctx, x):
        return torch.round(x * 3) / 3

    @staticmethod
    def backward(ctx, g):
        return g


def test_a_backward_of_the_users_own_is_attacked(images, capsys):
    class Quantised(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(192, 4)

        def forward(self, x):
            return self.layer(Rounded.apply(x.flatten(1)))

    torch.manual_seed(0)
    model, given = Quantised(), {"attacks": ["pgd-5"], "threat": Linf(0.3)}
    with torch.no_grad():
        x, y = images[0], model(images[0]).argmax(1)
    found = [harprune.evaluate(model, (x, y), twin=twin, **given) for twin in (True, False)]
    assert found[0].attacks["pgd-5"].accuracy == found[1].attacks["pgd-5"].accuracy < 0.5
    assert all(check.passed for check in found[0].checks.values()), found[0].checks
    shown = " ".join(capsys.readouterr().err.split())
    assert shown.count("note: attacks search on the network itself, in torch: ") == 1
    assert "calls Rounded, whose backward a trace loses in line" in shown


class Standardised(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight - self.weight.mean(), self.bias)


class Several(nn.Module):
    def __init__(self, when):
        super().__init__()
        self.body, self.when = mlp(), when

    def forward(self, x):
        logits = self.body(x)
        return (logits, logits) if self.training in self.when else logits


def one_layer(change):
    model = mlp()
    change(model[1])
    return model


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        (Several([False]), {}, "the network gives a tuple, not logits"),
        (Several([True]), {}, "the network gives a tuple in training mode, not logits"),
        (one_layer(nn.utils.parametrizations.spectral_norm), {}, "1.weight is computed from other"),
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(4)), {}, "1.weight has no shape yet"),
        (nn.Sequential(nn.Flatten(), Standardised(192, 4)), {}, "1.weight is not what its layer"),
        (mlp(), {"options": {"model": {"mean": [0.5]}}}, r"options\['model'\] with 'mean' would"),
        (mlp(), {"options": {"attack": {"size": 9}}}, r"options\['attack'\] with 'size' would"),
        (mlp(), {"method": "snip"}, "prune.batch_size = 128 exceeds the 64"),
    ],
)
def test_what_cannot_be_is_refused_before_training(model, given, message, images):
    with pytest.raises(ValueError, match=message):
        harprune.prune(
            model, images, images, density=0.1, prune_epochs=0, finetune_epochs=0, **given
        )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, within torch.compile
def test_a_compiled_network_is_refused_with_the_way_out(images):
    compiled = torch.compile(mlp())
    with pytest.raises(ValueError, match=r"compiled by torch\.compile; give .* model\._orig_mod"):
        harprune.prune(compiled, images, images, density=0.1)


def test_a_layer_of_zeros_has_nothing_to_keep(images):
    model = one_layer(lambda layer: nn.init.zeros_(layer.weight))
    with pytest.raises(ValueError, match=r"layer collapse: 1\.weight keeps no weight"):
        harprune.prune(model, images, images, **QUICK)


def test_a_network_without_parameters_is_evaluated(images):
    model = nn.Sequential(nn.AdaptiveAvgPool2d((1, 4)), nn.Flatten(), nn.AdaptiveAvgPool1d(4))
    assert harprune.evaluate(model, images, attacks=["fgsm"], quiet=True).size == 64


def test_attacks_run_on_what_is_said(images, monkeypatch):
    ran, forward = [], FunctionRegion.forward
    monkeypatch.setattr(
        FunctionRegion, "forward", lambda region, *x: ran.append(x) or forward(region, *x)
    )
    harprune.evaluate(mlp(), images, attacks=["fgsm"], execution="dense", quiet=True)
    assert not ran
    harprune.evaluate(mlp(), images, attacks=["fgsm"], execution="auto", quiet=True)
    assert bool(ran) == (native.best() is not None)
    for twin in (True, False):
        with pytest.raises(ValueError, match="execution = 'fast' is unknown; choose one of auto, "):
            harprune.evaluate(mlp(), images, attacks=["fgsm"], execution="fast", twin=twin)


def test_kernels_are_not_asked_for_where_torch_attacks_the_model(images):
    with pytest.raises(ValueError, match="execution = 'sparse' runs the twin, and twin = False"):
        harprune.evaluate(mlp(), images, execution="sparse", twin=False)


def test_the_example_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "1"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    shown = capsys.readouterr().out
    assert "kept 1448 of 28960 prunable weights" in shown
    assert "pgd-20" in shown


def test_the_images_of_the_example_are_a_data_set(monkeypatch):
    monkeypatch.chdir(EXAMPLE.parent)
    dataset = harprune.load_dataset("prune_your_model:load")
    assert isinstance(dataset, harprune.Dataset)
    assert (len(dataset.train), len(dataset.test), dataset.num_classes) == (1258, 359, 10)


def test_a_network_that_only_guesses_is_warned_of(images, capsys):
    model = mlp()
    nn.init.constant_(model[3].bias[:1], 100.0)
    harprune.prune(model, images, images, **QUICK | {"quiet": False})
    assert "is what guessing gives; are these the right weights" in capsys.readouterr().err
    harprune.prune(model, images, images, pretrain_epochs=1, **PRETRAINED)
    assert "is what guessing gives" not in capsys.readouterr().err


def test_a_run_of_the_api_goes_on_where_it_was(tmp_path, images):
    options = {"validation": {"size": 8, "steps": 1}, "objective": {"steps": 1},
               "finetune": {"batch_size": 32}, "prune": {"batch_size": 32}}  # fmt: skip
    common = {
        "density": 0.1,
        "prune_epochs": 1,
        "finetune_epochs": 1,
        "options": options,
        "quiet": True,
    }
    torch.manual_seed(0)
    model = mlp()
    first = harprune.prune(model, images, images, out=tmp_path / "run", **common)
    again = harprune.prune(model, images, images, out=tmp_path / "run", **common)
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])
    x, y = images
    for others, what in (
        ((mlp(), images, images), "dense network"),
        ((model, (x[:48], y[:48]), images), "set of training images"),
        ((model, images, (x.flip(0), y)), "set of validation images"),
    ):
        with pytest.raises(ValueError, match=f"run that began with another {what}; choose") as said:
            harprune.prune(*others, out=tmp_path / "run", **common)
        assert ("torch.manual_seed" in str(said.value)) == (what == "dense network")


def test_the_generators_of_a_caller_are_left_as_they_were(images):
    calls = (  # looked up first: other packages draw names while they are imported
        partial(harprune.prune, mlp(), images, images, **QUICK),
        partial(harprune.evaluate, mlp(), images, attacks=["fgsm"], size=8, quiet=True),
    )
    random.seed(1), np.random.seed(1)
    expected = random.random(), np.random.rand()
    random.seed(1), np.random.seed(1)
    for call in calls:
        call()
    assert (random.random(), np.random.rand()) == expected


def test_images_given_in_python_are_augmented_where_that_is_said(images):
    common = {"density": 0.1, "prune_epochs": 0, "finetune_epochs": 1, "quiet": True,
              "options": {"objective": {"steps": 1}, "finetune": {"batch_size": 32}}}  # fmt: skip
    torch.manual_seed(0)
    model = mlp()
    plain, same, other = (
        harprune.prune(model, images, images, **common, **more).model.state_dict()
        for more in ({}, {"augmentation": "none"}, {"augmentation": "crop_flip"})
    )
    assert all(torch.equal(plain[n], same[n]) for n in plain)
    assert not all(torch.equal(plain[n], other[n]) for n in plain)


def test_labels_count_wherever_they_are(images):
    x, y = images
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    few = (x[y < 2], y[y < 2])
    with pytest.raises(ValueError, match=r"gives \(1, 2\) for one image of 4 classes"):
        harprune.prune(network, few, images, **QUICK)
    with pytest.raises(ValueError, match=r"validation: labels run from -1 to 3; they must lie in"):
        harprune.prune(mlp(), images, Split(x, torch.where(y == 0, -1, y)), **QUICK)
    with pytest.raises(ValueError, match="train: there are no images"):
        harprune.prune(mlp(), Split(x[:0], y[:0]), images, **QUICK)
    with pytest.raises(ValueError, match="test: labels run from -1 to 2"):
        harprune.evaluate(mlp(), Split(x, y - 1), attacks=(), quiet=True)


def test_images_may_come_with_gradients_but_a_split_holds_plain_tensors(images):
    x, y = images[0].clone().requires_grad_(), images[1]
    assert harprune.evaluate(mlp(), (x, y), attacks=(), quiet=True).size == 64
    with pytest.raises(ValueError, match="must lie in main memory, without gradients; give"):
        Split(x, y)


@pytest.mark.parametrize("options", [{"seed": 1}, {"finetune": 5}])
def test_options_are_sections(images, options):
    with pytest.raises(ValueError, match=r"options\['\w+'\] = \d is no section; options are sec"):
        harprune.prune(mlp(), images, images, density=0.1, options=options)


def test_several_processes_need_a_folder(images, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="several processes share one run, which needs a folder"):
        harprune.prune(mlp(), images, images, density=0.1)


def test_what_an_argument_says_is_no_option(images):
    with pytest.raises(
        ValueError, match=r"\['density'\] = 0\.5 is said by an argument of prune al"
    ):
        harprune.prune(mlp(), images, images, density=0.1, options={"budget": {"density": 0.5}})


def test_the_report_says_how_to_have_an_attack(images, tmp_path):
    folder = tmp_path / "run"
    pruned = harprune.prune(mlp(), images, images, out=folder, **QUICK)
    said = (folder / "report" / "report.md").read_text()
    assert "No attack was run" in said and "not complete" not in said
    place = folder / "attack" / "finetuned"
    harprune.evaluate(pruned.model, images, attacks=["fgsm"], out=place, quiet=True)
    found = write_report(folder)
    assert [r["measure"] for r in found["results"]] == ["clean", "fgsm"]
    said = (folder / "report" / "report.md").read_text()
    assert "No attack was run" not in said and "not complete" not in said


def test_a_run_of_its_own_can_be_loaded(images, tmp_path):
    model = mlp()
    result = harprune.prune(model, images, images, out=tmp_path / "run", **QUICK)
    assert repr(result) == "Pruned(Sequential: 3,763 of 12,544 prunable weights kept (29.998 %))"
    pruned, again = result.model, mlp()
    assert harprune.load_weights(again, tmp_path / "run" / "finetuned.safetensors").complete
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in pruned.state_dict().items())
