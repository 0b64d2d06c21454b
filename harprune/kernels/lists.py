# SPDX-License-Identifier: Apache-2.0
"""Kept weights as the kernels read them: per filter, offsets into the input's map and values.

`Pattern` says where a layer's kept weights are. A `List` is that pattern laid over the memory of
one map: once forwards, filter by filter, and once transposed, input channel by input channel, for
the gradient to the input.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from harprune.kernels.graph import Convolution, Shape

QUAD = 4
"""Filters that walk one list together where a layer is nearly dense."""
NEARLY_DENSE = 0.6
"""Density from which a layer runs as a dense one; measured by bench/attack.py."""


@dataclass(eq=False)
class Pattern:
    """Positions of the kept weights of a layer.

    Attributes:
        shape: of the weight, (filters, channels per group, rows, columns).
        index: ascending flat positions in it, int64; None keeps every weight.
        source: what the pattern was made from, for who wants to know whether it still holds.
    """

    shape: tuple[int, int, int, int]
    index: np.ndarray | None
    source: object = None

    @property
    def filters(self) -> int:
        return self.shape[0]

    @property
    def window(self) -> int:
        """Weights of one filter."""
        return int(np.prod(self.shape[1:]))

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each filter's kept weights start among all, and one more."""
        bounds = np.arange(self.filters + 1, dtype=np.int64) * self.window
        return bounds if self.index is None else np.searchsorted(self.index, bounds)

    @cached_property
    def filter_and_place(self) -> tuple[np.ndarray, np.ndarray]:
        """The filter of each kept weight, and its position within the filter."""
        filters = np.repeat(np.arange(self.filters, dtype=np.int32), np.diff(self.starts))
        if self.index is None:
            return filters, np.tile(np.arange(self.window, dtype=np.int32), self.filters)
        return filters, (self.index - filters.astype(np.int64) * self.window).astype(np.int32)


def sift(weight: np.ndarray) -> tuple[Pattern, np.ndarray]:
    """Exactly the weights that are not zero: where they are, and their values.

    `weight` is (filters, channels per group, rows, columns), or (filters, inputs) of a linear
    layer.
    """
    flat = weight.reshape(-1)
    index = np.flatnonzero(flat)
    pattern = Pattern((*weight.shape, 1, 1)[:4], None if len(index) == len(flat) else index)
    return pattern, flat if pattern.index is None else flat[index]


@dataclass(eq=False)
class List:
    """`struct list` of blocks.h: `order` says which of the layer's weights stands where."""

    starts: np.ndarray
    offsets: np.ndarray
    order: np.ndarray | None
    width: int
    values: np.ndarray

    def fill(self, weights: np.ndarray) -> None:
        """Take present values: the kept ones in ascending position, or all, as `order` indexes."""
        if self.order is None:
            self.values[...] = weights
        else:
            np.take(weights, self.order, out=self.values)


@dataclass(frozen=True)
class Strides:
    """Of a map in memory, in numbers."""

    plane: int
    row: int
    column: int


def window_offsets(node: Convolution, channels: int, memory: Strides) -> np.ndarray:
    """For each place of a filter of group 0, its offset from the output position's input."""
    (ky, kx), (py, px), (dy, dx) = node.window.size, node.window.padding, node.window.dilation
    rows = (np.arange(ky) * dy - py) * memory.row
    columns = (np.arange(kx) * dx - px) * memory.column
    planes = np.arange(channels) * memory.plane
    return (planes[:, None, None] + rows[:, None] + columns).ravel().astype(np.int32)


def forward_list(node: Convolution, pattern: Pattern, memory: Strides, dtype) -> List:
    """The list of `node` over its input's map."""
    channels = pattern.shape[1]
    table = window_offsets(node, channels, memory)
    if pattern.index is None and node.groups == 1 and pattern.filters % QUAD == 0:
        order = np.arange(pattern.filters * pattern.window).reshape(pattern.filters, -1)
        return _quads(table, order, dtype)
    filters, places = pattern.filter_and_place
    offsets = table[places]
    if node.groups > 1:
        group = filters // (pattern.filters // node.groups)
        offsets = offsets + group * np.int32(channels * memory.plane)
    return List(pattern.starts, offsets, None, 1, np.empty(len(offsets), dtype))


