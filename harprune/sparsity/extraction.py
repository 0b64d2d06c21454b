# SPDX-License-Identifier: Apache-2.0
"""Take a pruned model out of torch: its graph, and the weights that are not zero, as NumPy arrays.

What comes out is the model's function in eval mode, with masks multiplied out, batch norm folded
and an input normalisation as one multiply-add per channel. That stays a step of its own: folded
into a convolution with padding it would be wrong at the borders, where the kernels' zeros stand
for zeros after the normalisation.
"""

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata

from harprune.kernels import graph as g
from harprune.kernels.graph import Graph, Shape
from harprune.kernels.lists import Pattern, sift
from harprune.sparsity.frozen import Frozen, FrozenLayer, FrozenNorm, affine, frozen, role_of_frozen
from harprune.sparsity.regions import first_unsupported, translate


class Extracted(NamedTuple):
    """A network as the kernels know it; see `kernels.runtime.Executable`.

    `values` are the weights that are not zero, float32, in ascending position; `vectors` hold
    "NAME/bias", "NAME/scale" and "NAME/shift".
    """

    graph: Graph
    patterns: dict[str, Pattern]
    values: dict[str, np.ndarray]
    vectors: dict[str, np.ndarray]


@torch.no_grad()
def extract(model: nn.Module, example: Tensor) -> Extracted:
    """The function that `model` is in eval mode, for images of the shape of `example`.

    Args:
        model: masked or baked, float32; it is not changed.
        example: float32 images (N, C, H, W) or vectors (N, F); one is enough.

    Raises:
        ValueError: the model has no trace to trust, is not float32, has other than one output, or
            does what the kernels cannot run; the first such operation is named.
    """
    return _with_weights(*_translated(model, example))


@torch.no_grad()
def require_extractable(model: nn.Module, example: Tensor) -> None:
    """Raise the ValueError that `extract` would raise, for the price of one image's pass."""
    _translated(model, example)


def _translated(model: nn.Module, example: Tensor) -> tuple[Graph, dict[str, nn.Module]]:
    """The graph of the whole model, and its layers by the graph's names."""
    dtypes = {parameter.dtype for parameter in model.parameters()} | {example.dtype}
    if dtypes != {torch.float32}:
        raise ValueError(
            f"a deployed network is float32; model or example holds {dtypes}: call .float() on both"
        )
    if example.dim() not in (2, 4):
        raise ValueError(
            f"an example of {tuple(example.shape)} is neither images (N, C, H, W) nor vectors "
            "(N, F); give one of those"
        )
    network = frozen(model)
    for module in network.modules():
        if isinstance(module, Frozen):
            module.read(None, torch.contiguous_format)
    try:
        network(example[:1])
    except RuntimeError as error:
        raise ValueError(
            f"the model does not run on an example of {tuple(example.shape)} "
            f"({str(error).splitlines()[0]}); give images of the shape it was made for"
        ) from None
    _fold_constants(network)
    _fold_channel_arithmetic(network, example[:1])
    _require_whole(network, example[:1])
    modules = dict(network.named_modules())
    graph, layers = translate(network, modules, _role, [Shape(*example.shape[1:])])
    for node in graph.nodes:
        if isinstance(node, g.MeanPool) and 0 in node.window.stride:
            small = graph.shapes[node.sources[0]]
            raise ValueError(
                f"an adaptive pooling repeats the numbers of a map of {small.height} x "
                f"{small.width}, which no file says; give larger images"
            )
    return graph, layers


def _require_whole(network: fx.GraphModule, example: Tensor) -> None:
    """Raise ValueError where `network` is not one graph for the kernels."""
    node = first_unsupported(network, example, _role)
    if node is not None:
        what = getattr(node.target, "__name__", node.target)
        if node.op == "call_module":
            module = network.get_submodule(str(node.target))
            what = type(getattr(module, "layer", module)).__name__
        place = next(reversed(node.meta.get("nn_module_stack") or ["the model itself"]))
        raise ValueError(
            f"{node.name} ({what}, in {place}) cannot run without torch; deploy a network of 2-d "
            "convolutions (zeros as padding), linear layers, batch norm, "
            "ReLU, ReLU6, SiLU, sums, concatenations, pooling and flattening"
        )
    inputs = [n for n in network.graph.nodes if n.op == "placeholder"]
    (output,) = (n for n in network.graph.nodes if n.op == "output")
    if len(inputs) != 1 or not isinstance(output.args[0], fx.Node):
        raise ValueError("a deployed network has one input and one output; wrap the model so")


def _with_weights(graph: Graph, layers: dict[str, nn.Module]) -> Extracted:
    found = Extracted(graph, {}, {}, {})
    for number, node in enumerate(graph.nodes):
        if not isinstance(node, g.Named):
            continue
        name, layer = node.name, layers[node.name]
        if isinstance(layer, FrozenLayer):
            found.patterns[name], found.values[name] = sift(_array(layer.weight))
            # The layer itself may have none, and a bias from the batch norm behind it.
            graph.nodes[number] = replace(node, bias=layer.bias is not None)
            if layer.bias is not None:
                found.vectors[f"{name}/bias"] = _array(layer.bias)
        elif isinstance(layer, FrozenNorm | _Affine):
            found.vectors[f"{name}/scale"] = _array(layer.scale)
            found.vectors[f"{name}/shift"] = _array(layer.shift)
    return found


