# SPDX-License-Identifier: Apache-2.0
"""Forward passes with rows of an image in vectors: the layout for a few images, and for large maps.

A map's rows lie in whole vectors and its kept weights are ordered by the horizontal displacement
of their tap, so that a weight reads aligned vectors and its sum is moved sideways once (rows.h).
Steps on large maps run image by image; on small ones as many images as fill a tile go together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from queue import SimpleQueue
from threading import Lock

import numpy as np

from harprune.kernels.fusion import Copy, Fused, fuse
from harprune.kernels.graph import (
    Affine,
    Concatenation,
    Convolution,
    Flatten,
    Graph,
    MaxPool,
    MeanPool,
    Node,
    Shape,
    Window,
)
from harprune.kernels.lists import QUAD, List, Pattern
from harprune.kernels.memory import place_maps
from harprune.kernels.native import DISPLACEMENT, ROW_KINDS, ROW_STEP, ROW_STORES, Kernels
from harprune.kernels.runtime import aligned, each

GROUP = 8
"""Images that go through the steps together, at most: sums of a tile (ROW_SUMS)."""
TEAM = 60_000_000
"""Multiply-adds of a lone group from which threads share its steps; fewer do not wait for them."""
LARGEST = 2**28
"""Numbers of one image's map; offsets then fit 32 bits."""
LONGEST = 4096
"""Numbers of a row that is pooled (ROW_LONGEST)."""


