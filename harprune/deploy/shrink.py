# SPDX-License-Identifier: Apache-2.0
"""Remove from a pruned network what cannot matter: the function stays, for images of any size.

A filter without weights makes a constant. Its readers take that constant into their biases where
zero padding does not spoil it, and nobody then reads the channel; a channel that nobody reads
need not be made, so weights before it go too. What is left of a layer is a smaller layer, and a
branch that is constant is no branch.

Channels go together that a sum, a concatenation or a flattening ties to one another, and groups of
a grouped convolution go whole; a tied channel without weights stays, and costs nearly nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from harprune.deploy.network import Network, made_shape
from harprune.kernels import graph as g
from harprune.kernels import native
from harprune.kernels.graph import Graph, Node, Shape, Window
from harprune.kernels.lists import Pattern

TOLERANCE = 1e-5
"""Largest difference of an output, relative to the largest output: folded biases are float32."""
_TRIALS = 16


@dataclass(frozen=True)
class Shrinkage:
    """What went, by layer, as (before, after); layers that went whole have 0 after.

    Attributes:
        filters: of each convolution and linear layer.
        weights: that are not zero, of each.
    """

    filters: Mapping[str, tuple[int, int]]
    weights: Mapping[str, tuple[int, int]]

    @property
    def channels_removed(self) -> int:
        return sum(before - after for before, after in self.filters.values())

    @property
    def weights_removed(self) -> int:
        return sum(before - after for before, after in self.weights.values())


def shrink(network: Network) -> tuple[Network, Shrinkage]:
    """The smallest network found that computes the same outputs, and what went.

    Both are run on random images before this counts as done.

    Raises:
        ValueError: the kernels were not built, or the outputs differ.
    """
    work = _Work(network)
    size = None
    while size != work.size():
        size = work.size()
        work.fold_constants()
        work.drop_unread()
        work.bypass_constant_branches()
        work.drop_nodes()
        work.drop_channels()
    smaller = work.network()
    _require_equal(network, smaller)
    return smaller, _shrinkage(network, smaller)


@dataclass
class _Weights:
    """The weights of a convolution that are not zero, one entry of each array for each.

    Attributes:
        filters, channels: of the whole maps, whatever the groups.
        taps: row * columns + column in the window.
        bias: of each filter, float64.
    """

    filters: np.ndarray
    channels: np.ndarray
    taps: np.ndarray
    values: np.ndarray
    bias: np.ndarray

    def keep(self, which: np.ndarray) -> None:
        for name in ("filters", "channels", "taps", "values"):
            setattr(self, name, getattr(self, name)[which])


class _Work:
    """A network taken apart; every method leaves one that computes the same outputs."""

    def __init__(self, network: Network):
        self._network = network
        given = network.graph
        self.graph = Graph(list(given.shapes), list(given.nodes), [0], list(given.outputs))
        self.weights = {n.name: _entries(network, n) for n in _convolutions(network.graph)}
        self.vectors = {
            name: vector
            for name, vector in network.vectors.items()
            if name.rpartition("/")[0] not in self.weights
        }

    def size(self) -> tuple[int, ...]:
        """What gets smaller until nothing more can go."""
        shapes, weights = self.graph.shapes, self.weights.values()
        return len(shapes), sum(s.channels for s in shapes), sum(len(w.values) for w in weights)

    # Constants ------------------------------------------------------------------------------

    def fold_constants(self) -> None:
        """Take constant channels into the biases of the convolutions that read them."""
        known = [np.full(self.graph.shapes[0].channels, np.nan)]
        for node in self.graph.nodes:
            if isinstance(node, g.Convolution):
                self._absorb(node, known[node.sources[0]])
            known.append(self._constants(node, [known[s] for s in node.sources]))
        self._known = known

    def _absorb(self, node: g.Convolution, known: np.ndarray) -> None:
        weights = self.weights[node.name]
        constant = known[weights.channels]
        inside = _never_in_padding(node.window)[weights.taps]
        gone = (constant == 0) | (~np.isnan(constant) & inside)
        np.add.at(weights.bias, weights.filters[gone], (weights.values * constant)[gone])
        weights.keep(~gone)

    def _constants(self, node: Node, known: list[np.ndarray]) -> np.ndarray:
        """The constant that each channel of `node` is at every position, or NaN."""
        match node:
            case g.Convolution(name=name):
                weights = self.weights[name]
                alive = np.bincount(weights.filters, minlength=len(weights.bias)) > 0
                return np.where(alive, np.nan, weights.bias)
            case g.Affine(name=name):
                scale, shift = (self.vectors[f"{name}/{v}"].astype(float) for v in _AFFINE)
                return np.where(scale == 0, shift, scale * known[0] + shift)
            case g.Rectifier():
                return np.maximum(known[0], 0)
            case g.Swish():
                with np.errstate(over="ignore"):  # far below zero it is 0
                    return known[0] / (1 + np.exp(-known[0]))
            case g.Rectifier6():
                return np.clip(known[0], 0, 6)
            case g.Sum():
                return known[0] + known[1]
            case g.Concatenation():
                return np.concatenate(known)
            case g.Flatten():
                _, height, width = self.graph.shapes[node.sources[0]]
                return np.repeat(known[0], height * width)
            case g.MeanPool() if node.full_area and node.window.padding != (0, 0):
                return np.where(known[0] == 0, 0.0, np.nan)
        return known[0]

    def bypass_constant_branches(self) -> None:
        """In the place of a sum with a constant map, that constant added, or nothing at all."""
        same = list(range(len(self.graph.shapes)))
        for number, node in enumerate(self.graph.nodes):
            node = replace(node, sources=tuple(same[s] for s in node.sources))
            self.graph.nodes[number] = node
            if not isinstance(node, g.Sum):
                continue
            constant = [s for s in node.sources if not np.isnan(self._known[s]).any()]
            if not constant:
                continue
            other = node.sources[node.sources[0] == constant[0]]
            shift = self._known[constant[0]]
            if shift.any():
                self.graph.nodes[number] = self._affine(other, node.out, shift)
            else:
                same[node.out] = other
        self.graph.outputs = [same[v] for v in self.graph.outputs]

    def _affine(self, source: int, out: int, shift: np.ndarray) -> g.Affine:
        taken = {n.name for n in self.graph.nodes if isinstance(n, g.Convolution | g.Affine)}
        name = next(n for n in (f"constant_{i}" for i in range(len(taken) + 1)) if n not in taken)
        self.vectors[f"{name}/scale"] = np.ones(len(shift), np.float32)
        self.vectors[f"{name}/shift"] = shift.astype(np.float32)
        return g.Affine((source,), out, name)

    # What nobody reads ----------------------------------------------------------------------

    def drop_unread(self) -> None:
        """Drop the weights of filters whose channel no output depends on."""
        needed = [np.zeros(s.channels, bool) for s in self.graph.shapes]
        needed[self.graph.outputs[0]][:] = True
        for node in reversed(self.graph.nodes):
            out = needed[node.out]
            if isinstance(node, g.Convolution):
                weights = self.weights[node.name]
                weights.keep(out[weights.filters])
                weights.bias[~out] = 0
                needed[node.sources[0]][weights.channels] = True
            else:
                for source, channels in _elementwise(node, self.graph.shapes):
                    np.logical_or.at(needed[source], channels[0], out[channels[1]])
        self._needed = needed

    def drop_nodes(self) -> None:
        """Drop nodes that do not lead to the output."""
        wanted = {0, *self.graph.outputs}
        for node in reversed(self.graph.nodes):
            wanted.update(node.sources if node.out in wanted else ())
        number = {old: new for new, old in enumerate(sorted(wanted))}
        self.graph = Graph(
            [self.graph.shapes[v] for v in sorted(wanted)],
            [
                replace(n, sources=tuple(number[s] for s in n.sources), out=number[n.out])
                for n in self.graph.nodes
                if n.out in wanted
            ],
            [0],
            [number[v] for v in self.graph.outputs],
        )
        self._needed = [self._needed[v] for v in sorted(wanted)]
        names = {n.name for n in self.graph.nodes if isinstance(n, g.Convolution | g.Affine)}
        self.weights = {n: w for n, w in self.weights.items() if n in names}
        self.vectors = {n: v for n, v in self.vectors.items() if n.rpartition("/")[0] in names}

    def drop_channels(self) -> None:
        """Drop channels that are not needed, nor tied to one that is."""
        kept = self._kept_channels()
        shapes = [Shape(int(kept[0].sum()), *self.graph.shapes[0][1:])]
        nodes = []
        for node in self.graph.nodes:
            kept_in, kept_out = kept[node.sources[0]], kept[node.out]
            if isinstance(node, g.Convolution):
                node = self._without(node, kept_in, kept_out)
            elif isinstance(node, g.Affine):
                for vector in _AFFINE:
                    key = f"{node.name}/{vector}"
                    self.vectors[key] = self.vectors[key][kept_out]
            sources = [shapes[s] for s in node.sources]
            shapes.append(made_shape(node, sources, int(kept_out.sum())))
            nodes.append(node)
        self.graph.shapes, self.graph.nodes = shapes, nodes

    def _kept_channels(self) -> list[np.ndarray]:
        kept = [channels.copy() for channels in self._needed]
        kept[0][:] = True
        settled = False
        while not settled:
            before = sum(int(k.sum()) for k in kept)
            for node in (*self.graph.nodes, *reversed(self.graph.nodes)):
                for source, (channels, outs) in _tied(node, self.graph.shapes):
                    np.logical_or.at(kept[source], channels, kept[node.out][outs])
                    np.logical_or.at(kept[node.out], outs, kept[source][channels])
            settled = before == sum(int(k.sum()) for k in kept)
            if settled:
                for empty in (k for k in kept if not k.any()):
                    empty[0], settled = True, False
        return kept

    def _without(self, node: g.Convolution, kept_in, kept_out) -> g.Convolution:
        weights = self.weights[node.name]
        weights.filters = (np.cumsum(kept_out) - 1)[weights.filters]
        weights.channels = (np.cumsum(kept_in) - 1)[weights.channels]
        weights.bias = weights.bias[kept_out]
        if node.groups == 1:
            return node
        return replace(node, groups=int(kept_out.reshape(node.groups, -1)[:, 0].sum()))

    # Together again -------------------------------------------------------------------------

    def network(self) -> Network:
        """The network as it is now."""
        patterns, values, vectors = {}, {}, dict(self.vectors)
        nodes = list(self.graph.nodes)
        for number, node in enumerate(nodes):
            if isinstance(node, g.Convolution):
                weights = self.weights[node.name]
                patterns[node.name], values[node.name] = self._compact(node, weights)
                bias = node.bias or bool(weights.bias.any())
                nodes[number] = replace(node, bias=bias)
                if bias:
                    vectors[f"{node.name}/bias"] = weights.bias.astype(np.float32)
        graph = Graph(self.graph.shapes, nodes, [0], self.graph.outputs)
        return Network(
            graph,
            patterns,
            values,
            vectors,
            self._network.classes,
            self._network.metadata,
        )

    def _compact(self, node: g.Convolution, weights: _Weights) -> tuple[Pattern, np.ndarray]:
        channels = self.graph.shapes[node.sources[0]].channels // node.groups
        shape = (len(weights.bias), channels, *node.window.size)
        taps = shape[2] * shape[3]
        index = weights.filters * channels + weights.channels % channels
        index = index * taps + weights.taps
        # Channels and filters went, but none changed places: what is left still ascends.
        whole = len(index) == shape[0] * channels * taps
        return Pattern(shape, None if whole else index), weights.values


_AFFINE = ("scale", "shift")


def _never_in_padding(window: Window) -> np.ndarray:
    """For each tap of a window whether it lies inside a map of any size, wherever it stands."""
    inside = []
    for k, p, d, e in zip(window.size, window.padding, window.dilation, window.extra):
        first = np.arange(k) * d - p
        # The window that stands lowest begins at n + 2 p + e - d (k - 1) - 1, counted from -p.
        inside.append((first >= 0) & (first <= d * (k - 1) - 2 * p - e))
    return (inside[0][:, None] & inside[1]).ravel()


def _convolutions(graph: Graph) -> list[g.Convolution]:
    return [node for node in graph.nodes if isinstance(node, g.Convolution)]


def _entries(network: Network, node: g.Convolution) -> _Weights:
    pattern, values = network.patterns[node.name], network.values[node.name]
    filters, places = (part.astype(np.int64) for part in pattern.filter_and_place)
    taps = pattern.shape[2] * pattern.shape[3]
    group = filters // (pattern.filters // node.groups)
    channels = places // taps + group * pattern.shape[1]
    bias = network.vectors.get(f"{node.name}/bias", np.zeros(pattern.filters))
    return _Weights(filters, channels, places % taps, values, bias.astype(np.float64))


Channels = tuple[np.ndarray, np.ndarray]
"""Channels of a source, and the channels of the node that belong to them."""


def _elementwise(node: Node, shapes: list[Shape]) -> list[tuple[int, Channels]]:
    """For each source which of its channels becomes which of `node`, no convolution."""
    found, first = [], 0
    for source in node.sources:
        channels = np.arange(shapes[source].channels)
        if isinstance(node, g.Flatten):
            channels = np.repeat(channels, shapes[source].height * shapes[source].width)
        found.append((source, (channels, first + np.arange(len(channels)))))
        if isinstance(node, g.Concatenation):
            first += len(channels)
    return found


def _tied(node: Node, shapes: list[Shape]) -> list[tuple[int, Channels]]:
    """Pairs of channels of sources and of `node` that go together or not at all."""
    if not isinstance(node, g.Convolution):
        return _elementwise(node, shapes)
    if node.groups == 1:
        return []
    source = node.sources[0]
    inputs, outputs = shapes[source].channels, shapes[node.out].channels
    group_in = np.arange(inputs) // (inputs // node.groups)
    group_out = np.arange(outputs) // (outputs // node.groups)
    # All channels of a group with its first filter, all its filters with its first channel.
    first_out = group_out.searchsorted(group_in)
    first_in = group_in.searchsorted(group_out)
    return [
        (source, (np.arange(inputs), first_out)),
        (source, (first_in, np.arange(outputs))),
    ]


def _require_equal(network: Network, smaller: Network) -> None:
    """Raises ValueError where the outputs for random images differ."""
    kernels = native.named("float64")
    random = np.random.default_rng(0)
    images = random.random((_TRIALS, *network.input_shape))
    images[_TRIALS // 2 :] = random.standard_normal(images[_TRIALS // 2 :].shape)
    expected, found = (
        one.runner(kernels=kernels).forward([images])[0] for one in (network, smaller)
    )
    error, scale = np.abs(found - expected).max(), np.abs(expected).max()
    if not error <= TOLERANCE * max(scale, 1.0):
        raise ValueError(
            f"the shrunk network differs by {error:g} from outputs up to {scale:g}; "
            "keep the network as it was and report this"
        )


def _shrinkage(network: Network, smaller: Network) -> Shrinkage:
    def both(count) -> dict[str, tuple[int, int]]:
        return {n: (count(network, n), count(smaller, n)) for n in network.patterns}

    return Shrinkage(
        both(lambda one, n: one.patterns[n].filters if n in one.patterns else 0),
        both(lambda one, n: len(one.values.get(n, ()))),
    )
