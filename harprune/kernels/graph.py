# SPDX-License-Identifier: Apache-2.0
"""A network as the kernels see it: values, and the nodes that make one from others.

A value is a number that names a map of `Shape` per image. Nodes stand in the order of
computation and each makes one value; parameters are named, and given to the plan later.
"""

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

Pair = tuple[int, int]


class Shape(NamedTuple):
    """Channels, height and width of one image's map; a vector is channels x 1 x 1."""

    channels: int
    height: int = 1
    width: int = 1


@dataclass(frozen=True)
class Window:
    """The part of a map that one output position sees, as (rows, columns).

    Before the map stand `padding` zeros, behind it `extra` more than that, or fewer.
    """

    size: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    extra: Pair = (0, 0)

    def over(self, height: int, width: int) -> Pair:
        """Height and width of what sliding this window over a map gives."""
        room = (n + 2 * p + e for n, p, e in zip((height, width), self.padding, self.extra))
        sides = zip(room, self.size, self.stride, self.dilation)
        rows, columns = ((n - d * (k - 1) - 1) // s + 1 for n, k, s, d in sides)
        return rows, columns

    @property
    def border(self) -> Pair:
        """The most zeros at an end of each side."""
        rows, columns = (p + max(e, 0) for p, e in zip(self.padding, self.extra))
        return rows, columns


@dataclass(frozen=True)
class Node:
    """Makes value `out` from the values `sources`."""

    sources: tuple[int, ...]
    out: int


@dataclass(frozen=True)
class Named(Node):
    """A node with parameters."""

    name: str


@dataclass(frozen=True)
class Convolution(Named):
    """Weights `name` of shape (filters, channels / groups, *window.size); also a linear layer."""

    window: Window
    groups: int = 1
    bias: bool = True


@dataclass(frozen=True)
class Affine(Named):
    """scale[c] x + shift[c] with the vectors `name`."""


@dataclass(frozen=True)
class Normalisation(Named):
    """Batch norm with the statistics of the batch, scale and shift `name`."""


@dataclass(frozen=True)
class Rectifier(Node):
    """max(x, 0)."""


@dataclass(frozen=True)
class Activation(Node):
    """A function of each number, zero at zero, in a step of its own of this kind."""

    kind: ClassVar[str]


@dataclass(frozen=True)
class Swish(Activation):
    """x / (1 + exp(-x)), which torch calls SiLU."""

    kind = "swish"


@dataclass(frozen=True)
class Rectifier6(Activation):
    """min(max(x, 0), 6)."""

    kind = "relu6"


@dataclass(frozen=True)
class Sum(Node):
    """x + y."""


@dataclass(frozen=True)
class Concatenation(Node):
    """The sources' channels one after the other."""


@dataclass(frozen=True)
class Pool(Node):
    """One number of each window of each channel."""

    window: Window


@dataclass(frozen=True)
class MaxPool(Pool):
    """The largest value in each window; what lies outside the map does not count."""


@dataclass(frozen=True)
class MeanPool(Pool):
    """The mean of each window: over all its area with `full_area`, else over what is in the map.

    With `adaptive` the windows part the map, and into as many parts whatever the images' size.
    """

    full_area: bool = True
    adaptive: bool = False


@dataclass(frozen=True)
class Flatten(Node):
    """A map as a vector, channel by channel."""


@dataclass
class Graph:
    """Nodes in order, the shapes of all values, and which values go in and come out."""

    shapes: list[Shape] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)

    def value(self, shape: Shape) -> int:
        """A new value."""
        self.shapes.append(shape)
        return len(self.shapes) - 1

    def users(self) -> dict[int, list[Node]]:
        """The nodes that read each value, once for every time they read it."""
        readers: dict[int, list[Node]] = {value: [] for value in range(len(self.shapes))}
        for node in self.nodes:
            for source in node.sources:
                readers[source].append(node)
        return readers

    def parted(self, first: int) -> tuple["Graph", "Graph"]:
        """The nodes before number `first`, and from there on; what the latter read goes between.

        Values keep their numbers.
        """
        before, after = self.nodes[:first], self.nodes[first:]
        made = {node.out for node in after}
        wanted = [source for node in after for source in node.sources] + self.outputs
        between = list(dict.fromkeys(value for value in wanted if value not in made))
        return (
            Graph(self.shapes, before, self.inputs, between),
            Graph(self.shapes, after, between, self.outputs),
        )
