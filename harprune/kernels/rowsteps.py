# SPDX-License-Identifier: Apache-2.0
"""Which steps compute a graph with rows of an image in vectors, and the maps between them.

A map's rows lie in whole vectors and its kept weights are ordered by the horizontal displacement
of their tap, so that a weight reads aligned vectors and its sum is moved sideways once (rows.h).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np

from harprune.kernels.fusion import Copy, Fused, fuse
from harprune.kernels.graph import (
    Activation,
    Affine,
    Concatenation,
    Convolution,
    Flatten,
    Graph,
    MaxPool,
    MeanPool,
    Pool,
    Shape,
    Window,
)
from harprune.kernels.lists import Pattern
from harprune.kernels.native import Kernels

SUMS = 8
"""Vectors of sums of a tile for one filter (ROW_SUMS)."""
LONGEST = 4096
"""Numbers of a row that is pooled (ROW_LONGEST)."""


class NotInRows(ValueError):
    """A graph whose maps do not go in rows, which blocks may take."""


@dataclass(eq=False)
class Map:
    """A value in the arena: rows at a pitch, planes parted by `border` rows of zeros.

    Attributes:
        shape: channels are planes, so a split map has one for each phase.
        pitch: numbers from a row to the next; under `lanes`, rows are packed.
        lanes: numbers of a vector.
        border: rows that readers reach above and below.
        margin: numbers that readers reach beyond the ends of a plane, besides.
        parted: of a split map, the stride and the sides of what was split. Where these are no
            multiples, some phases have a row or column less, and what lies there stays zero.
    """

    shape: Shape
    pitch: int
    lanes: int
    border: int = 0
    margin: int = 0
    parted: tuple[int, ...] = ()
    copies: int = 1
    at: int = -1

    @property
    def packed(self) -> bool:
        return self.pitch < self.lanes

    @property
    def head(self) -> int:
        """Zeros before a plane, and after the last."""
        return whole(self.border * self.pitch, self.lanes)

    @property
    def body(self) -> int:
        return whole(self.shape.height * self.pitch, self.lanes)

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
        return None if holds.all() else as_bits(holds.reshape(-1, self.lanes))

    @property
    def geometry(self) -> tuple[int, ...]:
        """Maps that agree in this may take each other's place: zeros then stay zero."""
        channels, *sides = self.shape
        copies = (self.copies, channels) if self.copies > 1 else ()
        return (*sides, self.pitch, self.border, self.margin, *self.parted, *copies)

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
class Bits:
    """Room in an image's record: `parts` bits for every number of a map, in vectors as its own.

    A slope takes as many as a number has.
    """

    map: Map
    parts: int = 1
    at: int = -1

    @property
    def vectors(self) -> int:
        return self.map.shape.channels * self.map.lines * self.map.vectors * self.parts


@dataclass(eq=False)
class RowStep:
    """One `struct row_step` before its maps have places.

    Attributes:
        node: the convolution or pooling that it is of; `transposed` on the way back.
        taps: horizontal displacements of a convolution's taps, in ascending order, none last.
        sums: the map that the result is laid out for: what is stored may be another.
        kept: what won each window of a pool, or the slopes of an activation.
    """

    kind: str
    shape: Shape
    source: Part | None = None
    out: Part | None = None
    other: Part | None = None
    rectify: bool = False
    vectors: tuple[str, str] = ("", "")
    external: int = -1
    node: Convolution | Pool | None = None
    stride: tuple[int, int] = (1, 1)
    taps: tuple[int, ...] = ()
    transposed: bool = False
    stored: str = "plain"
    sums: Map | None = None
    signs_out: Bits | None = None
    signs_in: Bits | None = None
    kept: Bits | None = None
    together: int = 1

    def __post_init__(self):
        self.sums = self.out and self.out.whole

    @property
    def read(self) -> Part:
        """`source`, which every kind but `pack` has."""
        return cast(Part, self.source)

    @property
    def made(self) -> Part:
        """`out`, which every kind but `unpack` has."""
        return cast(Part, self.out)

    @property
    def convolution(self) -> Convolution:
        """`node`, where it is one."""
        return cast(Convolution, self.node)

    @property
    def window(self) -> Window:
        """Of `node`, where there is one."""
        return cast(Convolution | Pool, self.node).window

    def maps(self) -> list[Map]:
        return [p.whole for p in (self.source, self.out, self.other) if p is not None]


