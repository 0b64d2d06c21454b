# SPDX-License-Identifier: Apache-2.0
"""From a traced model to graphs of the kernels: which of its nodes they run, and how.

`split` gathers the nodes of a traced model that the kernels can run into regions, as large as
the model's data flow lets them be; whatever else the model does runs in torch between them.
"""

import operator
from collections.abc import Callable, Mapping
from inspect import signature
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.operator_support import OperatorSupportBase
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata
from torch.nn import functional as F

from harprune.kernels import graph as g
from harprune.kernels.graph import Graph, Pair, Shape, Window

Role = Callable[[nn.Module], "type[g.Node] | None"]
"""A module -> `Convolution` (a convolution or linear layer), `Affine`, `Normalisation` or None."""

_ADDITIONS = (operator.add, operator.iadd, torch.add)
_RECTIFIERS = (torch.relu, F.relu, torch.relu_)
_ACTIVATIONS: dict[object, type[g.Node]] = {F.silu: g.Swish, F.relu6: g.Rectifier6}


class Ends(NamedTuple):
    """Zeros before a map and behind it, as (rows, columns)."""

    before: Pair = (0, 0)
    behind: Pair = (0, 0)


def split(
    network: fx.GraphModule, x: Tensor, role: Role, make: Callable[[fx.GraphModule], nn.Module]
) -> bool:
    """Gather the nodes of `network` that the kernels run into regions, in place.

    Args:
        network: a trace; it is run once on `x`, for shapes.
        role: what a leaf module is to the kernels, see `Role`.
        make: gives the module that runs a region, which it gets as a graph of its own.

    Returns:
        whether there is any region with a convolution or a linear layer.
    """
    _propagate_shapes(network, x)
    _name_flattening(network)
    modules = dict(network.named_modules())

    class Supported(OperatorSupportBase):
        def is_node_supported(self, submodules: Mapping[str, nn.Module], node: fx.Node) -> bool:
            return _Translation(modules, role).supports(node)

    partitioner = CapabilityBasedPartitioner(
        network, Supported(), allows_single_node_partition=True
    )
    proposed, supported = partitioner.propose_partitions(), Supported()
    for part in proposed:
        # Whatever is said of it, the partitioner draws a slice in with what it slices.
        for node in [n for n in part.nodes if not supported.is_node_supported(modules, n)]:
            part.remove_node(node)
    worthwhile = [
        part
        for part in proposed
        if any(_is_convolution(node, modules, role) for node in part.nodes)
    ]
    partitioner.fuse_partitions(worthwhile, prefix="fused_")
    for name, region in list(network.named_children()):
        if isinstance(region, fx.GraphModule) and name.startswith("fused_"):
            setattr(network, name, make(region))
    network.recompile()
    return bool(worthwhile)


def _propagate_shapes(network: fx.GraphModule, x: Tensor) -> None:
    # What the network draws at random here must not be missing where it trains.
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        ShapeProp(network).propagate(x)


def _name_flattening(network: fx.GraphModule) -> None:
    """Put `flatten` where a view or reshape does just that, whatever it was computed from."""
    for node in list(network.graph.nodes):
        if node.op != "call_method" or node.target not in ("view", "reshape"):
            continue
        before, after = _shape(node.args[0]), _shape(node)
        if before is not None and after == Shape(prod(before)):
            with network.graph.inserting_after(node):
                flatten = network.graph.call_function(torch.flatten, (node.args[0], 1))
            flatten.meta = dict(node.meta)
            node.replace_all_uses_with(flatten)
            network.graph.erase_node(node)
    network.graph.eliminate_dead_code()


def first_unsupported(network: fx.GraphModule, x: Tensor, role: Role) -> fx.Node | None:
    """The first node of a trace that the kernels do not run, or None.

    The trace is run once on `x`, for shapes.
    """
    _propagate_shapes(network, x)
    _name_flattening(network)
    translation = _Translation(dict(network.named_modules()), role)
    steps = (n for n in network.graph.nodes if n.op.startswith("call"))
    return next((n for n in steps if not translation.supports(n)), None)


def translate(
    region: fx.GraphModule, modules: Mapping[str, nn.Module], role: Role, inputs: list[Shape]
) -> tuple[Graph, dict[str, nn.Module]]:
    """The graph of a region for inputs of these shapes, and its layers by the graph's names."""
    return _Translation(modules, role).run(region, inputs)


