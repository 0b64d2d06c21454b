# SPDX-License-Identifier: Apache-2.0
"""Run a masked model faster where only its *function* matters, exactly: the twin.

Inside an attack, and in evaluation, a model is a fixed function in eval mode: weights and masks do
not change and nobody asks for their gradients. `twin` builds that function once from any traceable
model: masks multiplied out, batch norm folded into the convolution before it, channels innermost.
`Twin.current()` reads the weights anew, once per optimiser step. The result equals the model's to
float tolerance, and gradients to the input flow through it.
"""

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Twin:
    """The eval-mode function of a model, rebuilt from its weights on demand; see `twin`."""

    def __init__(self, network: fx.GraphModule, dtype: torch.dtype | None):
        self._frozen = [m for m in network.modules() if isinstance(m, _Frozen)]
        self._function = _Cast(network, dtype)
        self._dtype = dtype

    @torch.no_grad()
    def current(self) -> nn.Module:
        """The function at the model's present weights, masks and batch-norm statistics.

        The same module each time, without parameters of its own; logits in the dtype of x.
        """
        for module in self._frozen:
            module.read(self._dtype)
        return self._function


def twin(model: nn.Module, *, dtype: torch.dtype | None = None) -> Twin | None:
    """The `Twin` of `model`, or None where it cannot be traced (its own forward then serves).

    Args:
        dtype: precision of the whole function, such as torch.bfloat16; None keeps the model's.
            A lower one makes a different, cheaper attack: a choice to be recorded.
    """
    try:
        network = fx.symbolic_trace(model)
    except Exception:  # whatever the model's own control flow raises on fx's proxies
        return None
    modules = dict(network.named_modules())
    for node in list(network.graph.nodes):
        if node.op == "call_module" and _is_affine(modules[node.target]):
            _freeze(network, node, modules)
        elif node.op == "call_module" and isinstance(
            modules[node.target], nn.modules.dropout._DropoutNd
        ):
            node.replace_all_uses_with(node.args[0])
            network.graph.erase_node(node)
    network.graph.eliminate_dead_code()
    network.delete_all_unused_submodules()
    network.recompile()
    return Twin(network, dtype)


def _freeze(network: fx.GraphModule, node: fx.Node, modules: dict[str, nn.Module]) -> None:
    """Put a frozen copy in the place of `node`, and of the batch norm behind a convolution."""
    layer = modules[node.target]
    follower = next(iter(node.users)) if len(node.users) == 1 else None
    norm = None
    if _is_convolution(layer) and follower is not None and follower.op == "call_module":
        candidate = modules[follower.target]
        norm = candidate if _is_frozen_norm(candidate) else None
    key = f"frozen_{node.name}"
    network.add_submodule(
        key, _FrozenNorm(layer) if _is_frozen_norm(layer) else _FrozenLayer(layer, norm)
    )
    node.target = key
    modules[key] = network.get_submodule(key)
    if norm is not None:
        follower.replace_all_uses_with(node)
        network.graph.erase_node(follower)


class _Cast(nn.Module):
    """Images in the layout and precision of the twin; logits back in the precision of x."""

    def __init__(self, network: nn.Module, dtype: torch.dtype | None):
        super().__init__()
        self.network = network
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        inner = x if self.dtype is None else x.to(self.dtype)
        if x.dim() == 4:
            inner = inner.contiguous(memory_format=torch.channels_last)
        return self.network(inner).to(x.dtype)


class _Frozen(nn.Module):
    """Stands for a module of the model; `read` takes its present tensors, detached."""

    def read(self, dtype: torch.dtype | None) -> None:
        raise NotImplementedError


class _FrozenLayer(_Frozen):
    """A convolution or linear layer, masked, with the batch norm that follows folded in."""

    def __init__(self, layer: nn.Module, norm: nn.Module | None):
        super().__init__()
        # In a tuple, so that the model's modules do not become submodules of its twin.
        self._source = (layer, norm)

    def read(self, dtype: torch.dtype | None) -> None:
        layer, norm = self._source
        # A weight read without a graph inside `parametrize.cached()` would stay cached that way,
        # and the loss that follows the attack would silently train nothing.
        with torch.enable_grad():
            weight = layer.weight.detach()
        bias = None if layer.bias is None else layer.bias.detach()
        if norm is not None:
            scale, shift = _scale_and_shift(norm)
            weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
            bias = shift if bias is None else bias * scale + shift
        dtype = dtype or weight.dtype
        layout = torch.channels_last if weight.dim() == 4 else torch.contiguous_format
        self.weight = weight.to(dtype).contiguous(memory_format=layout)
        self.bias = None if bias is None else bias.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        layer = self._source[0]
        if isinstance(layer, nn.Linear):
            return F.linear(x, self.weight, self.bias)
        return layer._conv_forward(x, self.weight, self.bias)


class _FrozenNorm(_Frozen):
    """A batch norm in eval mode that no convolution precedes: one multiply-add per value."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self._source = (norm,)

    def read(self, dtype: torch.dtype | None) -> None:
        scale, shift = _scale_and_shift(self._source[0])
        self.scale, self.shift = scale.to(dtype or scale.dtype), shift.to(dtype or shift.dtype)

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.dim() - 2))
        return x * self.scale.view(shape) + self.shift.view(shape)


def _scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach()
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach()


def _is_affine(module: nn.Module) -> bool:
    linear = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return linear or _is_convolution(module) or _is_frozen_norm(module)


def _is_convolution(module: nn.Module) -> bool:
    return any(
        isinstance(module, kind) and type(module).forward is kind.forward for kind in _CONVOLUTIONS
    )


def _is_frozen_norm(module: nn.Module) -> bool:
    return isinstance(module, _BATCH_NORMS) and module.track_running_stats
