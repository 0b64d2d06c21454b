# SPDX-License-Identifier: Apache-2.0
"""Run a masked model at the cost of its density: the twin, and the training twin.

Inside an attack, and in evaluation, a model is a fixed function in eval mode: weights and masks do
not change and nobody asks for their gradients. `twin` builds that function once from any traceable
model, with masks multiplied out and batch norm folded into the convolution before it.
`Twin.current()` reads the weights anew, once per optimiser step. On a CPU it runs on the sparse
kernels, elsewhere in torch with channels innermost. The result equals the model's to float
tolerance, and gradients to the input flow through it.

`training_twin` is a model in training mode on the kernels, with gradients to its parameters.
"""

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import TypeGuard, get_args

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from harprune.kernels import Backend, native
from harprune.kernels import graph as kernel_nodes
from harprune.modes import eval_mode
from harprune.sparsity.bridge import (
    FunctionRegion,
    Held,
    RunningNorm,
    Trained,
    TrainingRegion,
    Weighted,
    kernels_for,
)
from harprune.sparsity.layers import parametrizations
from harprune.sparsity.masks import FixedMask, KeptWeights
from harprune.sparsity.regions import split
from harprune.sparsity.tracing import CONSTANT, Untraceable, traced

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def require_backend(execution: Backend) -> None:
    """Raise ValueError for what is no `Backend`, and for "sparse" without compiled kernels."""
    if execution not in get_args(Backend):
        known = ", ".join(get_args(Backend))
        raise ValueError(f"execution = {execution!r} is unknown; choose one of {known}")
    if execution == "sparse" and native.best() is None:
        raise ValueError(
            "execution 'sparse' needs the compiled kernels, which this installation lacks; install "
            "a C compiler and reinstall harprune, or choose 'auto' or 'dense'"
        )


class Twin:
    """The eval-mode function of a model, rebuilt from its weights on demand; see `twin`."""

    def __init__(self, network: fx.GraphModule, dtype: torch.dtype | None, sparse: bool):
        self._frozen = [m for m in network.modules() if isinstance(m, Frozen)]
        self._version = 0
        dense = _Cast(network, dtype)
        self._function = _OnKernels(dense, lambda: self._version) if sparse else dense
        self._dtype = dtype
        self._layout = torch.contiguous_format if sparse else torch.channels_last

    @torch.no_grad()
    def current(self) -> nn.Module:
        """The function at the model's present weights, masks and batch-norm statistics.

        The same module each time, without parameters of its own; logits in the dtype of x.
        """
        self._version += 1
        for module in self._frozen:
            module.read(self._dtype, self._layout)
        return self._function


def twin(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    execution: Backend = "auto",
    told: Callable[[str], None] = lambda reason: None,
) -> Twin | None:
    """The `Twin` of `model`, or None where its own forward has to serve.

    Args:
        dtype: precision of the whole function, such as torch.bfloat16; None keeps the model's.
            A lower one makes a different, cheaper attack, run by torch: a choice to record.
        execution: what runs it on a CPU, see `Backend`.
        told: called with the reason where there is no twin.

    Raises:
        ValueError: as `require_backend`.
    """
    require_backend(execution)
    try:
        network = frozen(model)
    except Untraceable as reason:
        told(str(reason))
        return None
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    sparse = on_cpu and dtype is None and execution != "dense"
    return Twin(network, dtype, sparse and native.best() is not None)


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
        if _is_affine(layer):
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
    if _is_convolution(layer) and follower is not None and follower.op == "call_module":
        candidate = modules[str(follower.target)]
        norm = candidate if _is_frozen_norm(candidate) else None
    key = f"frozen_{node.name}"
    made = _FrozenLayer(layer, norm) if isinstance(layer, Weighted) else _FrozenNorm(layer)
    network.add_submodule(key, made)
    node.target, modules[key] = key, made
    if follower is not None and norm is not None:
        follower.replace_all_uses_with(node)
        network.graph.erase_node(follower)


def _freeze_tensor(network: fx.GraphModule, node: fx.Node, source: Callable[[], Tensor]) -> None:
    key = f"frozen_{node.name}"
    network.add_submodule(key, _FrozenTensor(source))
    node.op, node.target, node.args, node.kwargs = "call_module", key, (), {}


class _Cast(nn.Module):
    """Images in the layout and precision of the twin; logits back in the precision of x."""

    def __init__(self, network: fx.GraphModule, dtype: torch.dtype | None):
        super().__init__()
        self.network = network
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        inner = x if self.dtype is None else x.to(self.dtype)
        if x.dim() == 4:
            inner = inner.contiguous(memory_format=torch.channels_last)
        return self.network(inner).to(x.dtype)


