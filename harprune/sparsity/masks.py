# SPDX-License-Identifier: Apache-2.0
"""Masks as parametrisations: a layer's weight *becomes* weight * mask, on any `nn.Module`.

While a mask is installed the model is ordinary PyTorch: it trains, copies and attacks as before.
`freeze` fixes what was learned, `bake` removes the mechanism and leaves plain tensors.

A parametrised model cannot be pickled whole, `type(layer) is nn.Conv2d` is false for its layers
(use isinstance), and its state-dict keys change (`conv.parametrizations.weight.original`).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from harprune.sparsity.density import Density
from harprune.sparsity.kinds import Weighted
from harprune.sparsity.layers import Layer, parametrizations, prunable_layers
from harprune.sparsity.selection import keep_top, top_fraction


class Mask(nn.Module, ABC):
    """weight -> weight * mask, the mask broadcastable to the weight."""

    @abstractmethod
    def mask(self) -> Tensor:
        """The mask in force, of zeros and ones."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask().to(weight.dtype)


Kind = TypeVar("Kind", bound=Mask)


class KeptMask(Mask):
    """A mask that is held: `kept` is boolean, one entry per unit."""

    kept: Tensor

    def __init__(self, kept: Tensor):
        super().__init__()
        if kept.dtype != torch.bool:
            raise ValueError(f"a mask must be boolean, not {kept.dtype}; compare with zero")
        self.register_buffer("kept", kept)

    def mask(self) -> Tensor:
        return self.kept


class FixedMask(KeptMask):
    """A mask that no longer changes."""


class OpenMask(Mask):
    """Lets every weight through. Its buffers are a method's notes, saved with the model."""

    def __init__(self, **notes: Tensor):
        super().__init__()
        for name, value in notes.items():
            self.register_buffer(name, value)

    def mask(self) -> Tensor:
        return torch.ones(())

    def forward(self, weight: Tensor) -> Tensor:
        return weight


class LearnedMask(Mask):
    """The top `density` of |scores|; gradients flow straight through to both."""

    def __init__(self, scores: Tensor, density: Density):
        super().__init__()
        self.scores = nn.Parameter(scores.detach().clone())
        self.density = density

    def mask(self) -> Tensor:
        return top_fraction(self.scores, self.density())


