# SPDX-License-Identifier: Apache-2.0
"""A pruned network without torch: the kernels' graph, the weights that are not zero, and names.

A `Network` that exists is sound: its constructor checks everything that the kernels rely on, for
they do not check it again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from harprune.kernels import native
from harprune.kernels.forward import Forward
from harprune.kernels.graph import (
    Activation,
    Affine,
    Concatenation,
    Convolution,
    Flatten,
    Graph,
    MaxPool,
    MeanPool,
    Node,
    Rectifier,
    Shape,
    Sum,
    Window,
)
from harprune.kernels.lists import NEARLY_DENSE, QUAD, Pattern

LARGEST_MAP = 2**26
"""Numbers of one image's map with its border; the kernels' offsets then fit 32 bits."""
LARGEST_LAYER = 2**31 - 1
"""Weights of one layer, zeros included."""
LARGEST_EXTENT = 2**16
"""Size, stride, padding and dilation of a window, and what stands behind its map besides."""
LARGEST_WINNER = 256
"""Positions of a max-pool's window, for the kernels note the largest in a byte."""


@dataclass(frozen=True, eq=False)
class Network:
    """A network with one input and one output.

    Attributes:
        graph: value 0 is the input, node i makes value i + 1 from earlier ones, and one value is
            the output. Batch norm is folded away.
        patterns: for each convolution or linear layer, where its weights are not zero; `index` is
            None where none is.
        values: those weights, float32, in ascending position.
        vectors: "NAME/bias" of each convolution with a bias, "NAME/scale" and "NAME/shift" of each
            affine node; float32, one number per channel of what the node makes.
        classes: what the output's channels mean, or empty.
        metadata: whatever else should travel with the network, as JSON has it.

    Raises:
        ValueError: the parts do not fit together, or a number is not finite.
    """

    graph: Graph
    patterns: Mapping[str, Pattern]
    values: Mapping[str, np.ndarray]
    vectors: Mapping[str, np.ndarray]
    classes: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_graph(self)
        _check_parameters(self)
        require_words(self.classes, self.metadata, self.output_shape.channels)

    @property
    def input_shape(self) -> Shape:
        return self.graph.shapes[0]

    @property
    def output_shape(self) -> Shape:
        return self.graph.shapes[self.graph.outputs[0]]

    def weight(self, name: str) -> np.ndarray:
        """All weights of a layer, (filters, channels per group, rows, columns), zeros included."""
        pattern = self.patterns[name]
        if pattern.index is None:
            return self.values[name].reshape(pattern.shape)
        full = np.zeros(pattern.size, np.float32)
        full[pattern.index] = self.values[name]
        return full.reshape(pattern.shape)

    def resized(self, height: int, width: int) -> "Network":
        """The same network for images of `height` x `width`; weights are shared.

        Raises:
            ValueError: it does not fit them: what follows a flattened map fixes its size.
        """
        channels, *usual = self.input_shape
        shapes, nodes = [Shape(channels, height, width)], []
        try:
            for node in self.graph.nodes:
                sources = [shapes[s] for s in node.sources]
                if isinstance(node, MeanPool) and node.adaptive:
                    node = _parting(node, sources[0], self.graph.shapes[node.out])
                pattern = self.patterns.get(getattr(node, "name", ""))
                shapes.append(made_shape(node, sources, pattern.filters if pattern else 0))
                nodes.append(node)
            return replace(self, graph=Graph(shapes, nodes, [0], self.graph.outputs))
        except ValueError as error:
            raise ValueError(
                f"images of {height} x {width} do not fit this network ({error}); "
                f"give {usual[0]} x {usual[1]}"
            ) from None

    def runner(self, *, kernels: native.Kernels | None = None, threads: int = 1) -> Forward:
        """The network ready to run: `forward([images])`.

        Args:
            kernels: the instruction set and precision; None takes the fastest there is.
            threads: how many blocks, or groups of images, are run at once.

        Raises:
            ValueError: the kernels were not built.
        """
        kernels = kernels or _fastest()
        patterns, values = dict(self.patterns), dict(self.values)
        for node in self.graph.nodes:
            if isinstance(node, Convolution) and _nearly_dense(node, patterns[node.name]):
                patterns[node.name] = Pattern(patterns[node.name].shape, None)
                values[node.name] = self.weight(node.name).reshape(-1)
        vectors = {n: v.astype(kernels.dtype, copy=False) for n, v in self.vectors.items()}
        made = Forward(self.graph, kernels, patterns, vectors, threads=threads)
        for name, kept in values.items():
            made.load(name, kept.astype(kernels.dtype, copy=False))
        return made


def _nearly_dense(node: Convolution, pattern: Pattern) -> bool:
    """Whether the kernels run a layer faster with its zeros, four filters at a time."""
    in_fours = node.groups == 1 and pattern.filters % QUAD == 0
    return in_fours and int(pattern.starts[-1]) > NEARLY_DENSE * pattern.size


def _fastest() -> native.Kernels:
    kernels = native.best()
    if kernels is None:
        raise ValueError(
            "running a network needs the compiled kernels, which this installation lacks; "
            "install a C compiler and reinstall harprune"
        )
    return kernels