def _array(tensor: Tensor) -> np.ndarray:
    """A copy, that later training of the model cannot change."""
    return tensor.detach().cpu().contiguous().numpy().copy()


# Arithmetic with one number per channel -----------------------------------------------------


class _Affine(nn.Module):
    """scale[c] x + shift[c]; kept in float64 until it is final."""

    scale64: Tensor
    shift64: Tensor

    def __init__(self, scale: Tensor, shift: Tensor):
        super().__init__()
        self.register_buffer("scale64", scale)
        self.register_buffer("shift64", shift)

    @property
    def scale(self) -> Tensor:
        return self.scale64.float()

    @property
    def shift(self) -> Tensor:
        return self.shift64.float()

    def forward(self, x: Tensor) -> Tensor:
        return affine(x, self.scale, self.shift)


def _role(module: nn.Module) -> type[g.Node] | None:
    return g.Affine if isinstance(module, _Affine) else role_of_frozen(module)


Step = Callable[[Tensor, bool], tuple[Tensor, Tensor] | None]
"""(constant c, whether it stands on the left) -> scale and shift of what is done to x, if any."""


def _multiplied(c: Tensor, left: bool) -> tuple[Tensor, Tensor]:
    return c, torch.zeros_like(c)


def _added(c: Tensor, left: bool) -> tuple[Tensor, Tensor]:
    return torch.ones_like(c), c


def _subtracted(c: Tensor, left: bool) -> tuple[Tensor, Tensor]:
    return (-torch.ones_like(c), c) if left else (torch.ones_like(c), -c)


def _divided(c: Tensor, left: bool) -> tuple[Tensor, Tensor] | None:
    return None if left else (1.0 / c, torch.zeros_like(c))


_STEPS: dict[object, Step] = {
    **dict.fromkeys((operator.mul, torch.mul, "mul"), _multiplied),
    **dict.fromkeys((operator.add, torch.add, "add"), _added),
    **dict.fromkeys((operator.sub, torch.sub, "sub"), _subtracted),
    **dict.fromkeys((operator.truediv, torch.div, "div"), _divided),
}


def _fold_constants(network: fx.GraphModule) -> None:
    """Compute now what depends on the network's own tensors alone, as a view of one."""
    run = fx.Interpreter(network)
    for node in network.graph.nodes:
        known = all(source in run.env for source in node.all_input_nodes)
        if node.op in ("placeholder", "output") or not known:
            continue
        run.env[node] = value = run.run_node(node)
        if isinstance(value, Tensor):
            key = f"constant_{node.name}"
            network.register_buffer(key, value)
            node.op, node.target, node.args, node.kwargs = "get_attr", key, (), {}


def _fold_channel_arithmetic(network: fx.GraphModule, example: Tensor) -> None:
    """Put an `_Affine` in the place of arithmetic with constants, chains in one."""
    ShapeProp(network).propagate(example)
    for node in list(network.graph.nodes):
        found = _affine_of(network, node)
        if found is None:
            continue
        source, scale, shift = found
        before = network.get_submodule(str(source.target)) if source.op == "call_module" else None
        if isinstance(before, _Affine) and len(source.users) == 1:
            shift = shift + scale * before.shift64
            scale = scale * before.scale64
            (source,) = source.args
        key = f"affine_{node.name}"
        network.add_submodule(key, _Affine(scale, shift))
        with network.graph.inserting_before(node):
            made = network.graph.call_module(key, (source,))
        node.replace_all_uses_with(made)
        made.meta = node.meta
        network.graph.erase_node(node)
    network.graph.eliminate_dead_code()
    network.recompile()


def _affine_of(network: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, Tensor, Tensor] | None:
    """The node that `node` scales and shifts, and by what for each channel; None if it does not."""
    step = _STEPS.get(node.target) if node.op in ("call_function", "call_method") else None
    if step is None or node.kwargs or len(node.args) != 2:
        return None
    constants = [_constant(network, argument) for argument in node.args]
    left = constants[0] is not None
    source, constant = node.args[left], constants[not left]
    if constant is None or constants[left] is not None or not isinstance(source, fx.Node):
        return None
    # A traced size has no shape of its own, nor has a tuple of tensors.
    meta = source.meta.get("tensor_meta")
    if not isinstance(meta, TensorMetadata) or len(meta.shape) not in (2, 4):
        return None
    if not _fits(constant, meta.shape):
        return None
    found = step(_per_channel(constant, meta.shape), left)
    return None if found is None else (source, *found)


def _constant(network: fx.GraphModule, argument) -> Tensor | None:
    if isinstance(argument, int | float):
        return torch.tensor(argument, dtype=torch.float64)
    if isinstance(argument, fx.Node) and argument.op == "get_attr":
        return operator.attrgetter(str(argument.target))(network).detach().double()
    return None


def _fits(constant: Tensor, shape: torch.Size) -> bool:
    """Whether `constant` is one number, or one for each channel of a map of `shape`."""
    if constant.numel() == 1:
        return constant.dim() <= len(shape)
    channels = (1, shape[1], *[1] * (len(shape) - 2))
    return (*[1] * (len(shape) - constant.dim()), *constant.shape) == channels


def _per_channel(constant: Tensor, shape: torch.Size) -> Tensor:
    return constant.reshape(-1).expand(shape[1]).clone()
