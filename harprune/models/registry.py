# SPDX-License-Identifier: Apache-2.0
"""Networks by name: those of this package, of the user's modules, of torchvision and of timm."""

import difflib
import fnmatch
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from harprune.arguments import require_text, require_whole
from harprune.models.deepmind import DeepMindPreActResNet, DeepMindWideResNet
from harprune.models.normalised import Normalised
from harprune.models.preact_resnet import PreActResNet
from harprune.models.published import ResNet2B, TradesSmallCNN, cnn_a
from harprune.models.resnet import BasicBlock, Bottleneck, ResNet, imagenet_resnet
from harprune.models.small import SmallCNN
from harprune.models.vgg import VGG
from harprune.models.wideresnet import WideResNet
from harprune.user_code import accepted, called, current_directory_importable, user_function

DEPTHS_18, DEPTHS_34_50 = (2, 2, 2, 2), (3, 4, 6, 3)

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "cifar_base": partial(cnn_a, width=8),
    "cifar_wide": cnn_a,
    "cnn_a": cnn_a,
    "dm_preact_resnet18": DeepMindPreActResNet,
    "dm_wrn28_10": partial(DeepMindWideResNet, 28, width=160),
    "dm_wrn70_16": partial(DeepMindWideResNet, 70, width=256),
    "preact_resnet18": PreActResNet,
    "resnet18": partial(ResNet, BasicBlock, DEPTHS_18),
    "resnet18_imagenet": partial(imagenet_resnet, BasicBlock, DEPTHS_18),
    # The weights of resnet18 at a quarter of its operations.
    "resnet18_strided": partial(ResNet, BasicBlock, DEPTHS_18, stem=(3, 2, False)),
    "resnet2b": ResNet2B,
    "resnet34": partial(ResNet, BasicBlock, DEPTHS_34_50),
    "resnet34_imagenet": partial(imagenet_resnet, BasicBlock, DEPTHS_34_50),
    "resnet50": partial(ResNet, Bottleneck, DEPTHS_34_50),
    "resnet50_imagenet": partial(imagenet_resnet, Bottleneck, DEPTHS_34_50),
    "small_cnn": SmallCNN,
    "trades_small_cnn": TradesSmallCNN,
    "vgg16_bn": VGG,
    "wrn28_10": partial(WideResNet, 28, width=160),
    "wrn28_4": partial(WideResNet, 28, width=64),
    "wrn34_10": partial(WideResNet, 34, width=160),
}
"""Called with the number of classes, `in_channels=` and, where it is another one, `width=`."""


def list_models(pattern: str = "*") -> list[str]:
    """Names of this package's networks that match a shell pattern, sorted."""
    require_text("pattern", pattern, "resnet*")
    return sorted(fnmatch.filter(NETWORKS, pattern))