def _parting(node: MeanPool, source: Shape, usual: Shape) -> MeanPool:
    """`node` with windows that part a map of `source` into as many as make `usual`."""
    sides = source.height // usual.height, source.width // usual.width
    # Torch's windows would overlap, or repeat an image's row.
    if 0 in sides or source[1:] != (sides[0] * usual.height, sides[1] * usual.width):
        raise ValueError(
            f"a map of {source.height} x {source.width} has no {usual.height} x {usual.width} "
            "parts of one size"
        )
    return replace(node, window=Window(sides, sides))


def vector_names(node: Node) -> tuple[str, ...]:
    """The vectors that `node` reads, in the order in which an artifact holds them."""
    match node:
        case Convolution(name=name, bias=True):
            return (f"{name}/bias",)
        case Affine(name=name):
            return (f"{name}/scale", f"{name}/shift")
    return ()


def made_shape(node: Node, sources: Sequence[Shape], filters: int = 0) -> Shape:
    """The shape of what `node` makes; `filters` says how many a convolution has.

    Raises:
        ValueError: it cannot be made from maps of these shapes.
    """
    wanted = {Sum: 2, Concatenation: max(1, len(sources))}.get(type(node), 1)
    if len(sources) != wanted:
        raise ValueError(f"{_kind(node)} has {len(sources)} sources; give it {wanted}")
    shape = _made_shape(node, sources, filters)
    # Here and not later: sizes that double from node to node must not grow without end.
    if shape.channels * shape.height * shape.width > LARGEST_MAP:
        raise ValueError(
            f"a map of {_listed([shape])} exceeds {LARGEST_MAP} numbers; make it smaller"
        )
    return shape


def _made_shape(node: Node, sources: Sequence[Shape], filters: int) -> Shape:
    first = sources[0]
    match node:
        case Convolution():
            if node.groups < 1 or first.channels % node.groups or filters % node.groups:
                raise ValueError(
                    f"{node.groups} groups do not divide {first.channels} channels and "
                    f"{filters} filters"
                )
            return Shape(filters, *_slid(node.window, first))
        case MaxPool() | MeanPool():
            _check_pool(node, first)
            return Shape(first.channels, *_slid(node.window, first))
        case Flatten():
            return Shape(first.channels * first.height * first.width)
        case Concatenation():
            if len({s[1:] for s in sources}) != 1:
                raise ValueError(f"maps of {_listed(sources)} cannot be concatenated")
            return Shape(sum(s.channels for s in sources), *first[1:])
        case Sum():
            if sources[0] != sources[1]:
                raise ValueError(f"maps of {_listed(sources)} cannot be added")
            return first
        case Affine() | Rectifier() | Activation():
            return first
    raise ValueError(f"{_kind(node)} is no node of a deployed network; fold or replace it")


