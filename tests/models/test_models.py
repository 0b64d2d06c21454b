# SPDX-License-Identifier: Apache-2.0
"""The networks: exact sizes, shapes, traceability, and their creation by name."""

import sys
from importlib.util import find_spec

import pytest
import torch
from torch import fx, nn

from harprune.models import create_model, list_models
from harprune.models.normalised import Normalised

# Networks whose first linear layer fixes the size of their images.
FIXED_SIZE = {
    "trades_small_cnn": 28,
    "resnet2b": 32,
    "cnn_a": 32,
    "cifar_wide": 32,
    "cifar_base": 32,
}


def prunable(model: nn.Module) -> list[int]:
    return [
        layer.weight.numel()
        for layer in model.modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]


@pytest.mark.parametrize(
    ("name", "num_classes", "weights", "layers"),
    [
        ("vgg16_bn", 10, 15_302_848, 16),
        ("resnet18", 10, 11_164_352, 21),
        ("resnet18_strided", 10, 11_164_352, 21),
        ("preact_resnet18", 10, 11_164_352, 21),
        ("resnet50_imagenet", 1000, 25_502_912, 54),
    ],
)
def test_prunable_weights_are_those_of_the_field(name, num_classes, weights, layers):
    with torch.device("meta"):
        counts = prunable(create_model(name, num_classes))
    assert (sum(counts), len(counts)) == (weights, layers)


@pytest.mark.parametrize(
    ("name", "in_channels", "num_classes", "parameters"),
    [
        # As published: torchvision's table, the WRN paper's 36.5 M and 46.2 M, the authors' files.
        ("resnet18_imagenet", 3, 1000, 11_689_512),
        ("resnet34_imagenet", 3, 1000, 21_797_672),
        ("resnet50_imagenet", 3, 1000, 25_557_032),
        ("wrn28_10", 3, 10, 36_479_194),
        ("wrn34_10", 3, 10, 46_160_474),
        ("wrn28_4", 3, 10, 5_849_050),
        ("trades_small_cnn", 1, 10, 312_202),
        ("resnet2b", 3, 10, 112_006),
        ("cnn_a", 3, 10, 214_918),
        ("cifar_base", 3, 10, 105_966),
        # RobustBench's definitions have as many.
        ("dm_wrn28_10", 3, 10, 36_479_194),
        ("dm_wrn70_16", 3, 10, 266_796_506),
        ("dm_preact_resnet18", 3, 10, 12_548_426),
    ],
)
def test_parameters_are_those_published(name, in_channels, num_classes, parameters):
    with torch.device("meta"):
        model = create_model(name, num_classes, in_channels=in_channels)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_small_cnn_has_about_a_hundred_thousand_weights():
    assert 90_000 < sum(prunable(create_model("small_cnn", 10))) < 110_000


@pytest.mark.parametrize("name", list_models())
def test_every_network_is_traceable_and_gives_logits(name):
    torch.manual_seed(0)
    width = 4 if name.startswith(("wrn", "vgg", "resnet", "preact", "dm")) else None
    model = create_model(name, 7, in_channels=1, width=width).eval()
    sizes = (FIXED_SIZE[name],) if name in FIXED_SIZE else (32, 48)
    traced = fx.symbolic_trace(model)
    for size in sizes:
        x = torch.rand(2, 1, size, size)
        logits = model(x)
        assert logits.shape == (2, 7)
        assert torch.equal(traced(x), logits)
        assert logits.std() > 0


@pytest.mark.parametrize("size", [8, 28, 64])
def test_small_cnn_takes_digits_and_photographs(size):
    assert create_model("small_cnn", 10)(torch.rand(2, 3, size, size)).shape == (2, 10)


def test_a_strided_stem_quarters_the_operations():
    sizes = []
    for name in ("resnet18", "resnet18_strided"):
        model = create_model(name, 10, width=4)
        model.layer4.register_forward_hook(lambda _, __, out: sizes.append(out.shape[-2:].numel()))
        model(torch.rand(2, 3, 64, 64))
    assert sizes[0] == 4 * sizes[1]


@pytest.mark.parametrize(
    "name",
    ["vgg16_bn", "resnet18", "preact_resnet18", "wrn28_4", "small_cnn", "dm_preact_resnet18"],
)
def test_width_scales_the_first_stage(name):
    def stage_channels(width):
        model = create_model(name, 10, width=width)
        return max(layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d))

    assert stage_channels(8) * 2 == stage_channels(16)


def test_gradients_reach_every_parameter_of_every_family():
    families = ("vgg16_bn", "resnet50", "preact_resnet18", "wrn28_4", "small_cnn", "resnet2b")
    for name in (*families, "dm_wrn28_10", "dm_preact_resnet18"):
        torch.manual_seed(0)
        model = create_model(name, 10, width=4)
        model(torch.rand(4, 3, 32, 32)).square().sum().backward()
        still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert not still, name


