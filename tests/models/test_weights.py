# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of others: forms that are read, forms that are refused, published accuracies."""

import json
import os
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from harprune.models import create_model, load_weights
from harprune.models.weights import read_checkpoint
from harprune.training.data import load_dataset
from harprune.training.splits import to_float


def narrow(name="resnet18", num_classes=10, *, seed=0, **arguments):
    torch.manual_seed(seed)
    return create_model(name, num_classes, width=4, **arguments)


def states_equal(model, other):
    mine, theirs = model.state_dict(), other.state_dict()
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


def prefixed(prefix):
    return lambda state: {prefix + name: value for name, value in state.items()}


WRAPPINGS = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "loss": torch.tensor(0.5)},
    "model": lambda state: {"model": dict(state), "optimizer": {"lr": 0.1}},
    "net": lambda state: {"net": state, "acc": 0.9},
    "list": lambda state: {"state_dict": [state], "err": 0.4},
    "module": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "both": prefixed("module._orig_mod."),
    "prefix": prefixed("backbone.body."),
    "normalised": prefixed("network."),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.filterwarnings("error")
def test_every_wrapping_is_understood(wrapping, normalised, tmp_path):
    source = narrow(seed=1)
    torch.save(WRAPPINGS[wrapping](source.state_dict()), tmp_path / "weights.pt")
    constants = {"mean": [0.5] * 3, "std": [0.2] * 3} if normalised else {}
    model = narrow(seed=2, **constants)
    report = load_weights(model, tmp_path / "weights.pt")
    assert report.complete
    assert len(report.loaded) == len(source.state_dict())
    assert states_equal(model.network if normalised else model, source)


def test_safetensors_and_half_precision(tmp_path):
    source = narrow(seed=1).half()
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    model = narrow(seed=2)
    load_weights(model, tmp_path / "weights.safetensors")
    assert states_equal(model, source.float())


def test_a_network_that_calls_a_layer_module(tmp_path):
    source, model = (nn.ModuleDict({"module": nn.Linear(2, 3)}) for _ in range(2))
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    load_weights(model, tmp_path / "weights.pt")
    assert states_equal(model, source)


def test_names_of_torchvision(tmp_path):
    source = narrow("resnet50_imagenet", seed=1)
    theirs = {
        name.replace("shortcut.", "downsample.").replace("linear.", "fc."): value
        for name, value in source.state_dict().items()
    }
    assert {"layer1.0.downsample.1.running_var", "fc.bias"} < theirs.keys()
    torch.save(theirs, tmp_path / "resnet50.pth")
    model = narrow("resnet50_imagenet", seed=2)
    assert load_weights(model, tmp_path / "resnet50.pth").complete
    assert states_equal(model, source)


def test_names_of_trades_wide_resnet(tmp_path):
    source = narrow("wrn28_4", seed=1)
    theirs = {}
    for name, value in source.state_dict().items():
        if name.startswith("block"):
            block, rest = name.split(".", 1)
            name = f"{block}.layer.{rest}".replace("shortcut.", "convShortcut.")
        theirs["module." + name.replace("linear.", "fc.")] = value
        if name.startswith("block1"):
            theirs["module.sub_" + name] = value + 1
    torch.save(theirs, tmp_path / "wrn.pt")
    model = narrow("wrn28_4", seed=2)
    assert load_weights(model, tmp_path / "wrn.pt").complete
    assert states_equal(model, source)


def named_by_deepmind(name, width):
    """Tensors of a checkpoint as RobustBench publishes it: names and shapes from its definition."""
    w, state = width, {"mean": torch.full((3, 1, 1), 0.5), "std": torch.full((3, 1, 1), 0.2)}

    def norm(name, channels):
        for part in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.{part}"] = torch.rand(channels)
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def block(name, before, after, size, first, second, shortcut):
        norm(f"{name}.batchnorm_0", before)
        norm(f"{name}.batchnorm_1", after)
        state[f"{name}.{first}.weight"] = torch.rand(after, before, 3, 3)
        state[f"{name}.{second}.weight"] = torch.rand(after, after, 3, 3)
        if shortcut:
            state[f"{name}.shortcut.weight"] = torch.rand(after, before, size, size)

    if name == "dm_wrn28_10":
        state["init_conv.weight"], last = torch.rand(16, 3, 3, 3), 4 * w
        for stage, (before, after) in enumerate([(16, w), (w, 2 * w), (2 * w, 4 * w)]):
            for i in range(4):
                names = (f"layer.{stage}.block.{i}", after if i else before, after, 1)
                block(*names, "conv_0", "conv_1", before != after and i == 0)
    else:
        state["conv_2d.weight"], last = torch.rand(w, 3, 3, 3), 8 * w
        for stage, (before, after) in enumerate(
            [(w, w), (w, 2 * w), (2 * w, 4 * w), (4 * w, last)]
        ):
            for i in range(2):
                names = (f"layer_{stage}.{i}", after if i else before, after, 3)
                block(*names, "conv_2d_1", "conv_2d_2", before != after and i == 0)
    norm("batchnorm", last)
    state["logits.weight"], state["logits.bias"] = torch.rand(10, last), torch.rand(10)
    return state


