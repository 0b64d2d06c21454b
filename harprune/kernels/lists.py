# SPDX-License-Identifier: Apache-2.0
"""Kept weights as the kernels read them: per filter, offsets into the input's map and values.

`Pattern` says where a layer's kept weights are. A `List` is that pattern laid over the memory of
one map: once forwards, filter by filter, and once transposed, input channel by input channel, for
the gradient to the input.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

from harprune.kernels.graph import Convolution, Shape

QUAD = 4
"""Filters that walk one list together where a layer is nearly dense."""
REACHES = 9
"""Parts of a small map that a weight may reach: REACHES of blocks.h."""
NEARLY_DENSE = 0.6
"""Density from which a layer runs as a dense one; measured by bench/attack.py."""


@dataclass(eq=False)
class Pattern:
    """Positions of the kept weights of a layer.

    Attributes:
        shape: of the weight, (filters, channels per group, rows, columns).
        index: ascending flat positions in it, int64; None keeps every weight.
        source, version: what the pattern was made from, for who wants to know whether it still
            holds.
    """

    shape: tuple[int, int, int, int]
    index: np.ndarray | None
    source: object = None
    version: int = 0

    @property
    def filters(self) -> int:
        return self.shape[0]

    @property
    def window(self) -> int:
        """Weights of one filter, zeros included."""
        return prod(self.shape[1:])

    @property
    def size(self) -> int:
        """Weights of the layer, zeros included."""
        return prod(self.shape)

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


def shape_of(weight: np.ndarray) -> tuple[int, int, int, int]:
    """(filters, channels per group, rows, columns), also of a linear layer's (filters, inputs)."""
    filters, channels, rows, columns = (*weight.shape, 1, 1)[:4]
    return filters, channels, rows, columns


def sift(weight: np.ndarray) -> tuple[Pattern, np.ndarray]:
    """Exactly the weights that are not zero: where they are, and their values."""
    flat = weight.reshape(-1)
    index = np.flatnonzero(flat)
    pattern = Pattern(shape_of(weight), None if len(index) == len(flat) else index)
    return pattern, flat if pattern.index is None else flat[index]


@dataclass(eq=False)
class List:
    """`struct list` of blocks.h: `order` says which of the layer's weights stands where.

    With `reaches` each filter has REACHES ranges, else one.
    """

    starts: np.ndarray
    offsets: np.ndarray
    order: np.ndarray | None
    width: int
    values: np.ndarray
    reaches: bool = False

    @cached_property
    def ascending(self) -> np.ndarray:
        """The offsets of the kept weights in ascending position, where each stands once."""
        if self.order is None:
            return self.offsets
        offsets = np.empty_like(self.offsets)
        offsets[self.order] = self.offsets
        return offsets

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


def small_reach(first, step, read, made, channels: int, largest: int) -> np.ndarray | None:
    """What the places of a filter reach of an output that is one tile: REACHES of blocks.h.

    Args:
        first: for each tap, the input position that output position 0 reads; this and the next as
            (rows, columns).
        step: from one output position's input to the next one's.
        read, made: positions of the input and of the output.
        largest: positions of a tile.

    Returns:
        For each place a number below REACHES; None where a tap reaches something else.
    """
    if tuple(made) not in ((2, 2), (4, 4)) or made[0] * made[1] > largest:
        return None
    sides = []
    for taps, stride, among, many in zip(first, step, read, made):
        low = np.maximum(0, -(taps // stride))
        high = np.minimum(many, (among - 1 - taps) // stride + 1)
        side = np.full(len(taps), -1)
        for kind, (begin, end) in enumerate(((1, many), (0, many), (0, many - 1))):
            side[(low == begin) & (high == end)] = kind
        if (side < 0).any():
            return None
        sides.append(side)
    return np.tile((3 * sides[0][:, None] + sides[1]).ravel(), channels)


def forward_list(
    node: Convolution,
    pattern: Pattern,
    shape: Shape,
    memory: Strides,
    dtype,
    largest: int = 0,
) -> List:
    """The list of `node` over its input's map, of `shape`.

    Where the output has `largest` positions or fewer, it may be by what weights reach of it.
    """
    channels, window = pattern.shape[1], node.window
    table = window_offsets(node, channels, memory)
    if pattern.index is None and node.groups == 1 and pattern.filters % QUAD == 0:
        order = np.arange(pattern.size).reshape(pattern.filters, -1)
        return _quads(table, order, dtype)
    filters, places = pattern.filter_and_place
    offsets = table[places]
    first = [np.arange(k) * d - p for k, d, p in zip(window.size, window.dilation, window.padding)]
    made = window.over(shape.height, shape.width)
    reach = small_reach(first, window.stride, shape[1:], made, channels, largest)
    if node.groups > 1:
        group = filters // (pattern.filters // node.groups)
        offsets = offsets + group * np.int32(channels * memory.plane)
    if reach is not None:
        key = filters * REACHES + reach[places]
        return _ordered(key, pattern.filters * REACHES, offsets, dtype, reaches=True)
    return List(pattern.starts, offsets, None, 1, np.empty(len(offsets), dtype))


def _ordered(key: np.ndarray, many: int, offsets: np.ndarray, dtype, *, reaches: bool) -> List:
    """Entries by their key below `many`, and by their position where that is the same."""
    order, values = order_by(key, many), np.empty(len(key), dtype)
    offsets = offsets[order].astype(np.int32)
    return List(starts_by(key, many), offsets, order, 1, values, reaches)


def order_by(key: np.ndarray, many: int) -> np.ndarray:
    """Positions by their key below `many`, and as they stand where that is the same."""
    # Sixteen bits where they do, for numpy then sorts by radix.
    return np.argsort(key.astype(np.uint16 if many <= 65536 else np.int64), kind="stable")


def starts_by(key: np.ndarray, many: int) -> np.ndarray:
    """Where the entries of each key below `many` start in that order, and one more."""
    return np.concatenate([[0], np.cumsum(np.bincount(key, minlength=many))])


def transposed_list(
    node: Convolution,
    pattern: Pattern,
    shape: Shape,
    memory: Strides,
    dtype,
    largest: int = 0,
) -> List:
    """The list of the gradient to the input over the map of the output's gradient.

    Where a phase has `largest` positions or fewer, it may be by what weights reach of it.

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
    many = sy * sx * shape.channels
    if pattern.index is None and node.groups == 1 and channels % QUAD == 0:
        return _transposed_quads(pattern, memory, key_of_place, offset_of_place, many, dtype)
    filters, places = pattern.filter_and_place
    key = key_of_place[places]
    if node.groups > 1:
        key = key + filters // per_group * channels
    reach = None
    if shape.height % sy == 0 and shape.width % sx == 0:
        read = node.window.over(shape.height, shape.width)
        made = shape.height // sy, shape.width // sx
        reach = small_reach((ups, acrosses), (1, 1), read, made, channels, largest)
    if reach is not None:
        key, many = key * REACHES + reach[places], many * REACHES
    offsets = offset_of_place[places] + filters * np.int64(memory.plane)
    return _ordered(key, many, offsets, dtype, reaches=reach is not None)


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
