# SPDX-License-Identifier: Apache-2.0
"""Whether layers compute with the very weights they hold, so that a zero among them stays one."""

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from harprune.sparsity.layers import WEIGHTED, prunable_layers

_FUNCTIONS = {"linear", *(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3))}
"""torch's functions whose second argument is a weight."""


def require_zeros_kept(
    model: nn.Module,
    example: Tensor,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
) -> None:
    """Refuse a layer that makes other numbers of zeros in its weight, as by standardising it.

    A copy of the model with half of its weights at zero is run once, in eval mode, and the weights
    that torch's convolutions and linear functions are given are traced back to those held. What
    pads, casts, scales or quantises passes.

    Args:
        model: without masks; it is not changed.
        example: a batch for it, of one.
        include, exclude: as in `prunable_layers`.

    Raises:
        ValueError: one of the layers to prune does so; or it cannot be told, for the layer has a
            forward of its own and calls no such function with its weight.
    """
    model = copy.deepcopy(model).eval()
    layers = prunable_layers(model, include=include, exclude=exclude)
    held = {name: layer.parameter.requires_grad_() for name, layer in layers.items()}
    _halve(held.values())
    with torch.enable_grad(), _Met() as met:
        getattr(model, "_orig_mod", model)(example)  # a compiled model as it was before
    seen = set()
    for weight in met.weights:
        for name in _computed_from(weight, held):
            seen.add(name)
            if (weight == 0).sum() < (held[name] == 0).sum():
                raise ValueError(
                    f"{name} is not what its layer computes with: zeros in it become other "
                    "numbers, as by weight standardisation, so that pruning would remove nothing; "
                    "leave it out by budget.exclude, or give the layer its final weights first"
                )
    for name, layer in layers.items():
        own = [type(m).__name__ for m, tensor in layer.places if _overrides(m, tensor)]
        if own and name not in seen:
            raise ValueError(
                f"{name} belongs to a {own[0]}, whose forward is its own and does not hand it to "
                "torch's convolution or linear function, so whether zeros stay zero cannot be "
                "told; leave it out by budget.exclude, or call that function"
            )


@torch.no_grad()
def _halve(weights: Iterable[Tensor]) -> None:
    """Random weights, half of them zero; those of the model may be zero from the start."""
    draw = torch.Generator().manual_seed(0)
    for weight in weights:
        kept = torch.rand(weight.shape, generator=draw) < 0.5
        weight.copy_(0.05 * torch.randn(weight.shape, generator=draw) * kept)


class _Met(TorchFunctionMode):
    """Collects the weights that are handed to `_FUNCTIONS`."""

    def __init__(self):
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = kwargs or {}
        if getattr(func, "__name__", "") in _FUNCTIONS:
            self.weights.append(given["weight"] if "weight" in given else args[1])
        return func(*args, **given)


def _computed_from(weight: Tensor, held: Mapping[str, Tensor]) -> list[str]:
    """The names of those that `weight` is, or is computed from and as large as."""
    itself = [name for name, parameter in held.items() if weight is parameter]
    if itself or not weight.requires_grad:
        return itself
    found = torch.autograd.grad(
        weight.sum(), list(held.values()), allow_unused=True, retain_graph=True
    )
    reached = [name for name, gradient in zip(held, found) if gradient is not None]
    return [name for name in reached if held[name].numel() == weight.numel()]


def _overrides(module: nn.Module, tensor: str) -> bool:
    """Whether a layer of torch's kinds has a forward of its own class."""
    kind = next((kind for kind in WEIGHTED if isinstance(module, kind)), None)
    return kind is not None and tensor == "weight" and type(module).forward is not kind.forward
