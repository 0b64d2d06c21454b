# SPDX-License-Identifier: Apache-2.0
"""A model in eval mode as a fixed function: masks multiplied out and batch norm folded.

`frozen` puts a module that holds nothing but its present tensors in the place of each layer of a
trace. They are read off the model, again whenever it has changed.
"""

from collections.abc import Callable
from functools import partial
from operator import attrgetter

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from harprune.kernels import graph as g
from harprune.modes import eval_mode
from harprune.sparsity.kinds import (
    RunningNorm,
    Weighted,
    is_convolution,
    is_running_norm,
    is_weighted,
)
from harprune.sparsity.masks import Held
from harprune.sparsity.tracing import CONSTANT, traced

_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout)


def frozen(model: nn.Module) -> fx.GraphModule:
    """A trace of `model` in eval mode.

    Its convolutions, linear layers, batch norms and tensors are `Frozen` modules, which `read`
    fills.

    Raises:
        Untraceable: there is no trace to trust.
    """
    with eval_mode(model):
        network = traced(model)
    modules: dict[str, nn.Module] = dict(network.named_modules())
    for node in list(network.graph.nodes):
        layer = modules[node.target] if node.op == "call_module" else None
        if is_weighted(layer) or is_running_norm(layer):
            _freeze(network, node, layer, modules)
        elif _is_asleep(node, modules):
            node.replace_all_uses_with(node.args[0])
            network.graph.erase_node(node)
        elif node.op == "get_attr":
            holder = network if node.target.startswith(CONSTANT) else model
            _freeze_tensor(network, node, partial(attrgetter(node.target), holder))
        elif isinstance(layer, parametrize.ParametrizationList):
            _freeze_tensor(network, node, layer)
    network.graph.eliminate_dead_code()
    network.delete_all_unused_submodules()
    network.recompile()
    return network


def _is_asleep(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node is a dropout in eval mode."""
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], nn.modules.dropout._DropoutNd)
    given = dict(zip(("input", "p", "training"), node.args)) | node.kwargs
    return node.target in _DROPOUTS and bool(node.args) and given.get("training") is False


def _freeze(
    network: fx.GraphModule,
    node: fx.Node,
    layer: Weighted | RunningNorm,
    modules: dict[str, nn.Module],
) -> None:
    """Put a frozen copy in the place of `node`, and of the batch norm behind a convolution."""
    follower = next(iter(node.users)) if len(node.users) == 1 else None
    norm = None
    if is_convolution(layer) and follower is not None and follower.op == "call_module":
        candidate = modules[str(follower.target)]
        norm = candidate if is_running_norm(candidate) else None
    key = f"frozen_{node.name}"
    made = FrozenLayer(layer, norm) if isinstance(layer, Weighted) else FrozenNorm(layer)
    network.add_submodule(key, made)
    node.target, modules[key] = key, made
    if follower is not None and norm is not None:
        follower.replace_all_uses_with(node)
        network.graph.erase_node(follower)


def _freeze_tensor(network: fx.GraphModule, node: fx.Node, source: Callable[[], Tensor]) -> None:
    key = f"frozen_{node.name}"
    network.add_submodule(key, _FrozenTensor(source))
    node.op, node.target, node.args, node.kwargs = "call_module", key, (), {}


def role_of_frozen(module: nn.Module) -> type[g.Node] | None:
    """What a module of a frozen network is to the kernels."""
    if isinstance(module, FrozenLayer):
        return g.Convolution
    return g.Affine if isinstance(module, FrozenNorm) else None


class Frozen(nn.Module):
    """Stands for a module of the model; `read` takes its present tensors, detached."""

    def read(self, dtype: torch.dtype | None, layout: torch.memory_format) -> None:
        raise NotImplementedError


class FrozenLayer(Frozen):
    """A convolution or linear layer, masked, with the batch norm that follows folded in.

    Attributes:
        weight, bias: as they were read.
        kept: the layer's mask, if that is fixed.
    """

    weight: Tensor
    bias: Tensor | None
    kept: Tensor | None

    def __init__(self, layer: Weighted, norm: RunningNorm | None):
        super().__init__()
        # In a tuple, so that the model's modules do not become submodules of its twin.
        self._source = (layer, norm)

    @property
    def layer(self) -> Weighted:
        """The convolution or linear layer that this one stands for."""
        return self._source[0]

    def read(self, dtype: torch.dtype | None, layout: torch.memory_format) -> None:
        layer, norm = self._source
        # A weight read without a graph inside `parametrize.cached()` would stay cached that way,
        # and the loss that follows the attack would silently train nothing.
        with torch.enable_grad():
            weight, self.kept = layer.weight.detach(), Held.of(layer).kept
        bias = None if layer.bias is None else layer.bias.detach()
        if norm is not None:
            scale, shift = _scale_and_shift(norm)
            weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
            bias = shift if bias is None else bias * scale + shift
        dtype = dtype or weight.dtype
        layout = layout if weight.dim() == 4 else torch.contiguous_format
        # A copy where folding has not made one: the function must not follow the model's training.
        own = norm is None
        self.weight = weight.to(dtype, copy=own, memory_format=layout)
        self.bias = None if bias is None else bias.to(dtype, copy=own)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return F.linear(x, self.weight, self.bias)
        return layer._conv_forward(x, self.weight, self.bias)


class FrozenNorm(Frozen):
    """A batch norm in eval mode that no convolution precedes: one multiply-add per value."""

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: RunningNorm):
        super().__init__()
        self._source = (norm,)

    def read(self, dtype: torch.dtype | None, layout: torch.memory_format) -> None:
        scale, shift = _scale_and_shift(self._source[0])
        self.scale, self.shift = scale.to(dtype or scale.dtype), shift.to(dtype or shift.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return affine(x, self.scale, self.shift)


class _FrozenTensor(Frozen):
    """A tensor that the model's own forward reads: a buffer, a parameter, a masked weight."""

    value: Tensor

    def __init__(self, source: Callable[[], Tensor]):
        super().__init__()
        self._source = (source,)

    def read(self, dtype: torch.dtype | None, layout: torch.memory_format) -> None:
        value = self._source[0]().detach()
        lower = dtype if value.is_floating_point() else None
        self.value = value.to(lower or value.dtype, copy=True)

    def forward(self) -> Tensor:
        return self.value


def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale[c] x + shift[c] for each channel c of (N, C, ...)."""
    shape = (-1, *[1] * (x.dim() - 2))
    return x * scale.view(shape) + shift.view(shape)


def _scale_and_shift(norm: RunningNorm) -> tuple[Tensor, Tensor]:
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach()
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach()
