# SPDX-License-Identifier: Apache-2.0
"""Which parameters of a model can be pruned: their names, shapes and the modules that hold them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import prod
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, *_TRANSPOSED)
"""Layers whose `weight` is prunable by default."""
_Place = tuple[str, nn.Module, str]
"""The name of a parameter, the module that holds it, and its name there."""
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class Layer:
    """One prunable parameter.

    `places` lists every (module, tensor name) that holds it: a shared weight has several, and is
    masked and counted once, under the name of the first. `output_axis` is the axis of its filters:
    0, but 1 in a transposed convolution. `groups` is the number of groups of a convolution, else 1.
    """

    name: str
    shape: torch.Size
    places: tuple[tuple[nn.Module, str], ...]
    output_axis: int = 0
    groups: int = 1

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def outputs(self) -> int:
        """Output units: filters of a convolution, rows of a linear layer."""
        return self.shape[self.output_axis] * (self.groups if self.output_axis else 1)

    @property
    def fan_in(self) -> int:
        """Weights that feed one output unit (kernel included)."""
        return self.size // self.outputs

    @property
    def weight(self) -> Tensor:
        """The tensor in force: masked if a mask is installed."""
        module, tensor_name = self.places[0]
        return getattr(module, tensor_name)

    @property
    def parameter(self) -> nn.Parameter:
        """The trainable tensor itself, below any mask."""
        module, tensor_name = self.places[0]
        return _parameter(module, tensor_name)


def prunable_layers(
    model: nn.Module, *, include: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> dict[str, Layer]:
    """The prunable parameters of `model` by name, in the model's order.

    By default the weights of all convolutions, transposed convolutions and linear layers, and the
    input projections of attention. `include` replaces that choice by name patterns
    (`"features.*"`), which may name any parameter with at least two axes; `exclude` takes away, a
    shared weight under any of its names.

    Raises:
        ValueError: a pattern matches nothing, or nothing is left to prune.
    """
    names = {name for name, _, _ in _parameters(model)}
    for pattern in (*(include or ()), *exclude):
        _require_match(pattern, names)
    held: dict[int, list[_Place]] = {}
    for place in _parameters(model):
        held.setdefault(id(_parameter(*place[1:])), []).append(place)

    layers = {
        places[0][0]: _layer(places)
        for places in held.values()
        if any(_is_included(place, include) for place in places)
        and not any(_matches(name, exclude) for name, _, _ in places)
        and _parameter(*places[0][1:]).dim() >= 2
    }
    if not layers:
        raise ValueError(
            "nothing to prune: no parameter with two or more axes is selected; "
            "widen `include` or shorten `exclude`"
        )
    return layers


def require_weights_of_its_own(
    model: nn.Module, *, include: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> None:
    """Refuse a layer whose weight is computed from other tensors, as under weight_norm.

    A mask over it would be computed away, or the layer would be neither pruned nor counted.

    Args:
        model: without masks.
        include, exclude: as in `prunable_layers`.

    Raises:
        ValueError: one of the layers to prune has no weight of its own.
    """
    computed = [
        (f"{prefix}.weight" if prefix else "weight", module, "weight")
        for prefix, module in model.named_modules()
        if isinstance(module, WEIGHTED) and module._parameters.get("weight") is None
    ]
    computed += [place for place in _parameters(model) if parametrize.is_parametrized(*place[1:])]
    for place in computed:
        if _is_included(place, include) and not _matches(place[0], exclude):
            raise ValueError(
                f"{place[0]} is computed from other tensors, as by weight_norm, spectral_norm or "
                "torch.nn.utils.prune; make it a parameter again before pruning, for instance by "
                "torch.nn.utils.parametrize.remove_parametrizations"
            )


def parametrizations(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """What the parametrised tensors of a module are computed by, by their names."""
    chains = getattr(module, "parametrizations", {})
    return dict(chains.items()) if parametrize.is_parametrized(module) else {}


def weights(layers: dict[str, Layer]) -> dict[str, Tensor]:
    """The unmasked weights of the layers, detached."""
    return {name: layer.parameter.detach() for name, layer in layers.items()}


def _layer(places: Sequence[_Place]) -> Layer:
    name, module, tensor_name = places[0]
    shape = _parameter(module, tensor_name).shape
    axis = 1 if isinstance(module, _TRANSPOSED) else 0
    groups = module.groups if isinstance(module, nn.modules.conv._ConvNd) else 1
    return Layer(name, shape, tuple((m, n) for _, m, n in places), axis, groups)


def _parameters(model: nn.Module) -> Iterator[_Place]:
    """Every (qualified name, holding module, tensor name), masks looked through."""
    for prefix, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList) or ".parametrizations." in prefix:
            continue
        own = [name for name, value in module._parameters.items() if value is not None]
        for tensor_name, chain in parametrizations(module).items():
            if isinstance(chain._parameters.get("original"), Tensor):
                own.append(tensor_name)
        for tensor_name in sorted(own, key=_declared):
            yield (f"{prefix}.{tensor_name}" if prefix else tensor_name), module, tensor_name


def _declared(tensor_name: str) -> tuple[bool, str]:
    # A mask moves `weight` behind `bias` in the module's own table; names must not change order.
    return tensor_name == "bias", tensor_name


def _parameter(module: nn.Module, tensor_name: str) -> nn.Parameter:
    chain = parametrizations(module).get(tensor_name)
    found = module._parameters[tensor_name] if chain is None else chain.original
    return cast(nn.Parameter, found)


def _is_included(place: _Place, include: Sequence[str] | None) -> bool:
    name, module, tensor_name = place
    return _is_weight(module, tensor_name) if include is None else _matches(name, include)


def _is_weight(module: nn.Module, tensor_name: str) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return tensor_name in _PROJECTIONS
    return isinstance(module, WEIGHTED) and tensor_name == "weight"


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, p) or fnmatchcase(name, f"{p}.weight") for p in patterns)


def _require_match(pattern: str, names: set[str]) -> None:
    if not any(_matches(name, (pattern,)) for name in names):
        near = get_close_matches(pattern, sorted(names), n=1, cutoff=0.0)
        hint = f"; nearest is {near[0]!r}" if near else ""
        raise ValueError(f"layer pattern {pattern!r} matches no parameter of the model{hint}")