def create_model(
    name: str,
    num_classes: int,
    *,
    in_channels: int = 3,
    width: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """A network (N, C, H, W) in [0, 1] -> logits (N, num_classes).

    Args:
        name: one of `list_models()`; `module:function` of the user, found from the current
            directory, called with
            `num_classes=`, `in_channels=` and `width=` as far as its signature takes them;
            `torchvision:NAME`; `timm:NAME`.
        num_classes: number of logits, at least 2.
        in_channels: channels of the images.
        width: channels of the first stage; None takes the network's own.
        mean, std: one value per channel; given together, the network is wrapped in `Normalised`.

    Raises:
        ValueError: an unknown name, a package that is not installed, or a value out of its range.
    """
    require_text("name", name, "resnet18")
    require_whole("num_classes", num_classes, 2)
    require_whole("in_channels", in_channels, 1)
    if width is not None:
        require_whole("width", width, 1)
    _check_normalisation(mean, std, in_channels)
    network = _build(name, num_classes, in_channels, width)
    if mean is None or std is None:
        return network
    return Normalised(network, mean, std)


def require_module(model: Any) -> None:
    """Raises ValueError where what a caller gives as a network is none."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model is a {type(model).__name__}, not a torch.nn.Module; give a network, as "
            "harprune.create_model makes one by its name"
        )
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "model is compiled by torch.compile; give the network itself, model._orig_mod"
        )
    _require_shaped(model, "model")


def _require_shaped(network: nn.Module, what: str) -> None:
    tensors = (*network.named_parameters(), *network.named_buffers())
    shapeless = next((name for name, tensor in tensors if is_lazy(tensor)), None)
    if shapeless is not None:
        raise ValueError(
            f"{what}: {shapeless} has no shape yet; run the network on images once before it is "
            "given"
        )


def _check_normalisation(
    mean: Sequence[float] | None, std: Sequence[float] | None, in_channels: int
) -> None:
    if (mean is None) != (std is None):
        raise ValueError(
            "mean and std go together: give both, or neither for images used as they are"
        )
    for what, values in (("mean", mean), ("std", std)):
        if values is None:
            continue
        try:
            [float(value) for value in values]
        except (TypeError, ValueError):
            raise ValueError(
                f"{what} = {values!r} must be a list of numbers, one per channel"
            ) from None
        if len(values) != in_channels:
            raise ValueError(
                f"{what} has {len(values)} values but the images have {in_channels} channels; "
                "give one per channel"
            )


def _build(name: str, num_classes: int, in_channels: int, width: int | None) -> nn.Module:
    source, colon, member = name.partition(":")
    if not colon:
        return _own(name)(num_classes, in_channels=in_channels, **_given(width))
    if source == "torchvision":
        return _from_torchvision(member, num_classes, in_channels, width)
    if source == "timm":
        return _from_timm(member, num_classes, in_channels, width)
    return _from_user(name, num_classes, in_channels, width)


def _given(width: int | None) -> dict[str, int]:
    return {} if width is None else {"width": width}


def _own(name: str) -> Callable[..., nn.Module]:
    if name in NETWORKS:
        return NETWORKS[name]
    near = difflib.get_close_matches(name, NETWORKS, n=3, cutoff=0.4) or list_models()
    raise ValueError(
        f"unknown model {name!r}; nearest: {', '.join(near)}; `module:function` names one of "
        "your own"
    )


def _from_torchvision(
    name: str, num_classes: int, in_channels: int, width: int | None
) -> nn.Module:
    torchvision = _package("torchvision")
    _refuse_width("torchvision", width)
    if in_channels != 3:
        raise ValueError(f"torchvision:{name} takes 3 channels, not {in_channels}; use timm:{name}")
    if name not in torchvision.models.list_models():
        raise ValueError(_unknown_member("torchvision", name, torchvision.models.list_models()))
    return torchvision.models.get_model(name, weights=None, num_classes=num_classes)


def _from_timm(name: str, num_classes: int, in_channels: int, width: int | None) -> nn.Module:
    timm = _package("timm")
    _refuse_width("timm", width)
    if not timm.is_model(name):
        raise ValueError(_unknown_member("timm", name, timm.list_models()))
    return timm.create_model(name, num_classes=num_classes, in_chans=in_channels)


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    # A torchvision built for another torch fails with RuntimeError.
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"{name} cannot be imported ({error}); install it with `pip install harprune[{name}]`"
        ) from error


def _refuse_width(package: str, width: int | None) -> None:
    if width is not None:
        raise ValueError(f"width={width} cannot be set for a network of {package}; leave it out")


def _unknown_member(package: str, name: str, known: Sequence[str]) -> str:
    near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.4)) or "none"
    return f"{package} has no model {name!r}; nearest: {near}"


def _require_callable_with(name: str, function: Callable, taken: Mapping[str, Any]) -> None:
    try:
        inspect.signature(function).bind(**taken)
    except TypeError as error:
        raise ValueError(
            f"{name} cannot be called with {', '.join(taken) or 'nothing'} ({error}); give its "
            "other arguments defaults"
        ) from None


def _from_user(name: str, num_classes: int, in_channels: int, width: int | None) -> nn.Module:
    with current_directory_importable():
        function = user_function(name, "model")
        offered = {"num_classes": num_classes, "in_channels": in_channels, **_given(width)}
        taken = accepted(function, offered)
        if width is not None and "width" not in taken:
            raise ValueError(f"{name} takes no width; leave out width={width} or add the argument")
        _require_callable_with(name, function, taken)
        network = called(name, function, taken)
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"{name} returned {type(network).__name__}; it must return a torch.nn.Module"
        )
    _require_shaped(network, name)
    return network
