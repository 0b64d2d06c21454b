# SPDX-License-Identifier: Apache-2.0
"""Where the maps of a block lie, and what its forward steps keep for its backward steps."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Protocol, TypeVar

from harprune.kernels.graph import Shape
from harprune.kernels.lists import Strides

ALIGNMENT = 64
LARGEST = 2**31 - 1
"""Numbers of a buffer; offsets in it then fit 32 bits."""


@dataclass(eq=False)
class Buffer:
    """A map of a block of `lanes` images; `border` rows and columns of zeros surround it."""

    shape: Shape
    lanes: int
    border: list[int] = field(default_factory=lambda: [0, 0])
    at: int = -1

    def need(self, rows: int, columns: int) -> None:
        """Ask for a border at least so wide."""
        self.border = [max(self.border[0], rows), max(self.border[1], columns)]

    @property
    def memory(self) -> "Buffer":
        """The buffer whose memory this one is: itself."""
        return self

    @property
    def numbers(self) -> int:
        return self.shape.channels * self.strides.plane

    @property
    def geometry(self) -> tuple[int, ...]:
        """Buffers that agree in this may take each other's place: borders then stay zero."""
        return (self.shape.height, self.shape.width, *self.border)

    @property
    def strides(self) -> Strides:
        row = (self.shape.width + 2 * self.border[1]) * self.lanes
        return Strides((self.shape.height + 2 * self.border[0]) * row, row, self.lanes)

    @property
    def origin(self) -> int:
        """Numbers before the first position of channel 0."""
        return self.border[0] * self.strides.row + self.border[1] * self.strides.column


@dataclass(frozen=True)
class View:
    """Part of a buffer: from a channel and a position on, in steps of `skip`."""

    buffer: Buffer
    channel: int = 0
    top: int = 0
    left: int = 0
    skip: tuple[int, int] = (1, 1)

    def place(self, number_bytes: int) -> tuple[int, int, int, int]:
        """The fields of `struct map`."""
        plane, row, column = (getattr(self.buffer.strides, n) for n in ("plane", "row", "column"))
        start = self.channel * plane + self.top * row + self.left * column
        at = self.buffer.at + (self.buffer.origin + start) * number_bytes
        return at, plane, row * self.skip[0], column * self.skip[1]


@dataclass(eq=False)
class Kept:
    """What a forward step leaves of a map for the way back, `size` bytes of each position: the bits
    of a ReLU, the winners of a pool, the slopes of another activation."""

    shape: Shape
    size: int
    at: int = -1


class Unflattened(Buffer):
    """A vector's memory read as the map that it was flattened from."""

    def __init__(self, whole: Buffer, shape: Shape):
        super().__init__(shape, whole.lanes)
        self.whole = whole

    @property
    def memory(self) -> Buffer:
        return self.whole

    @property
    def strides(self) -> Strides:
        # A position of the map is a channel of the vector, which has a border of its own.
        column, (_, height, width) = self.whole.strides.plane, self.shape
        return Strides(height * width * column, width * column, column)

    @property
    def origin(self) -> int:
        return self.whole.origin

    @property
    def at(self) -> int:
        return self.whole.at

    @at.setter
    def at(self, value: int) -> None:
        pass


class Placed(Protocol):
    """A map in memory, in blocks or in rows."""

    shape: Shape
    at: int

    @property
    def numbers(self) -> int: ...

    @property
    def geometry(self) -> tuple[int, ...]: ...


Held = TypeVar("Held", bound=Placed)


@dataclass(eq=False)
class _Slot:
    """Room for buffers of one geometry that live one after the other."""

    buffers: list[Placed] = field(default_factory=list)

    @property
    def size(self) -> int:
        return max(buffer.numbers for buffer in self.buffers)


def place_maps(
    viewed: Sequence[Sequence[Held]],
    number_bytes: int,
    *,
    reuse: bool,
    onto: Mapping[Held, Held] = MappingProxyType({}),
) -> int:
    """Give each buffer its place, by the order in which steps view them; the bytes of all.

    With `reuse`, a buffer may take the place of one that no later step views, if both have the same
    `geometry`: what no step writes then stays zero. `onto` names buffers that are written position
    by position where another has just been read, and may take its place in that very step.

    Raises:
        ValueError: a buffer within which offsets exceed 32 bits.
    """
    for buffer in {b for step in viewed for b in step}:
        if buffer.numbers > LARGEST:
            raise ValueError(
                f"a map of {tuple(buffer.shape)} takes {buffer.numbers} numbers on the kernels, "
                f"over {LARGEST}: run it in torch (execution 'dense')"
            )
    last = {buffer: number for number, step in enumerate(viewed) for buffer in step}
    free: dict[tuple[int, ...], list[_Slot]] = {}
    slots: list[_Slot] = []
    taken: dict[Held, _Slot] = {}
    for number, step in enumerate(viewed):
        for buffer in step:
            below = onto.get(buffer) if buffer not in taken else None
            if below in taken and last[below] == number and below.geometry == buffer.geometry:
                taken[buffer] = taken[below]
                taken[buffer].buffers.append(buffer)
                last[below] = -1  # its place is not free
            if buffer not in taken:
                spare = free.setdefault(buffer.geometry, [])
                if not (spare and reuse):
                    slots.append(_Slot())
                taken[buffer] = spare.pop() if spare and reuse else slots[-1]
                taken[buffer].buffers.append(buffer)
        for buffer in dict.fromkeys(step):
            if last[buffer] == number:
                free[buffer.geometry].append(taken[buffer])
    at = 0
    for slot in slots:
        for buffer in slot.buffers:
            buffer.at = at
        at += _aligned(slot.size * number_bytes)
    return at


def place_kept(parts: Iterable[Kept]) -> int:
    """Give each its place; the bytes of all."""
    at = 0
    for kept in parts:
        kept.at = at
        at += _aligned(prod(kept.shape) * kept.size)
    return at


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