def test_normalised_equals_normalising_by_hand_and_keeps_its_constants_out_of_the_state():
    torch.manual_seed(0)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    model = create_model("small_cnn", 10, mean=mean, std=std).eval()
    x = torch.rand(2, 3, 8, 8)
    by_hand = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    torch.testing.assert_close(model(x), model.network(by_hand))
    assert all(name.startswith("network.") for name in model.state_dict())
    assert torch.equal(fx.symbolic_trace(model)(x), model(x))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"mean": [0.5, 0.5], "std": [1.0, 1.0]}, "mean has 2 values but the images have 3"),
        ({"mean": [0.5] * 3, "std": [1.0]}, "std has 1 values but the images have 3"),
        ({"mean": [0.5] * 3}, "mean and std go together"),
        ({"mean": [0.5] * 3, "std": [1.0, 0.0, 1.0]}, "must be finite and std"),
        ({"num_classes": 1}, "num_classes = 1 must be at least 2"),
        ({"in_channels": 0}, "in_channels = 0 must be at least 1"),
        ({"width": 0}, "width = 0 must be at least 1"),
    ],
)
def test_bad_values_are_named(arguments, said):
    with pytest.raises(ValueError, match=said) as caught:
        create_model("small_cnn", **{"num_classes": 10, **arguments})
    assert "\n" not in str(caught.value)


def test_normalised_alone_checks_its_lengths():
    with pytest.raises(ValueError, match="mean has 1 values and std 2"):
        Normalised(nn.Identity(), [0.5], [1.0, 1.0])


def test_unknown_names_bring_the_nearest():
    with pytest.raises(ValueError, match=r"unknown model 'resnet81'; nearest: .*resnet18"):
        create_model("resnet81", 10)


def test_list_models_takes_a_pattern():
    assert list_models("wrn*") == ["wrn28_10", "wrn28_4", "wrn34_10"]
    assert list_models("nothing*") == []


MODULE = """
from torch import nn

def plain(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes))

def channels(num_classes, in_channels, width=5):
    layers = nn.Conv2d(in_channels, width, 2), nn.Flatten(), nn.Linear(width, num_classes)
    return nn.Sequential(*layers)

def anything(**arguments):
    return nn.Linear(arguments["in_channels"], arguments["num_classes"])

def wrong(num_classes):
    return num_classes

def lazy(num_classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "my_networks.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield
    sys.modules.pop("my_networks", None)
    assert sys.path == path


@pytest.mark.usefixtures("user_module")
def test_functions_of_the_user_get_what_they_take():
    assert create_model("my_networks:plain", 4)(torch.rand(2, 3, 2, 2)).shape == (2, 4)
    model = create_model("my_networks:channels", 4, in_channels=2, width=6)
    assert model[0].weight.shape == (6, 2, 2, 2)
    assert create_model("my_networks:anything", 4, in_channels=2).weight.shape == (4, 2)


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("my_networks:absent", "defines no function 'absent'"),
        ("my_networks_absent:plain", "cannot import 'my_networks_absent' from"),
        ("my_networks:wrong", "returned int; it must return a torch.nn.Module"),
        ("my_networks:lazy", "my_networks:lazy: 1.weight has no shape yet; run the network on"),
        ("my_networks:", "is not of the form module:function"),
        (":plain", "is not of the form module:function"),
    ],
)
def test_functions_of_the_user_that_do_not_work(name, said):
    with pytest.raises(ValueError, match=said):
        create_model(name, 4)


@pytest.mark.usefixtures("user_module")
def test_width_for_a_function_without_width_is_refused():
    with pytest.raises(ValueError, match="takes no width"):
        create_model("my_networks:plain", 4, width=8)


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_a_package_that_is_absent_is_named_with_its_extra(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"pip install harprune\[{package}\]") as caught:
        create_model(f"{package}:resnet18", 10)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
def test_torchvision_networks():
    names = ("torchvision:resnet18", "resnet18_imagenet")
    theirs, ours = (prunable(create_model(name, 10)) for name in names)
    assert sum(theirs) == sum(ours)
    with pytest.raises(ValueError, match="takes 3 channels, not 1"):
        create_model("torchvision:resnet18", 10, in_channels=1)


@pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")
def test_timm_networks():
    model = create_model("timm:resnet18", 10, in_channels=1)
    assert model(torch.rand(2, 1, 64, 64)).shape == (2, 10)
    with pytest.raises(ValueError, match="timm has no model 'resnet81'; nearest: resnet"):
        create_model("timm:resnet81", 10)


@pytest.mark.parametrize(
    ("name", "first"), [("dm_wrn28_10", "conv_0"), ("dm_preact_resnet18", "conv_2d_1")]
)
def test_deepminds_networks_pad_as_tensorflow_does(name, first):
    torch.manual_seed(0)
    model = create_model(name, 10, width=4).eval()
    block = (model.layer[1].block if name == "dm_wrn28_10" else model.layer_1)[0]
    seen = []
    layer = getattr(block, first)
    layer.register_forward_hook(lambda module, given, out: seen.append((*given, out)))
    with torch.no_grad():
        model(torch.rand(2, 3, 32, 32))
    ((padded, out),) = seen
    # SAME: one column more where a window of three goes over 32 columns by steps of two.
    assert padded.shape[-2:] == (33, 33) and out.shape[-2:] == (16, 16)
    assert not padded[..., -1, :].any() and not padded[..., -1].any()
    assert padded[..., 0, :].any() and padded[..., 0].any()