@dataclass(eq=False)
class Map:
    """A value in the arena: rows at a pitch, planes parted by `border` rows of zeros.

    Attributes:
        shape: channels are planes, so a split map has one for each phase.
        pitch: numbers from a row to the next; under `lanes`, rows are packed.
        lanes: numbers of a vector.
        border: rows that readers reach above and below.
        margin: numbers that readers reach beyond the ends of a plane, besides.
    """

    shape: Shape
    pitch: int
    lanes: int
    border: int = 0
    margin: int = 0
    copies: int = 1
    at: int = -1

    @property
    def memory(self) -> "Map":
        return self

    @property
    def packed(self) -> bool:
        return self.pitch < self.lanes

    @property
    def head(self) -> int:
        """Zeros before a plane, and after the last."""
        return _whole(self.border * self.pitch, self.lanes)

    @property
    def body(self) -> int:
        return _whole(self.shape.height * self.pitch, self.lanes)

    @property
    def plane(self) -> int:
        return self.head + self.body

    @property
    def image(self) -> int:
        """Numbers of a copy."""
        return self.shape.channels * self.plane + self.head + 2 * self.margin

    @property
    def numbers(self) -> int:
        """Of all copies."""
        return self.copies * self.image

    @property
    def vectors(self) -> int:
        """Of a row; one where rows are packed."""
        return max(1, self.pitch // self.lanes)

    @property
    def lines(self) -> int:
        """Rows; vectors of a plane where rows are packed."""
        return self.body // self.lanes if self.packed else self.shape.height

    def masks(self) -> np.ndarray | None:
        """Which lanes of each vector of a row, or of a packed plane, hold numbers; None for all."""
        _, height, width = self.shape
        if self.packed:
            place = np.arange(self.body)
            holds = (place % self.pitch < width) & (place // self.pitch < height)
        else:
            holds = np.arange(self.pitch) < width
        return None if holds.all() else _bits(holds.reshape(-1, self.lanes))

    @property
    def geometry(self) -> tuple[int, ...]:
        """Maps that agree in this may take each other's place: zeros then stay zero."""
        channels, *sides = self.shape
        copies = (self.copies, channels) if self.copies > 1 else ()
        return (*sides, self.pitch, self.border, self.margin, *copies)

    def place(self, number_bytes: int) -> tuple[int, ...]:
        """The fields of `struct rows`."""
        start = self.at + (self.margin + self.head) * number_bytes
        return start, self.plane, self.pitch, self.image, self.copies


@dataclass(eq=False)
class Part:
    """A map from a channel on."""

    whole: Map
    channel: int = 0

    def place(self, number_bytes: int) -> tuple[int, ...]:
        at, *strides = self.whole.place(number_bytes)
        return (at + self.channel * self.whole.plane * number_bytes, *strides)


@dataclass(eq=False)
class RowStep:
    """One `struct row_step` before its maps have places."""

    kind: str
    shape: Shape
    source: Part | None = None
    out: Part | None = None
    other: Part | None = None
    rectify: bool = False
    vectors: tuple[str, str] = ("", "")
    external: int = -1
    node: Node | None = None
    stride: tuple[int, int] = (1, 1)
    taps: tuple[int, ...] = ()
    stored: str = "plain"
    sums: Map | None = None
    together: int = 1

    def __post_init__(self):
        # The map that the sums are laid out for: what is stored may be another.
        self.sums = self.out and self.out.whole

    def maps(self) -> list[Map]:
        return [p.whole for p in (self.source, self.out, self.other) if p is not None]


class RowExecutable:
    """A graph with weights, forwards only; it stands in for `runtime.Executable` there.

    Args:
        graph: what to compute.
        kernels: the instruction set that runs it.
        patterns: where the kept weights of each convolution are.
        vectors: bias, scale and shift of each layer, as for `runtime.Executable`.
        threads: how many groups of 8 images run at once; they share the steps of a lone group.

    Raises:
        ValueError: a node is not for these kernels; `runtime.Executable` takes it.
    """

    def __init__(
        self,
        graph: Graph,
        kernels: Kernels,
        patterns: Mapping[str, Pattern],
        vectors: Mapping[str, np.ndarray],
        *,
        threads: int = 1,
    ):
        self.graph, self.kernels, self.patterns, self.vectors = graph, kernels, patterns, vectors
        self.threads = threads
        self._size = kernels.dtype.itemsize
        self._laid: dict[tuple, Map] = {}  # by value, stride and pitch
        self._lists: dict[str, List] = {}
        self._tables: list[np.ndarray] = []  # that the steps point into
        self._steps: list[RowStep] = []
        self._plan()
        self._bytes = self._place()
        self._free: SimpleQueue[np.ndarray] = SimpleQueue()  # arenas
        for _ in range(threads):
            self._free.put(aligned((1, self._bytes))[0])
        self._linked = np.zeros(len(self._steps), ROW_STEP)
        for row, step in zip(self._linked, self._steps):
            self._link(row, step)

    # Running --------------------------------------------------------------------------------

    def load(self, name: str, kept: np.ndarray) -> None:
        """Take the values of the kept weights of layer `name`, in ascending position."""
        self._lists[name].fill(kept)

    @cached_property
    def _multiply_adds(self) -> int:
        """Of kept weights, for one image."""
        nodes = [node for node in self.graph.nodes if isinstance(node, Convolution)]
        return sum(
            int(self.patterns[node.name].starts[-1]) * prod(self.graph.shapes[node.out][1:])
            for node in nodes
        )

    def forward(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The outputs for `inputs`, contiguous [images, ...] arrays of the kernels' dtype."""
        images = len(inputs[0])
        shapes = [self.graph.shapes[v] for v in self.graph.outputs]
        outputs = [np.empty((images, *shape), self.kernels.dtype) for shape in shapes]
        groups = -(-images // GROUP)
        parts = self.threads if groups == 1 and images * self._multiply_adds > TEAM else 1
        meeting, shared = np.zeros(2, np.int64), self._free.get() if parts > 1 else None

        def one(number: int) -> None:
            group, part = divmod(number, parts)
            arrays = [a[group * GROUP :].ctypes.data for a in (*inputs, *outputs)]
            arena = self._free.get() if shared is None else shared
            try:
                self.kernels.run_rows(
                    self._linked,
                    arena.ctypes.data,
                    np.array(arrays, np.uint64),
                    min(GROUP, images - group * GROUP),
                    part,
                    parts,
                    meeting,
                )
            finally:
                if shared is None:
                    self._free.put(arena)

        if shared is None:
            each(one, groups, self.threads)
        else:
            with _one_team:
                each(one, parts, self.threads)
            self._free.put(shared)
        return outputs

    # Planning -------------------------------------------------------------------------------

    def _plan(self) -> None:
        shapes = self.graph.shapes
        for number, value in enumerate(self.graph.inputs):
            out = self._map(value, self._pitch(shapes[value].width))
            self._steps.append(RowStep("pack", shapes[value], out=Part(out), external=number))
        for fused in fuse(self.graph):
            self._step(fused)
        first = len(self.graph.inputs)
        for number, value in enumerate(self.graph.outputs, start=first):
            source = Part(self._read(value))
            self._steps.append(RowStep("unpack", shapes[value], source, external=number))
        self._merge()

    def _merge(self) -> None:
        """Let convolutions store what the one step that reads them would make of it."""
        makers = {step.out.whole: step for step in self._steps if step.kind == "convolve"}
        readers: dict[Map, list[RowStep]] = {}
        for step in self._steps:
            for part in (step.source, step.other):
                if part is not None:
                    readers.setdefault(part.whole, []).append(step)
        for step in list(self._steps):
            maker = makers.get(step.source.whole) if step.source is not None else None
            if maker and len(readers[maker.sums]) == 1 and self._merges(maker, step):
                maker.stored, maker.out = step.kind, step.out
                self._steps.remove(step)

    def _merges(self, maker: RowStep, step: RowStep) -> bool:
        """Whether `step` parts the map that `maker` makes into squares of two by two."""
        if step.kind == "max_pool":
            pairs = step.node.window == Window((2, 2), (2, 2))
        else:
            pairs = step.kind == "split" and step.stride == (2, 2)
        if not pairs or self.patterns[maker.node.name].index is None:
            return False
        made = maker.sums
        _, height, width = made.shape
        # Rows of one vector become packed ones, so two of a parity fill a vector.
        squares = made.vectors in (1, 2, 4) and height % (4 if made.vectors == 1 else 2) == 0
        squares &= not made.packed and width == made.pitch == 2 * step.out.whole.pitch
        return squares and self._reads_whole(maker, 1)

    def _reads_whole(self, step: RowStep, width: int) -> bool:
        """Whether each row of a convolution fits a tile for `width` filters, and is read as it is;
        else a displaced sum takes a vector more."""
        span = 1 << (step.sums.vectors - 1).bit_length()
        short = span <= min(4, GROUP if width == 1 else self.kernels.tile // width)
        short &= all(abs(tap) < self.kernels.lanes for tap in step.taps)
        return short and step.source.whole.pitch == step.sums.pitch

    def _step(self, fused: Fused) -> None:
        main, shape = fused.main, self.graph.shapes[fused.out]
        match main:
            case Convolution():
                step = self._convolution(main, fused.out)
            case Affine() | Copy():
                source = self._read(main.sources[0])
                out = self._map(fused.out, source.pitch)
                step = RowStep("scale", shape, Part(source), Part(out))
                if isinstance(main, Affine):
                    step.vectors = (f"{main.name}/scale", f"{main.name}/shift")
            case MeanPool() if main.window == Window((1, 1)) and fused.other is None:
                self._laid[fused.out, (1, 1), 0] = self._read(main.sources[0])
                return
            case MaxPool() | MeanPool():
                source = self._read(main.sources[0])
                if source.shape.width > LONGEST:
                    raise ValueError(f"a pooled row of {source.shape.width} exceeds {LONGEST}")
                kind = "max_pool" if isinstance(main, MaxPool) else "mean_pool"
                out = self._map(fused.out, self._pitch(shape.width))
                step = RowStep(kind, shape, Part(source), Part(out), node=main)
            case Flatten():
                source = self._read(main.sources[0])
                out = self._map(fused.out, self._pitch(1))
                step = RowStep("flatten", source.shape, Part(source), Part(out))
            case Concatenation():
                self._concatenation(main)
                return
            case _:
                raise ValueError(f"rows do not run {type(main).__name__}; fold or replace it")
        step.rectify = fused.rectify
        if fused.other is not None:
            step.other = Part(self._read(fused.other, pitch=step.out.whole.pitch))
        self._steps.append(step)

    def _convolution(self, node: Convolution, value: int) -> RowStep:
        source, window = node.sources[0], node.window
        shape, stride = self.graph.shapes[value], window.stride
        lanes = self.kernels.lanes
        phase = -(-self.graph.shapes[source].width // stride[1])
        pitch = self._read(source).pitch if stride == (1, 1) else self._pitch(phase)
        out_pitch = self._pitch(shape.width)
        # Packed rows must have the same pitch before and after; whole vectors need not.
        if max(pitch, out_pitch) >= lanes:
            pitch, out_pitch = max(pitch, lanes), max(out_pitch, lanes)
        else:
            pitch = out_pitch = max(pitch, out_pitch)
        read, out = self._read(source, stride, pitch), self._map(value, out_pitch)
        taps_y, taps_x = _taps(window, 0), _displacements(window, read.shape.width, shape.width)
        below = shape.height - 1 + taps_y.max() - (read.shape.height - 1)
        read.border = max(read.border, int(-taps_y.min()), int(below))
        beyond = max(map(abs, taps_x), default=0) // lanes + max(0, out.vectors - read.vectors)
        read.margin = max(read.margin, lanes * (2 + beyond))
        step = RowStep("convolve", shape, Part(read), Part(out), node=node, taps=taps_x)
        step.vectors = ("", f"{node.name}/bias")
        return step

    def _concatenation(self, node: Concatenation) -> None:
        pitch, channel = self._read(node.sources[0]).pitch, 0
        out = self._map(node.out, pitch)
        for value in node.sources:
            source = self._read(value, pitch=pitch)
            step = RowStep("scale", source.shape, Part(source), Part(out, channel))
            self._steps.append(step)
            channel += source.shape.channels

    def _map(self, value: int, pitch: int) -> Map:
        """The map that the step of `value` makes."""
        made = Map(self.graph.shapes[value], pitch, self.kernels.lanes)
        self._laid[value, (1, 1), 0] = self._laid[value, (1, 1), pitch] = made
        return made

    def _read(self, value: int, stride: tuple[int, int] = (1, 1), pitch: int = 0) -> Map:
        """`value` at a pitch (0: as it was made) and split by `stride`; a step makes it so."""
        if (value, stride, pitch) not in self._laid:
            source = self._laid[value, (1, 1), 0]
            channels, height, width = source.shape
            planes = channels * stride[0] * stride[1]
            shape = Shape(planes, -(-height // stride[0]), -(-width // stride[1]))
            split = self._laid[value, stride, pitch] = Map(shape, pitch, self.kernels.lanes)
            step = RowStep("split", source.shape, Part(source), Part(split), stride=stride)
            self._steps.append(step)
        return self._laid[value, stride, pitch]

    def _pitch(self, width: int) -> int:
        """Numbers from a row of so many to the next."""
        lanes = self.kernels.lanes
        return _whole(width, lanes) if 2 * width > lanes else 1 << (width - 1).bit_length()

    def _place(self) -> int:
        """Give every map its place and its copies; the bytes of all."""
        begin = 0  # of the steps that run together as often
        segments: dict[Map, set[int]] = {}
        for number, step in enumerate(self._steps):
            step.together = self._together((step.out or step.source).whole)
            if step.together != self._steps[begin].together:
                begin = number
            for held in step.maps():
                segments.setdefault(held, set()).add(begin)
        for held, begins in segments.items():
            if held.image > LARGEST:
                raise ValueError(f"a map takes {held.image} numbers in rows, over {LARGEST}")
            held.copies = self._steps[min(begins)].together if len(begins) == 1 else GROUP
        onto = {
            step.out.whole: step.other.whole
            for step in self._steps
            if step.other is not None and step.other.whole is not step.source.whole
        }
        maps = [step.maps() for step in self._steps]
        return place_maps(maps, self._size, reuse=True, onto=onto)

    def _together(self, written: Map) -> int:
        """Images whose planes make four sums, enough to hide the latency of one."""
        return max(1, 4 // (1 << (written.lines - 1).bit_length())) if written.vectors == 1 else 1

    # Linking --------------------------------------------------------------------------------

    def _link(self, row: np.void, step: RowStep) -> None:
        row["kind"] = ROW_KINDS.index(step.kind)
        row["channels"], row["height"], row["width"] = step.shape
        for name, part in (("in", step.source), ("out", step.out), ("other", step.other)):
            row[name] = (0, 0, 0, 0, 1) if part is None else part.place(self._size)
        row["has_other"], row["rectify"] = step.other is not None, step.rectify
        row["external"], row["together"] = step.external, step.together
        row["stored"] = ROW_STORES.index(step.stored)
        if step.sums is not None:
            sums = step.sums
            row["lines"], row["vectors"], row["packed"] = sums.lines, sums.vectors, sums.packed
            row["masks"] = self._address(sums.masks())
        if step.source is not None:
            row["in_vectors"] = step.source.whole.vectors
            _, row["in_height"], row["in_width"] = step.source.whole.shape
        for name, vector in zip(("scale", "shift"), step.vectors):
            if vector in self.vectors:
                row[name] = self.vectors[vector].ctypes.data
        if step.kind == "split":
            row["stride_y"], row["stride_x"] = step.stride
        elif step.kind == "convolve":
            self._link_list(row, step)
        elif isinstance(step.node, MaxPool | MeanPool):
            window = step.node.window
            row["size_y"], row["size_x"] = window.size
            row["stride_y"], row["stride_x"] = window.stride
            row["pad_y"], row["pad_x"] = window.padding
            row["full_area"] = isinstance(step.node, MeanPool) and step.node.full_area

    def _link_list(self, row: np.void, step: RowStep) -> None:
        name, pattern = step.node.name, self.patterns[step.node.name]
        read, lanes = step.source.whole, self.kernels.lanes
        dense = pattern.index is None and step.node.groups == 1 and pattern.filters % QUAD == 0
        width = QUAD if dense else 1
        row["whole"] = whole = self._reads_whole(step, width)
        made = _row_list(step, pattern, width, 0 if whole else lanes, self.kernels.dtype)
        self._lists[name] = made
        row["starts"], row["offsets"] = made.starts.ctypes.data, made.offsets.ctypes.data
        row["values"], row["list_width"] = made.values.ctypes.data, width
        moves, taps = np.zeros(len(step.taps), DISPLACEMENT), np.array(step.taps, np.int64)
        moves["vectors"], moves["lanes"] = np.divmod(taps, lanes)
        place = np.arange(lanes) % read.pitch + taps[:, None]
        moves["mask"] = _bits((place >= 0) & (place < read.pitch) | (not read.packed))
        row["displacements"], row["displaced"] = self._address(moves), len(moves)

    def _address(self, table: np.ndarray | None) -> int:
        if table is None:
            return 0
        self._tables.append(table)
        return table.ctypes.data


def _row_list(step: RowStep, pattern: Pattern, width: int, lanes: int, dtype) -> List:
    """A layer's kept weights, those of each filter ordered by displacement.

    With `lanes` the offsets hold the whole vectors of a displacement.
    """
    node, read, taps = step.node, step.source.whole, step.taps
    (sy, sx), many = node.window.stride, len(taps)
    down, phase_y = np.divmod(_reach(node.window, 0), sy)
    across, phase_x = np.divmod(_reach(node.window, 1), sx)
    planes = (np.arange(pattern.shape[1])[:, None, None] * sy + phase_y[:, None]) * sx + phase_x
    rows = down[:, None] * read.pitch + (across // lanes * lanes if lanes else 0)
    offsets = (planes * read.plane + rows).ravel()
    # Taps that no output position sees within the map have no displacement.
    moved = np.array([taps.index(tap) if tap in taps else -1 for tap in across])
    moved = np.broadcast_to(moved, planes.shape).ravel()
    if width > 1:
        places = np.argsort(moved, kind="stable")
        places = places[moved[places] >= 0]
        lists = pattern.filters // width
        counts = np.tile(np.bincount(moved[places], minlength=many), lists)
        order = np.arange(pattern.filters)[:, None] * pattern.window + places
        order = order.reshape(lists, width, -1).transpose(0, 2, 1).reshape(-1, width)
        entries = np.tile(offsets[places], lists)
    else:
        filters, places = pattern.filter_and_place
        key = filters.astype(np.int64) * many + moved[places]
        order = np.argsort(key, kind="stable")
        order = order[moved[places[order]] >= 0]
        counts = np.bincount(key[order], minlength=pattern.filters * many)
        group = filters // (pattern.filters // node.groups)
        per_group = pattern.shape[1] * sy * sx * read.plane
        entries = (offsets[places] + group * np.int64(per_group))[order]
    starts = np.concatenate([[0], np.cumsum(counts)])
    values = np.empty(order.shape, dtype)
    return List(starts, entries.astype(np.int32), order, width, values)


def _reach(window, axis: int) -> np.ndarray:
    """How far beyond the output position times the stride each tap reads."""
    taps = np.arange(window.size[axis])
    return taps * window.dilation[axis] - window.padding[axis]


def _taps(window, axis: int) -> np.ndarray:
    """How far each tap lies in the planes of the map that was split by the stride."""
    return _reach(window, axis) // window.stride[axis]


def _displacements(window, before: int, after: int) -> tuple[int, ...]:
    """The columns that taps reach, of rows from `before` to `after` numbers; none moved is last."""
    taps = {int(tap) for tap in _taps(window, 1) if -after < tap < before}
    return (*sorted(taps - {0}), *(taps & {0}))


def _whole(numbers: int, lanes: int) -> int:
    return -(-numbers // lanes) * lanes


def _bits(holds: np.ndarray) -> np.ndarray:
    """Rows of booleans as integers, the first lane the lowest bit."""
    return holds @ (1 << np.arange(holds.shape[1], dtype=np.int64))


_one_team = Lock()
"""Threads that share steps wait for each other, so all of a team must be running."""