@pytest.mark.parametrize("name", ["dm_wrn28_10", "dm_preact_resnet18"])
def test_names_of_deepminds_networks(name, tmp_path):
    torch.manual_seed(0)
    state = named_by_deepmind(name, width=4)
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="carries its own normalisation"):
        load_weights(create_model(name, 10, width=4), tmp_path / "weights.pt")
    model = create_model(name, 10, width=4, mean=[0.5] * 3, std=[0.2] * 3)
    assert load_weights(model, tmp_path / "weights.pt").complete
    loaded = model.network.state_dict()
    assert loaded.keys() == state.keys() - {"mean", "std"}
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.items())


def test_old_checkpoints_without_counters(tmp_path):
    source = narrow(seed=1)
    state = {n: v for n, v in source.state_dict().items() if not n.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pt")
    assert load_weights(narrow(seed=2), tmp_path / "old.pt").complete


def test_another_number_of_classes_says_so_and_loads_the_rest_when_asked(tmp_path):
    source = narrow(num_classes=100, seed=1)
    torch.save(source.state_dict(), tmp_path / "hundred.pt")
    model = narrow(seed=2)
    before = OrderedDict((n, v.clone()) for n, v in model.state_dict().items())
    with pytest.raises(
        ValueError, match=r"checkpoint has 100 classes, model 10; .*num_classes=100"
    ):
        load_weights(model, tmp_path / "hundred.pt")
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    report = load_weights(model, tmp_path / "hundred.pt", strict=False)
    assert report.mismatched == (
        ("linear.weight", (100, 32), (10, 32)),
        ("linear.bias", (100,), (10,)),
    )
    assert torch.equal(model.conv1.weight, source.conv1.weight)
    assert torch.equal(model.linear.weight, before["linear.weight"])


def test_missing_and_unexpected_names_are_counted_and_shown(tmp_path):
    state = narrow(seed=1).state_dict()
    del state["conv1.weight"], state["bn1.bias"]
    state["extra.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "weights.pt")
    said = r"2 missing \(conv1.weight, bn1.bias\), 1 unexpected \(extra.weight\); name the"
    with pytest.raises(ValueError, match=said) as caught:
        load_weights(narrow(), tmp_path / "weights.pt")
    assert "\n" not in str(caught.value)
    report = load_weights(narrow(), tmp_path / "weights.pt", strict=False)
    assert (report.missing, report.unexpected) == (("conv1.weight", "bn1.bias"), ("extra.weight",))


def test_a_deeper_network_is_not_taken_for_a_shallower_one(tmp_path):
    torch.save(narrow("resnet34", seed=1).state_dict(), tmp_path / "deep.pt")
    with pytest.raises(ValueError, match="unexpected"):
        load_weights(narrow("resnet18"), tmp_path / "deep.pt")


def test_a_checkpoint_with_its_own_normalisation_says_what_to_do(tmp_path):
    state = prefixed("model.")(narrow(seed=1).state_dict())
    mean, std = [0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616]
    constants = {"mu": torch.tensor([mean]), "sigma": torch.tensor(std).view(3, 1, 1)}
    torch.save(state | prefixed("normalize.")(constants), tmp_path / "weights.pt")
    said = (
        "carries its own normalisation (normalize.mu = [0.4914, 0.4822, 0.4465], normalize.sigma = "
        "[0.2471, 0.2435, 0.2616]); create the model with that mean= and std="
    )
    for other in (narrow(), narrow(mean=mean, std=[0.25] * 3), narrow(mean=std, std=std)):
        with pytest.raises(ValueError, match=re.escape(said)):
            load_weights(other, tmp_path / "weights.pt")
        assert load_weights(other, tmp_path / "weights.pt", strict=False).missing == ()
    model = narrow(seed=2, mean=mean, std=std)
    assert load_weights(model, tmp_path / "weights.pt").complete
    assert states_equal(model.network, narrow(seed=1))


def test_another_network_altogether_is_refused_even_when_not_strict(tmp_path):
    torch.save({"other.weight": torch.zeros(2)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="of another network"):
        load_weights(narrow(), tmp_path / "weights.pt", strict=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value, tmp_path):
    state = narrow(seed=1).state_dict()
    state["layer1.0.bn1.weight"][0] = value
    torch.save(state, tmp_path / "weights.pt")
    model = narrow(seed=2)
    with pytest.raises(ValueError, match=r"1 tensors hold NaN or infinity \(layer1.0.bn1.weight\)"):
        load_weights(model, tmp_path / "weights.pt")
    assert states_equal(model, narrow(seed=2))


def test_a_pickled_model_is_refused_and_never_run(tmp_path):
    torch.save(narrow(), tmp_path / "whole.pt")
    with pytest.raises(ValueError, match="save the state dict alone") as caught:
        load_weights(narrow(), tmp_path / "whole.pt")
    assert "\n" not in str(caught.value)
    assert "whole.pt" in str(caught.value)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_truncated_files_are_named(form, fraction, tmp_path):
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pt")
    state = narrow().state_dict()
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    os.truncate(path, int(fraction * path.stat().st_size))
    said = r"weights\.\w+: not a (complete )?(PyTorch|safetensors)"
    with pytest.raises(ValueError, match=said) as caught:
        load_weights(narrow(), path)
    assert "\n" not in str(caught.value)
    assert "not a complete" not in str(caught.value) or str(caught.value).endswith("get it again")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"epoch": 3, "loss": 0.1}, r"holds no state dict \(found: epoch, loss\)"),
        ([], r"holds no state dict \(found: list\)"),
        (torch.zeros(3), r"holds no state dict \(found: Tensor\)"),
    ],
)
def test_files_without_a_state_dict(content, said, tmp_path):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=said):
        read_checkpoint(tmp_path / "other.pt")