def output_axes(region: fx.GraphModule) -> list[int]:
    """How many axes each output of a region has."""
    (output,) = (node for node in region.graph.nodes if node.op == "output")
    outputs = output.args[0] if isinstance(output.args[0], tuple | list) else output.args
    return [_axes(node) for node in outputs]


def _is_convolution(node: fx.Node, modules: Mapping[str, nn.Module], role: Role) -> bool:
    return node.op == "call_module" and role(modules[str(node.target)]) is g.Convolution


class _Translation:
    """Nodes of a trace as nodes of a graph.

    Every function from here on that takes a `node`, a `graph` and its `values` adds what the node
    does to the graph and enters the value that it makes, and says whether the kernels can run it.
    """

    def __init__(self, modules: Mapping[str, nn.Module], role: Role):
        self._modules, self._role = modules, role
        self._zeros: dict[fx.Node, Ends] = {}

    def supports(self, node: fx.Node) -> bool:
        """Whether the kernels run `node`, whose shapes are known."""
        if node.op not in ("call_module", "call_function", "call_method"):
            return False
        if _zeros_around(node, self._modules) is not None:
            # They are no step: the one convolution that reads them sees them as its own padding.
            readers = list(node.users)
            return (
                len(readers) == 1
                and _is_convolution(readers[0], self._modules, self._role)
                and self.supports(readers[0])
            )
        shape, sources = _shape(node), node.all_input_nodes
        shapes = [s for s in map(_shape, sources) if s is not None]
        # A tensor of the model has no axis of images, though it may look so for one image.
        constant = any(n.op != "placeholder" and not n.all_input_nodes for n in sources)
        if shape is None or not sources or len(shapes) < len(sources) or constant:
            return False
        probe = Graph()
        values = {n: probe.value(s) for n, s in zip(sources, shapes)}
        made = self._make(node, probe, values)
        return made and probe.shapes[values[node]] == shape

    def run(
        self, region: fx.GraphModule, inputs: list[Shape]
    ) -> tuple[Graph, dict[str, nn.Module]]:
        """As `translate`."""
        graph, values, layers = Graph(), {}, {}
        given = iter(inputs)
        for node in region.graph.nodes:
            if node.op == "placeholder":
                values[node] = graph.value(next(given))
                graph.inputs.append(values[node])
            elif node.op == "output":
                outputs = node.args[0] if isinstance(node.args[0], tuple | list) else node.args
                graph.outputs = [values[n] for n in outputs]
            else:
                if not self._make(node, graph, values):
                    raise ValueError(f"{node.format_node()} cannot run on the kernels")
                if node.op == "call_module":
                    layers[node.name] = self._modules[str(node.target)]
        return graph, layers

    def _make(self, node: fx.Node, graph: Graph, values: dict[fx.Node, int]) -> bool:
        """Add `node` to `graph` if the kernels can run it."""
        if (zeros := _zeros_around(node, self._modules)) is not None:
            self._zeros[node] = zeros
            values[node] = _source(node, values)
            return True
        if node.op == "call_module":
            return self._make_module(node, graph, values)
        call = node.target
        if call in _ADDITIONS or call in ("add", "add_"):
            return not node.kwargs and self._make_sum(node, graph, values)
        if call in _RECTIFIERS or call in ("relu", "relu_"):
            return _same(node, graph, values, g.Rectifier)
        if call in _ACTIVATIONS:
            return _same(node, graph, values, _ACTIVATIONS[call])
        if call is torch.cat or call is torch.concat:
            return self._make_concatenation(node, graph, values)
        if call is torch.flatten or call == "flatten":
            first, last = (*node.args[1:], *(0, -1)[len(node.args) - 1 :])
            span = node.kwargs.get("start_dim", first), node.kwargs.get("end_dim", last)
            return span == (1, -1) and _flatten(node, graph, values)
        if call is F.adaptive_avg_pool2d and len(node.args) == 2:
            return _adaptive(node, graph, values, node.args[1])
        if call in (F.max_pool2d, F.avg_pool2d):
            return _make_pool(node, graph, values)
        if call is torch.mean or call == "mean":
            return _make_mean(node, graph, values)
        return False

    def _make_module(self, node: fx.Node, graph: Graph, values) -> bool:
        module = self._modules[str(node.target)]
        role = self._role(module)
        if role is g.Convolution:
            around = self._zeros.get(node.all_input_nodes[0], Ends())
            return _weighted(node, graph, values, getattr(module, "layer", module), around)
        if role is not None:
            return _same(node, graph, values, role, name=node.name)
        match module:
            case nn.ReLU():
                return _same(node, graph, values, g.Rectifier)
            case nn.SiLU():
                return _same(node, graph, values, g.Swish)
            case nn.ReLU6():
                return _same(node, graph, values, g.Rectifier6)
            case nn.Identity():
                values[node] = values[node.args[0]]
                return True
            case nn.Flatten():
                whole = module.start_dim == 1 and module.end_dim == -1
                return whole and _flatten(node, graph, values)
            case nn.AdaptiveAvgPool2d():
                return _adaptive(node, graph, values, module.output_size)
            case nn.MaxPool2d():
                plain = not module.ceil_mode and not module.return_indices
                plain = plain and _pair(module.dilation) == (1, 1)
                window = _window(module.kernel_size, module.stride, module.padding)
                return plain and _pool(node, graph, values, g.MaxPool, window)
            case nn.AvgPool2d():
                plain = not module.ceil_mode and module.divisor_override is None
                window = _window(module.kernel_size, module.stride, module.padding)
                area = module.count_include_pad
                return plain and _pool(node, graph, values, g.MeanPool, window, full_area=area)
        return False

    def _make_sum(self, node, graph: Graph, values) -> bool:
        sources = tuple(values[a] for a in node.args if isinstance(a, fx.Node) and a in values)
        if not len(sources) == len(node.args) == 2:
            return False
        shapes = {graph.shapes[s] for s in sources}
        if len(shapes) != 1:
            return False
        _add(node, graph, values, g.Sum, shapes.pop(), sources)
        return True

    def _make_concatenation(self, node, graph: Graph, values) -> bool:
        parts = node.args[0]
        axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if axis != 1 or not all(isinstance(p, fx.Node) for p in parts):
            return False
        shapes = [graph.shapes[values[p]] for p in parts]
        if len({s[1:] for s in shapes}) != 1:
            return False
        shape = Shape(sum(s.channels for s in shapes), *shapes[0][1:])
        _add(node, graph, values, g.Concatenation, shape, tuple(values[p] for p in parts))
        return True