class RowPlan:
    """The steps of a graph, forwards.

    Raises:
        ValueError: a node is not for these kernels; `runtime.Executable` takes it.
    """

    def __init__(self, graph: Graph, kernels: Kernels):
        self.graph, self.lanes = graph, kernels.lanes
        self.steps: list[RowStep] = []
        self._laid: dict[tuple, Map] = {}  # by value, stride and pitch
        for number, value in enumerate(graph.inputs):
            shape = graph.shapes[value]
            out = self._map(value, self._pitch(shape.width))
            self.steps.append(RowStep("pack", shape, out=Part(out), external=number))
        for fused in fuse(graph):
            self._step(fused)
        for number, value in enumerate(graph.outputs, start=len(graph.inputs)):
            source = Part(self._read(value))
            self.steps.append(RowStep("unpack", graph.shapes[value], source, external=number))

    def _step(self, fused: Fused) -> None:
        main, shape = fused.main, self.graph.shapes[fused.out]
        match main:
            case Convolution():
                step = self._convolution(main, fused.out)
            case Affine() | Copy() | Activation():
                source = self._read(main.sources[0])
                out = self._map(fused.out, source.pitch)
                kind = main.kind if isinstance(main, Activation) else "scale"
                step = RowStep(kind, shape, Part(source), Part(out))
                if isinstance(main, Affine):
                    step.vectors = (f"{main.name}/scale", f"{main.name}/shift")
            case MeanPool() if main.window == Window((1, 1)) and fused.other is None:
                self._laid[fused.out, (1, 1), 0] = self._read(main.sources[0])
                return
            case Pool():
                source = self._read(main.sources[0])
                if source.shape.width > LONGEST:
                    raise NotInRows(f"a pooled row of {source.shape.width} exceeds {LONGEST}")
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
                raise NotInRows(f"rows do not run {type(main).__name__}; fold or replace it")
        step.rectify = fused.rectify
        if fused.other is not None:
            step.other = Part(self._read(fused.other, pitch=step.made.whole.pitch))
        self.steps.append(step)

    def _convolution(self, node: Convolution, value: int) -> RowStep:
        source, window = node.sources[0], node.window
        shape, stride = self.graph.shapes[value], window.stride
        phase = -(-self.graph.shapes[source].width // stride[1])
        pitch = self._read(source).pitch if stride == (1, 1) else self._pitch(phase)
        out_pitch = self._pitch(shape.width)
        # Packed rows must have the same pitch before and after; whole vectors need not.
        if max(pitch, out_pitch) >= self.lanes:
            pitch, out_pitch = max(pitch, self.lanes), max(out_pitch, self.lanes)
        else:
            pitch = out_pitch = max(pitch, out_pitch)
        read, out = self._read(source, stride, pitch), self._map(value, out_pitch)
        taps_y, taps_x = _taps(window, 0), _displacements(window, read.shape.width, shape.width)
        reach(read, out, taps_y, taps_x)
        step = RowStep("convolve", shape, Part(read), Part(out), node=node, taps=taps_x)
        step.vectors = ("", f"{node.name}/bias")
        return step

    def _concatenation(self, node: Concatenation) -> None:
        pitch, channel = self._read(node.sources[0]).pitch, 0
        out = self._map(node.out, pitch)
        for value in node.sources:
            source = self._read(value, pitch=pitch)
            step = RowStep("scale", source.shape, Part(source), Part(out, channel))
            self.steps.append(step)
            channel += source.shape.channels

    def _map(self, value: int, pitch: int) -> Map:
        """The map that the step of `value` makes."""
        made = Map(self.graph.shapes[value], pitch, self.lanes)
        self._laid[value, (1, 1), 0] = self._laid[value, (1, 1), pitch] = made
        return made

    def _read(self, value: int, stride: tuple[int, int] = (1, 1), pitch: int = 0) -> Map:
        """`value` at a pitch (0: as it was made) and split by `stride`; a step makes it so."""
        if (value, stride, pitch) not in self._laid:
            source = self._laid[value, (1, 1), 0]
            channels, height, width = source.shape
            planes = channels * stride[0] * stride[1]
            shape = Shape(planes, -(-height // stride[0]), -(-width // stride[1]))
            split = self._laid[value, stride, pitch] = Map(shape, pitch, self.lanes)
            split.parted = (*stride, height, width)
            step = RowStep("split", source.shape, Part(source), Part(split), stride=stride)
            self.steps.append(step)
        return self._laid[value, stride, pitch]

    def _pitch(self, width: int) -> int:
        """Numbers from a row of so many to the next."""
        return whole(width, self.lanes) if 2 * width > self.lanes else 1 << (width - 1).bit_length()


def reach(read: Map, made: Map, taps_y: np.ndarray, taps_x: tuple[int, ...]) -> None:
    """Give `read` the zeros around it that taps of a convolution to `made` meet."""
    below = made.shape.height - 1 + taps_y.max() - (read.shape.height - 1)
    read.border = max(read.border, int(-taps_y.min()), int(below))
    beyond = max(map(abs, taps_x), default=0) // read.lanes + max(0, made.vectors - read.vectors)
    read.margin = max(read.margin, read.lanes * (2 + beyond))


def merge(
    steps: list[RowStep], patterns: Mapping[str, Pattern], kernels: Kernels, kinds: tuple[str, ...]
) -> list[RowStep]:
    """Let convolutions store what the one step, of `kinds`, that reads them would make of it."""
    makers = {step.made.whole: step for step in steps if step.kind == "convolve"}
    readers: dict[Map, list[RowStep]] = {}
    for step in steps:
        for part in (step.source, step.other):
            if part is not None:
                readers.setdefault(part.whole, []).append(step)
    left = []
    for step in steps:
        maker = None
        if step.kind in kinds and len(readers[step.read.whole]) == 1:
            maker = makers.get(step.read.whole)
        if maker is not None and _parts_squares(maker, step, patterns, kernels):
            maker.stored, maker.out = step.kind, step.out
        else:
            left.append(step)
    return left


def _parts_squares(
    maker: RowStep, step: RowStep, patterns: Mapping[str, Pattern], kernels: Kernels
) -> bool:
    """Whether `step` parts the map that `maker` makes into squares of two by two."""
    if step.kind == "max_pool":
        pairs = step.window == Window((2, 2), (2, 2))
    else:
        pairs = step.stride == (2, 2)
    if not pairs or patterns[maker.convolution.name].index is None:
        return False
    made = step.read.whole
    _, height, width = made.shape
    # Rows of one vector become packed ones, so two of a parity fill a vector.
    squares = made.vectors in (1, 2, 4) and height % (4 if made.vectors == 1 else 2) == 0
    squares &= not made.packed and width == made.pitch == 2 * step.made.whole.pitch
    return squares and reads_whole(maker, 1, kernels)


def reads_whole(step: RowStep, width: int, kernels: Kernels) -> bool:
    """Whether each row of a convolution fits a tile for `width` filters, and is read as it is;
    else a displaced sum takes a vector more."""
    sums = cast(Map, step.sums)
    span = 1 << (sums.vectors - 1).bit_length()
    short = span <= min(4, SUMS if width == 1 else kernels.tile // width)
    short &= all(abs(tap) < kernels.lanes for tap in step.taps)
    return short and step.read.whole.pitch == sums.pitch


def _taps(window: Window, axis: int) -> np.ndarray:
    """How far each tap lies in the planes of the map that was split by the stride."""
    return taps_and_phases(window, axis)[0]


def taps_and_phases(window: Window, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """For each tap, how far it lies in the planes of the map split by the stride, and which."""
    taps = np.arange(window.size[axis])
    return np.divmod(taps * window.dilation[axis] - window.padding[axis], window.stride[axis])


def _displacements(window: Window, before: int, after: int) -> tuple[int, ...]:
    """The columns that taps reach, of rows from `before` to `after` numbers; none moved is last."""
    taps = {int(tap) for tap in _taps(window, 1) if -after < tap < before}
    return (*sorted(taps - {0}), *(taps & {0}))


def mirrored(taps: tuple[int, ...]) -> tuple[int, ...]:
    """Displacements to the other side; none moved is last again."""
    return (*sorted(-tap for tap in taps if tap), *(tap for tap in taps if not tap))


def whole(numbers: int, lanes: int) -> int:
    """`numbers`, or more, in whole vectors."""
    return -(-numbers // lanes) * lanes


def as_bits(holds: np.ndarray) -> np.ndarray:
    """Rows of booleans as integers, the first lane the lowest bit."""
    return holds @ (1 << np.arange(holds.shape[1], dtype=np.int64))