def test_a_web_page_and_an_absent_file(tmp_path):
    (tmp_path / "page.pt").write_text("<!DOCTYPE html>")
    with pytest.raises(ValueError, match="was a web page saved instead"):
        read_checkpoint(tmp_path / "page.pt")
    with pytest.raises(ValueError, match="no such file"):
        read_checkpoint(tmp_path / "absent.pt")


PUBLISHED = {
    "resnet2b.pth": "resnet2b",
    "cifar_cnn_a_adv.model": "cnn_a",
    "cifar_cnn_a_adv_alt.model": "cnn_a",
    "cifar_wide.pth": "cifar_wide",
    "cifar_base.pth": "cifar_base",
    "trades_model_mnist_smallcnn.pt": "trades_small_cnn",
}


@pytest.fixture(scope="module")
def folders():
    names = ("HARPRUNE_TEST_CHECKPOINTS", "HARPRUNE_TEST_DATA")
    absent = [name for name in names if not os.environ.get(name)]
    if absent:
        pytest.skip(f"{' and '.join(absent)} not set")
    return [Path(os.environ[name]) for name in names]


@pytest.fixture(scope="module")
def test_splits(folders):
    return {name: load_dataset(name, folders[1]).test for name in ("cifar10", "mnist")}


@pytest.mark.parametrize("file", PUBLISHED)
def test_published_checkpoints_reach_their_clean_accuracy(file, folders, test_splits):
    manifest = json.loads((folders[0] / "MANIFEST.json").read_text())
    entry = manifest[file]
    constants = manifest[entry["as"]] if "as" in entry else entry
    split = test_splits["mnist" if "mnist" in file else "cifar10"]
    channels = split.shape[0]
    mean, std = (constants[key] or None for key in ("mean", "std"))
    normalisation = {} if mean is None else {"mean": mean, "std": std}
    model = create_model(PUBLISHED[file], 10, in_channels=channels, **normalisation)
    assert load_weights(model, folders[0] / file).complete
    model.eval()
    correct = 0
    with torch.no_grad():
        for x, y in zip(split.images.split(500), split.labels.split(500)):
            correct += int((model(to_float(x)).argmax(1) == y).sum())
    # The figures are percentages of all 10,000 test images, so this is equality of counts.
    expected = (entry.get("measured") or entry["published"])["clean"]
    assert correct == round(100 * expected)


def endless() -> dict:
    content: dict = {}
    content["state_dict"] = content
    return content


@pytest.mark.parametrize("content", [endless(), [[[[[[[[[[[torch.zeros(1)]]]]]]]]]]]])
def test_wrappings_without_end_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "endless.pt")
    with pytest.raises(ValueError, match=r"endless\.pt: holds no state dict"):
        read_checkpoint(tmp_path / "endless.pt")


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t.to(torch.complex64),
            "conv1.weight is a complex64 tensor, where the mod",
        ),
        (lambda t: t.to(torch.int8), "conv1.weight is a int8 tensor"),
        (lambda t: t.to_sparse(), "conv1.weight is a sparse_coo tensor"),
        (lambda t: t.double() + 1e300, "1 tensors hold NaN or infinity"),
    ],
)
def test_numbers_of_another_kind_are_refused(change, said, tmp_path):
    state = narrow().state_dict()
    state["conv1.weight"] = change(state["conv1.weight"])
    torch.save(state, tmp_path / "odd.pt")
    model = narrow(seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=said):
        load_weights(model, tmp_path / "odd.pt")
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