@dataclass(frozen=True)
class Phase:
    """Input positions (top + i stride, left + j stride), and the first of its lists' filters."""

    top: int
    left: int
    first: int


def transposed_list(
    node: Convolution, pattern: Pattern, shape: Shape, memory: Strides, dtype
) -> tuple[List, list[Phase]]:
    """The list of the gradient to the input over the map of the output's gradient.

    With a stride, positions of the input fall into phases that see different taps; the list holds
    the filters (= input channels) of one phase after those of another.
    """
    (ky, kx), (py, px), (dy, dx) = node.window.size, node.window.padding, node.window.dilation
    (sy, sx), per_group = node.window.stride, pattern.filters // node.groups
    # Input row y meets tap k at output row (y + p - k d) / s, where that is whole: rows y = top,
    # top + s, ... do, at rows up, up + 1, ... of the output.
    taps_y, taps_x = py - np.arange(ky) * dy, px - np.arange(kx) * dx
    tops, lefts = -taps_y % sy, -taps_x % sx
    ups, acrosses = (tops + taps_y) // sy, (lefts + taps_x) // sx
    channels = pattern.shape[1]
    phase = (tops[:, None] * sx + lefts)[None] * shape.channels + np.arange(channels)[:, None, None]
    key_of_place = phase.ravel()
    offset_of_place = np.broadcast_to(
        ups[:, None] * memory.row + acrosses * memory.column, (channels, ky, kx)
    ).ravel()
    phases = [Phase(y, x, (y * sx + x) * shape.channels) for y in range(sy) for x in range(sx)]
    phases = [p for p in phases if p.top < shape.height and p.left < shape.width]
    many = sy * sx * shape.channels
    if pattern.index is None and node.groups == 1 and channels % QUAD == 0:
        return _transposed_quads(
            pattern, memory, key_of_place, offset_of_place, many, dtype
        ), phases
    filters, places = pattern.filter_and_place
    key = key_of_place[places]
    if node.groups > 1:
        key = key + filters // per_group * channels
    # Sixteen bits where they do, for numpy then sorts by radix.
    order = np.argsort(key.astype(np.uint16 if many <= 65536 else np.int64), kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(key, minlength=many))])
    offsets = offset_of_place[places] + filters * np.int64(memory.plane)
    offsets = offsets[order].astype(np.int32)
    return List(starts.astype(np.int64), offsets, order, 1, np.empty(len(order), dtype)), phases


def _quads(table: np.ndarray, order: np.ndarray, dtype) -> List:
    """Every weight kept, four filters to a list; `order` is [filter, place]."""
    groups = order.shape[0] // QUAD
    starts = np.arange(groups + 1, dtype=np.int64) * order.shape[1]
    order = order.reshape(groups, QUAD, -1).transpose(0, 2, 1)
    return List(starts, np.tile(table, groups), order.copy(), QUAD, np.empty(order.shape, dtype))


def _transposed_quads(pattern, memory, key_of_place, offset_of_place, many, dtype) -> List:
    """Every weight kept: four input channels of a phase walk its taps of all filters together."""
    order_of_places = np.argsort(key_of_place, kind="stable")
    counts = np.bincount(key_of_place, minlength=many)
    bounds = np.concatenate([[0], np.cumsum(counts)])
    filters = np.arange(pattern.filters, dtype=np.int64)
    starts, offsets, order = [0], [], []
    for first in range(0, many, QUAD):
        places = [order_of_places[bounds[first + i] : bounds[first + i + 1]] for i in range(QUAD)]
        taps = offset_of_place[places[0]]
        offsets.append((filters[:, None] * memory.plane + taps).ravel())
        order.append(
            np.stack([(filters[:, None] * pattern.window + p).ravel() for p in places], axis=1)
        )
        starts.append(starts[-1] + len(offsets[-1]))
    order = np.concatenate(order)
    offsets = np.concatenate(offsets).astype(np.int32)
    return List(np.array(starts, np.int64), offsets, order, QUAD, np.empty(order.shape, dtype))