class _OnKernels(nn.Module):
    """A frozen network whose regions run on the kernels, split anew for each shape of images."""

    def __init__(self, dense: _Cast, version):
        super().__init__()
        self.dense = dense
        self._read = version
        self._networks: dict[tuple, fx.GraphModule | None] = {}

    def forward(self, x: Tensor) -> Tensor:
        key = (x.dtype, *x.shape[1:])
        if key not in self._networks:
            self._networks[key] = self._split(x)
        network = self._networks[key]
        return self.dense(x) if network is None else network(x)

    def _split(self, x: Tensor) -> fx.GraphModule | None:
        if x.device.type != "cpu" or kernels_for(x.dtype) is None:
            return None
        whole = self.dense.network
        network = fx.GraphModule(whole, _copy(whole.graph))
        if not split(network, x[:1].detach(), role_of_frozen):
            return None
        for name, region in list(network.named_children()):
            if isinstance(region, fx.GraphModule) and name.startswith("fused_"):
                setattr(network, name, FunctionRegion(region, role_of_frozen, self._read))
        return network


def _copy(graph: fx.Graph) -> fx.Graph:
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    return copied


def role_of_frozen(module: nn.Module) -> type[kernel_nodes.Node] | None:
    """What a module of a frozen network is to the kernels."""
    if isinstance(module, _FrozenLayer):
        return kernel_nodes.Convolution
    return kernel_nodes.Affine if isinstance(module, _FrozenNorm) else None


class Frozen(nn.Module):
    """Stands for a module of the model; `read` takes its present tensors, detached."""

    def read(self, dtype: torch.dtype | None, layout: torch.memory_format) -> None:
        raise NotImplementedError


class _FrozenLayer(Frozen):
    """A convolution or linear layer, masked, with the batch norm that follows folded in."""

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
            weight, self.kept = layer.weight.detach(), held(layer).kept
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


class _FrozenNorm(Frozen):
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


def _is_affine(module: object) -> TypeGuard[Weighted | RunningNorm]:
    return _is_linear(module) or _is_convolution(module) or _is_frozen_norm(module)


def _is_linear(module: object) -> TypeGuard[nn.Linear]:
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _is_convolution(module: object) -> TypeGuard[Weighted]:
    # A mask makes a leaf of a user's own convolution, and says no more of what it overrides.
    return any(
        isinstance(module, kind)
        and type(module).forward is kind.forward
        and type(module)._conv_forward is kind._conv_forward
        for kind in _CONVOLUTIONS
    )


def _is_frozen_norm(module: object) -> TypeGuard[RunningNorm]:
    return isinstance(module, _BATCH_NORMS) and module.track_running_stats


class TrainingTwin(nn.Module):
    """A model that runs on the kernels while it trains, and as itself in eval mode."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self._networks: dict[tuple, fx.GraphModule | None] = {}

    def forward(self, x: Tensor) -> Tensor:
        """As the model's own forward; parameters get their gradients as usual."""
        if not self.model.training or x.device.type != "cpu" or kernels_for(x.dtype) is None:
            return self.model(x)
        key = (x.dtype, *x.shape[1:], _modes(self.model))
        if key not in self._networks:
            self._networks[key] = self._split(x)
        network = self._networks[key]
        return self.model(x) if network is None else network(x)

    def _split(self, x: Tensor) -> fx.GraphModule | None:
        try:
            network = traced(self.model)
        except Untraceable:
            return None
        frozen_norms = {m for m in self.model.modules() if not m.training and _is_frozen_norm(m)}

        def role(module: nn.Module) -> type[kernel_nodes.Node] | None:
            return None if module in frozen_norms else role_of_layer(module)

        # Shapes come from a run in eval mode: one image must not move batch-norm statistics.
        with eval_mode(self.model, network):
            if not split(network, x[:1].detach(), role):
                return None
        for name, region in list(network.named_children()):
            if isinstance(region, fx.GraphModule) and name.startswith("fused_"):
                setattr(network, name, TrainingRegion(region, role, held))
        return network


def training_twin(model: nn.Module, *, execution: Backend = "auto") -> TrainingTwin | None:
    """The `TrainingTwin` of `model`, or None where torch runs it.

    Raises:
        ValueError: as `require_backend`.
    """
    require_backend(execution)
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    if execution == "dense" or native.best() is None or not on_cpu:
        return None
    try:
        traced(model)
    except Untraceable:
        return None
    return TrainingTwin(model)


def role_of_layer(module: nn.Module) -> type[kernel_nodes.Node] | None:
    """What a layer of a model in training mode is to the kernels."""
    if _is_convolution(module) or _is_linear(module):
        return kernel_nodes.Convolution
    if _is_frozen_norm(module) and isinstance(module, nn.BatchNorm2d) and module.affine:
        return kernel_nodes.Normalisation
    return None


def held(layer: Trained) -> Held:
    """How a layer holds its weights: dense, under a fixed mask, or as kept values alone."""
    chain = parametrizations(layer).get("weight")
    if chain is None:
        return Held(layer.weight)
    match chain[0]:
        case KeptWeights(kept=kept):
            return Held(chain.original, kept)
        case FixedMask(kept=kept) if kept.shape == layer.weight.shape:
            return Held(layer.weight, kept)
    return Held(layer.weight)


def _modes(model: nn.Module) -> tuple[bool, ...]:
    return tuple(m.training for m in model.modules())