def _shape(node: fx.Node) -> Shape | None:
    """The map of one image that `node` gives, or None where it gives none."""
    meta = node.meta.get("tensor_meta")
    if not isinstance(meta, TensorMetadata) or not meta.dtype.is_floating_point:
        return None
    return Shape(*meta.shape[1:]) if len(meta.shape) in (2, 4) else None


def _axes(node: fx.Node) -> int:
    return len(node.meta["tensor_meta"].shape)


def _add(
    node, graph: Graph, values, kind, shape: Shape, sources: tuple[int, ...], **fields
) -> None:
    values[node] = graph.value(shape)
    graph.nodes.append(kind(sources, values[node], **fields))


def _source(node: fx.Node, values) -> int:
    return values[node.all_input_nodes[0]]


def _same(node, graph: Graph, values, kind, **fields) -> bool:
    source = _source(node, values)
    _add(node, graph, values, kind, graph.shapes[source], (source,), **fields)
    return True


def _flatten(node, graph: Graph, values) -> bool:
    source = _source(node, values)
    channels, height, width = graph.shapes[source]
    if height == width == 1:
        values[node] = source
    else:
        _add(node, graph, values, g.Flatten, Shape(channels * height * width), (source,))
    return True


def _weighted(node, graph: Graph, values, layer: nn.Module, around: Ends) -> bool:
    """A 2-d convolution with zeros as padding, more of them `around`, or a linear layer."""
    source = _source(node, values)
    shape = graph.shapes[source]
    if isinstance(layer, nn.Linear):
        if shape != Shape(layer.in_features):
            return False
        window, groups, filters = Window((1, 1)), 1, layer.out_features
    elif isinstance(layer, nn.Conv2d):
        padding = _padding(layer)
        if padding is None or shape.channels != layer.in_channels:
            return False
        size, stride, dilation = map(_pair, (layer.kernel_size, layer.stride, layer.dilation))
        before = _pair([a + b for a, b in zip(padding.before, around.before)])
        behind = [a + b for a, b in zip(padding.behind, around.behind)]
        extra = _pair([b - a for a, b in zip(before, behind)])
        window = Window(size, stride, before, dilation, extra)
        groups, filters = layer.groups, layer.out_channels
    else:
        return False
    out = Shape(filters, *window.over(shape.height, shape.width))
    bias = layer.bias is not None
    fields = {"name": node.name, "window": window, "groups": groups, "bias": bias}
    _add(node, graph, values, g.Convolution, out, (source,), **fields)
    return True