def _slid(window: Window, shape: Shape) -> tuple[int, ...]:
    for name, least in (("size", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
        sides = getattr(window, name)
        if len(sides) != 2 or not all(least <= n <= LARGEST_EXTENT for n in sides):
            raise ValueError(
                f"{name} {sides} of a window must be two numbers from {least} to {LARGEST_EXTENT}"
            )
    for padding, extra in zip(window.padding, window.extra, strict=True):
        if not -padding <= extra <= LARGEST_EXTENT:
            raise ValueError(
                f"extra {window.extra} of a window must be two numbers that leave no padding below "
                f"zero, and at most {LARGEST_EXTENT}"
            )
    sides = window.over(shape.height, shape.width)
    if min(sides) < 1:
        raise ValueError(f"{window} does not fit a map of {shape.height} x {shape.width}")
    return sides


def _check_pool(node: MaxPool | MeanPool, shape: Shape) -> None:
    window = node.window
    plain = window.dilation == (1, 1) and window.extra == (0, 0)
    if not plain or any(2 * p > k for p, k in zip(window.padding, window.size)):
        raise ValueError(
            f"{window} of a pool must have dilation 1, no extra and padding up to half its size"
        )
    if isinstance(node, MeanPool) and node.adaptive:
        parted = all(n % k == 0 for n, k in zip(shape[1:], window.size))
        if not parted or window.stride != window.size or window.padding != (0, 0):
            raise ValueError(
                f"{window} of an adaptive pool does not part a map of {_listed([shape])}"
            )
    if isinstance(node, MaxPool) and window.size[0] * window.size[1] > LARGEST_WINNER:
        raise ValueError(f"{window} of a max-pool exceeds {LARGEST_WINNER} positions")


def _check_graph(network: Network) -> None:
    graph = network.graph
    if graph.inputs != [0] or len(graph.outputs) != 1 or len(graph.shapes) != len(graph.nodes) + 1:
        raise ValueError("a network has value 0 as its input, one output, and one value per node")
    if not 0 <= graph.outputs[0] < len(graph.shapes):
        raise ValueError(f"output {graph.outputs[0]} is none of {len(graph.shapes)} values")
    if min(graph.shapes[0]) < 1:
        raise ValueError(f"an input of {_listed(graph.shapes[:1])} is empty")
    names = [node.name for node in graph.nodes if isinstance(node, Convolution | Affine)]
    if len(set(names)) != len(names) or "" in names:
        raise ValueError("names of layers must differ and not be empty; rename them")
    borders = [[0, 0] for _ in graph.shapes]
    for number, node in enumerate(graph.nodes):
        what = f"node {number} ({getattr(node, 'name', _kind(node))})"
        if node.out != number + 1 or not all(0 <= s <= number for s in node.sources):
            raise ValueError(f"{what} must make value {number + 1} from earlier ones")
        try:
            shape = made_shape(
                node, [graph.shapes[s] for s in node.sources], _filters(network, node)
            )
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from None
        if graph.shapes[node.out] != shape:
            raise ValueError(f"{what} makes {shape}, not {graph.shapes[node.out]}")
        if isinstance(node, Convolution):
            border = borders[node.sources[0]]
            border[:] = map(max, border, node.window.border)
    for (channels, height, width), (rows, columns) in zip(graph.shapes, borders):
        numbers = channels * (height + 2 * rows) * (width + 2 * columns)
        if numbers > LARGEST_MAP:
            raise ValueError(
                f"a map of {numbers} numbers exceeds {LARGEST_MAP}; use smaller images"
            )


def _filters(network: Network, node: Node) -> int:
    if not isinstance(node, Convolution):
        return 0
    pattern = network.patterns.get(node.name)
    if pattern is None or len(pattern.shape) != 4 or min(pattern.shape) < 1:
        raise ValueError("it has no weights, or weights without four axes")
    channels = network.graph.shapes[node.sources[0]].channels
    if (pattern.shape[1] * node.groups, *pattern.shape[2:]) != (channels, *node.window.size):
        raise ValueError(f"weights of {pattern.shape} do not fit {channels} channels and {node}")
    return pattern.filters


def _check_parameters(network: Network) -> None:
    nodes = network.graph.nodes
    layers = {n.name for n in nodes if isinstance(n, Convolution)}
    if not layers == set(network.patterns) == set(network.values):
        raise ValueError("patterns and values must be given for each convolution, and no more")
    for name, pattern in network.patterns.items():
        _check_weights(name, pattern, network.values[name])
    shapes = network.graph.shapes
    wanted = {name: shapes[n.out].channels for n in nodes for name in vector_names(n)}
    if set(wanted) != set(network.vectors):
        odd = sorted(set(wanted) ^ set(network.vectors))[:3]
        raise ValueError(f"vectors must be given for each bias, scale and shift; see {odd}")
    for name, channels in wanted.items():
        _check_numbers(name, network.vectors[name], channels)


def _check_weights(name: str, pattern: Pattern, values: np.ndarray) -> None:
    size, index = pattern.size, pattern.index
    if size > LARGEST_LAYER:
        raise ValueError(f"{name}: {size} weights exceed {LARGEST_LAYER}")
    if index is not None:
        if index.dtype != np.int64 or index.ndim != 1 or len(index) >= size:
            raise ValueError(f"{name}: an index is fewer than {size} int64; None keeps all weights")
        ascending = len(index) == 0 or (index[0] >= 0 and index[-1] < size)
        if not (ascending and (index[1:] > index[:-1]).all()):
            raise ValueError(f"{name}: an index must ascend within 0 to {size - 1}")
    _check_numbers(name, values, size if index is None else len(index))
    if not values.all():
        raise ValueError(f"{name}: a kept weight is zero; leave it out of the pattern")


def _check_numbers(name: str, numbers: np.ndarray, length: int) -> None:
    if numbers.dtype != np.float32 or numbers.shape != (length,) or not numbers.data.contiguous:
        raise ValueError(
            f"{name}: {numbers.dtype} of {numbers.shape} must be {length} contiguous float32"
        )
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name} holds NaN or infinity; train the network anew")


def require_words(classes: Sequence[str], metadata: Mapping[str, Any], outputs: int) -> None:
    """Refuse what cannot travel with a network of so many outputs.

    Raises:
        ValueError: class names that are no strings, or not one for each output; metadata that JSON
            does not know.
    """
    if isinstance(classes, str) or not isinstance(classes, Sequence):
        raise ValueError(f"classes = {classes!r} must be names in a list, one for each output")
    if classes and len(classes) != outputs:
        raise ValueError(
            f"{len(classes)} class names for {outputs} outputs; give one each, or none"
        )
    for name in classes:
        if not isinstance(name, str) or not _is_unicode(name):
            raise ValueError(f"class name {name!r} is no text; class names must be strings")
    try:
        json.dumps(dict(metadata), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"metadata is no JSON ({error}); leave out what is not") from None


def _is_unicode(text: str) -> bool:
    """Not so with half of a surrogate pair, which no file can hold."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _kind(node: Node) -> str:
    return type(node).__name__


def _listed(shapes: Sequence[Shape]) -> str:
    return ", ".join(" x ".join(map(str, s)) for s in shapes)