class KeptWeights(nn.Module):
    """kept values -> weight: the parameter holds nothing but what a `FixedMask` keeps."""

    kept: Tensor
    index: Tensor

    def __init__(self, kept: Tensor):
        super().__init__()
        self.register_buffer("kept", kept)
        self.register_buffer("index", kept.flatten().nonzero().flatten(), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        weight = values.new_zeros(self.kept.numel()).index_put((self.index,), values)
        return weight.view(self.kept.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight.flatten()[self.index]

    def _load_from_state_dict(self, *arguments, **options) -> None:
        super()._load_from_state_dict(*arguments, **options)
        self.index = self.kept.flatten().nonzero().flatten()


def install(layer: Layer, mask: Mask) -> None:
    """Put `mask` on every place that holds the layer's weight, in place of an earlier one.

    It moves to the weight's device, and so does the density it may share with other layers.
    """
    device = layer.parameter.device
    if any(tensor.device != device for tensor in (*mask.parameters(), *mask.buffers())):
        mask.to(device)
    for module, tensor_name in layer.places:
        if parametrize.is_parametrized(module, tensor_name):
            parametrizations(module)[tensor_name][0] = mask
        else:
            # `unsafe` spares one trial evaluation of the mask; shape and dtype are ours to keep.
            parametrize.register_parametrization(module, tensor_name, mask, unsafe=True)


def installed(model: nn.Module) -> dict[str, tuple[Layer, Mask]]:
    """The masked layers of `model` by name, each with its mask."""
    found = {}
    names = [n for n, m in model.named_modules() if parametrize.is_parametrized(m)]
    if not names:
        return {}
    for name, layer in prunable_layers(model, include=("*",)).items():
        module, tensor_name = layer.places[0]
        chain = parametrizations(module).get(tensor_name)
        if chain is not None and isinstance(chain[0], Mask):
            found[name] = (layer, chain[0])
    return found


def of_kind(model: nn.Module, kind: type[Kind]) -> dict[str, tuple[Layer, Kind]]:
    """The layers of `model` under a mask of this kind by name, each with its mask."""
    return {n: (layer, m) for n, (layer, m) in installed(model).items() if isinstance(m, kind)}


def densities(model: nn.Module) -> dict[str, Tensor]:
    """The density of each layer under a `LearnedMask`, as differentiable scalars."""
    return {name: mask.density() for name, (_, mask) in of_kind(model, LearnedMask).items()}


@torch.no_grad()
def freeze(model: nn.Module, counts: Mapping[str, int]) -> None:
    """Replace each `LearnedMask` by the `FixedMask` of its `counts[name]` best units."""
    for name, (layer, mask) in of_kind(model, LearnedMask).items():
        fix(layer, keep_top(mask.scores, counts[name]).bool())


@torch.no_grad()
def fix(layer: Layer, kept: Tensor) -> None:
    """Install the boolean mask `kept` and set the pruned weights themselves to zero.

    With their gradient masked they then stay zero under momentum and weight decay.
    """
    install(layer, FixedMask(kept))
    layer.parameter.mul_(kept.to(layer.parameter.dtype))


@torch.no_grad()
def compact(model: nn.Module) -> None:
    """Let each parameter under a `FixedMask` of single weights hold the kept ones alone.

    Gradients and optimiser states then cost what is kept. `expand` undoes it.
    """
    for layer, mask in of_kind(model, FixedMask).values():
        if mask.kept.shape == layer.shape:
            values = KeptWeights(mask.kept)
            _exchange(layer.places, values, values.right_inverse(layer.parameter))


@torch.no_grad()
def expand(model: nn.Module) -> None:
    """Undo `compact`: dense parameters under `FixedMask`s, with the values of now."""
    places: dict[Tensor, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, chain in parametrizations(module).items():
            if isinstance(chain[0], KeptWeights):
                places.setdefault(chain.original, []).append((module, name))
    for values, shared in places.items():
        module, name = shared[0]
        weights = cast(KeptWeights, parametrizations(module)[name][0])
        _exchange(shared, FixedMask(weights.kept), weights(values))


def _exchange(places, parametrization: nn.Module, values: Tensor) -> None:
    """Another parametrisation of the same weight, over one new parameter for all its places."""
    module, name = places[0]
    frozen = not parametrizations(module)[name].original.requires_grad
    parameter = nn.Parameter(values, requires_grad=not frozen)
    for module, name in places:
        chain = parametrizations(module)[name]
        chain[0], chain.original = parametrization, parameter


def kept_masks(model: nn.Module) -> dict[str, Tensor]:
    """The boolean masks of all layers under a `FixedMask`."""
    return {name: mask.kept for name, (_, mask) in of_kind(model, FixedMask).items()}


@dataclass(frozen=True, eq=False)
class Held:
    """How a layer holds its weights while it trains.

    Attributes:
        tensor: what learns: the weight in force, or a vector of its kept values alone.
        kept: which weights are kept, where that is fixed: only these then get a gradient.
    """

    tensor: Tensor
    kept: Tensor | None = None

    @classmethod
    def of(cls, layer: Weighted) -> "Held":
        """How `layer` holds them now: dense, under a fixed mask, or as kept values alone."""
        chain = parametrizations(layer).get("weight")
        if chain is None:
            return cls(layer.weight)
        match chain[0]:
            case KeptWeights(kept=kept):
                return cls(chain.original, kept)
            case FixedMask(kept=kept) if kept.shape == layer.weight.shape:
                return cls(layer.weight, kept)
        return cls(layer.weight)

    @property
    def compact(self) -> bool:
        """Whether `tensor` is that vector."""
        return self.tensor.dim() == 1


@torch.no_grad()
def bake(model: nn.Module) -> nn.Module:
    """Remove all masks in place and leave the products as plain parameters; returns `model`."""
    for layer, _ in installed(model).values():
        values = layer.weight.clone()
        for module, tensor_name in layer.places:
            _own_class(module)
            parametrize.remove_parametrizations(module, tensor_name, leave_parametrized=False)
        layer.parameter.copy_(values)
    return model


def _own_class(module: nn.Module) -> None:
    """Part a parametrised module from its copies: torch keeps the masked weight in their class,
    which `deepcopy` lets them share, and removes it from there."""
    shared = type(module)
    held = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = cast(type[nn.Module], type(shared.__name__, shared.__bases__, held))