def _padding(layer: nn.Conv2d) -> Ends | None:
    """The zeros that a convolution puts around a map; None where they are something else."""
    if layer.padding_mode != "zeros":
        return None
    if not isinstance(layer.padding, str):
        return Ends(_pair(layer.padding), _pair(layer.padding))
    if layer.padding == "valid":
        return Ends()
    both = [d * (k - 1) for k, d in zip(layer.kernel_size, layer.dilation)]
    return Ends(_pair([n // 2 for n in both]), _pair([n - n // 2 for n in both]))


def _zeros_around(node: fx.Node, modules: Mapping[str, nn.Module]) -> Ends | None:
    """The zeros that `node` puts around a map; None where it does something else."""
    match modules.get(str(node.target)) if node.op == "call_module" else node.target:
        case nn.ConstantPad2d(padding=sides, value=value):  # nn.ZeroPad2d is one
            pass
        case F.pad:
            given = signature(F.pad).bind(*node.args, **node.kwargs).arguments
            sides, value = given["pad"], given.get("value")
            if given.get("mode", "constant") != "constant":
                return None
        case _:
            return None
    whole = len(sides) == 4 and all(isinstance(n, int) and n >= 0 for n in sides)
    if not whole or value not in (None, 0) or _axes(node) != 4:
        return None
    left, right, top, bottom = sides
    return Ends((top, left), (bottom, right))


def _pool(node, graph: Graph, values, kind, window: Window, **fields) -> bool:
    source = _source(node, values)
    channels, height, width = graph.shapes[source]
    if kind is g.MaxPool and prod(window.size) > 256:
        return False  # a byte names the winner of a window
    shape = Shape(channels, *window.over(height, width))
    _add(node, graph, values, kind, shape, (source,), window=window, **fields)
    return True


def _make_pool(node, graph: Graph, values) -> bool:
    """The functional form of pooling, with nothing but size, stride and padding given."""
    names = ("kernel_size", "stride", "padding")
    given = dict(zip(names, node.args[1:])) | dict(node.kwargs)
    # Without a stride, torch.nn.functional's wrappers are traced with their defaults spelt out.
    plain = {"dilation": 1, "ceil_mode": False, "return_indices": False, "count_include_pad": True}
    plain["divisor_override"] = None
    rest = {n: v for n, v in given.items() if n not in names}
    if len(node.args) > 4 or any(plain.get(n, v) != v for n, v in rest.items()):
        return False
    window = _window(given["kernel_size"], given.get("stride"), given.get("padding", 0))
    kind = g.MaxPool if node.target is F.max_pool2d else g.MeanPool
    return _pool(node, graph, values, kind, window)


def _make_mean(node, graph: Graph, values) -> bool:
    """The mean over both sides of a map."""
    axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    shape = graph.shapes[_source(node, values)]
    if not isinstance(axes, tuple | list) or sorted(a % 4 for a in axes) != [2, 3]:
        return False
    if _axes(node.all_input_nodes[0]) != 4:
        return False
    return _pool(node, graph, values, g.MeanPool, Window(shape[1:], shape[1:]), adaptive=True)


def _adaptive(node, graph: Graph, values, size) -> bool:
    """Windows that divide the map evenly, or one position repeated."""
    source = _source(node, values)
    channels, *sides = graph.shapes[source]
    wanted = _pair(size)
    if wanted == (None, None):
        values[node] = source
        return True
    # A side that stays what it is would be one of this map's, and not of another image's.
    if None in wanted:
        return False
    if any(m % n and m != 1 for n, m in zip(wanted, sides)):
        return False
    strides = [m // n for n, m in zip(wanted, sides)]
    window = Window(_pair([max(1, s) for s in strides]), _pair(strides))
    shape = Shape(channels, *wanted)
    _add(node, graph, values, g.MeanPool, shape, (source,), window=window, adaptive=True)
    return True


def _window(size, stride, padding) -> Window:
    return Window(_pair(size), _pair(stride or size), _pair(padding))


def _pair(value) -> Pair:
    """(rows, columns) as torch reads them: one number, be it in a tuple or not, is both."""
    sides = value if isinstance(value, tuple | list) else (value,)
    return sides[0], sides[-1]
