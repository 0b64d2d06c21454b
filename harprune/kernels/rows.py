# SPDX-License-Identifier: Apache-2.0
"""Run steps on rows of an image in vectors: the layout for a few images, and for large maps.

Steps on large maps run image by image; on small ones as many images as fill a tile go together.
`RowExecutable` only computes a graph. `RowGradient` also goes back to its inputs: of a forward pass
it keeps a bit a number, what each ReLU let through, so that a pass stays in a core's own cache.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from queue import SimpleQueue
from threading import Lock
from typing import NamedTuple

import numpy as np

from harprune.kernels.adjoint import adjoint
from harprune.kernels.graph import Convolution, Graph, MeanPool, Pool
from harprune.kernels.lists import QUAD, List, Pattern, order_by, starts_by
from harprune.kernels.memory import ALIGNMENT, place_maps
from harprune.kernels.native import (
    DISPLACEMENT,
    ROW_KINDS,
    ROW_STEP,
    ROW_STORES,
    Kernels,
)
from harprune.kernels.rowsteps import (
    SUMS,
    Map,
    NotInRows,
    RowPlan,
    RowStep,
    as_bits,
    merge,
    reads_whole,
    taps_and_phases,
    whole,
)
from harprune.kernels.runtime import aligned, each, renewed_after_fork
from harprune.kernels.team import Pace, helped

GROUP = SUMS
"""Images that go through the steps together, at most."""
HALF = 4
"""Images that any step takes together, at most."""
SHARED, HALVED, LONG = 4_000_000, 20_000_000, 60_000_000
"""Multiply-adds of a lone group from which threads share its steps, some 0.1 ms; take one of its
halves each; and are woken to share its steps, some 1.5 ms."""
LARGEST = 2**28
"""Numbers of one image's map; offsets then fit 32 bits."""


class RowExecutable:
    """A graph with weights, forwards only; it stands in for `runtime.Executable` there.

    Args:
        graph: what to compute.
        kernels: the instruction set that runs it.
        patterns: where the kept weights of each convolution are.
        vectors: bias, scale and shift of each layer, as for `runtime.Executable`.
        threads: how many groups of 8 images run at once; they share the steps of a lone group.

    Raises:
        NotInRows: a map is too large or a node not for rows; `runtime.Executable` takes it.
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
        steps = merge(RowPlan(graph, kernels).steps, patterns, kernels, ("split", "max_pool"))
        self._program = _Program(steps, graph, kernels, patterns, vectors, threads)

    def load(self, name: str, kept: np.ndarray) -> None:
        """Take the values of the kept weights of layer `name`, in ascending position."""
        self._program.load(name, kept)

    def forward(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The outputs for `inputs`, contiguous [images, ...] arrays of the kernels' dtype."""
        outputs = _room(self.graph, self.graph.outputs, len(inputs[0]), self.kernels)
        self._program.run([*inputs, *outputs])
        return outputs


@dataclass
class Records:
    """What the images of one batch leave for their way back."""

    images: int
    bits: np.ndarray


class RowGradient:
    """A graph with weights, forwards and back to its inputs; the arguments are `RowExecutable`'s.

    Raises:
        NotInRows: a map is too large or a node not for rows; `runtime.Executable` takes it.
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
        forward = RowPlan(graph, kernels).steps
        backward = adjoint(forward, len(graph.inputs), len(graph.outputs), kernels)
        self._reached = {step.external for step in backward if step.kind == "unpack"}
        self._record_bytes = _place_bits(forward, kernels)
        # A window's winners are kept from whole maps.
        forward = merge(forward, patterns, kernels, ("split",))
        given = (graph, kernels, patterns, vectors, threads, self._record_bytes)
        self._forward, self._backward = _Program(forward, *given), _Program(backward, *given)
        self._spare: list[np.ndarray] = []
        self.renew()
        renewed_after_fork(self)

    def renew(self) -> None:
        """Forget who is at work: nobody, in the child of a process."""
        self._choosing = Lock()

    def load(self, name: str, kept: np.ndarray) -> None:
        """Take the values of the kept weights of layer `name`, in ascending position."""
        self._forward.load(name, kept)
        self._backward.load(name, kept)

    def forward(self, inputs: Sequence[np.ndarray]) -> tuple[list[np.ndarray], Records]:
        """The outputs for `inputs`, contiguous [images, ...] arrays of the kernels' dtype.

        Give the records back with `release`, after `backward` where that is wanted.
        """
        images = len(inputs[0])
        records = Records(images, self._bits(images))
        outputs = _room(self.graph, self.graph.outputs, images, self.kernels)
        self._forward.run([*inputs, *outputs, records.bits[:images]])
        return outputs, records

    def backward(self, records: Records, gradients: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The gradients to the inputs, of those to the outputs."""
        results = _room(self.graph, self.graph.inputs, records.images, self.kernels)
        for number, result in enumerate(results, start=len(gradients)):
            if number not in self._reached:
                result[...] = 0
        self._backward.run([*gradients, *results, records.bits[: records.images]])
        return results

    def release(self, records: Records) -> None:
        """Let a later batch use `records`."""
        self._spare.append(records.bits)

    def _bits(self, images: int) -> np.ndarray:
        with self._choosing:
            for position, spare in enumerate(self._spare):
                if len(spare) >= images:
                    return self._spare.pop(position)
            self._spare.clear()  # shorter ones, which a longer one soon stands in for
        return aligned((images, self._record_bytes))


def _room(graph: Graph, values: Sequence[int], images: int, kernels: Kernels) -> list[np.ndarray]:
    return [np.empty((images, *graph.shapes[v]), kernels.dtype) for v in values]


def _place_bits(steps: Sequence[RowStep], kernels: Kernels) -> int:
    """Give what steps leave in an image's record its places there; the bytes of a record."""
    at = 0
    for bits in (b for step in steps for b in (step.signs_out, step.kept) if b is not None):
        bits.at = at
        at += bits.vectors * kernels.sign_bytes
    return max(ALIGNMENT, whole(at, ALIGNMENT))


class _Program:
    """Steps with weights and memory. The caller's arrays that they name hold an image a row."""

    def __init__(
        self,
        steps: list[RowStep],
        graph: Graph,
        kernels: Kernels,
        patterns: Mapping[str, Pattern],
        vectors: Mapping[str, np.ndarray],
        threads: int,
        record_bytes: int = 0,
    ):
        self.kernels, self.patterns, self.vectors = kernels, patterns, vectors
        self.threads = threads
        self._steps, self._record_bytes = steps, record_bytes
        self._record = len(graph.inputs) + len(graph.outputs)  # its number among the arrays
        self._size = kernels.dtype.itemsize
        self._lists: dict[str, List] = {}
        self._tables: list[np.ndarray] = []  # that the steps point into
        self._paces: dict[int, Pace] = {}  # by the images of a lone group
        nodes = [node for node in graph.nodes if isinstance(node, Convolution)]
        self._multiply_adds = sum(
            int(patterns[node.name].starts[-1]) * prod(graph.shapes[node.out][1:]) for node in nodes
        )
        bytes_ = self._place()
        self._arenas = [aligned((1, bytes_))[0] for _ in range(threads)]
        self.renew()
        renewed_after_fork(self)
        self._linked = np.zeros(len(steps), ROW_STEP)
        for row, step in zip(self._linked, steps):
            self._link(row, step)

    def renew(self) -> None:
        """All arenas are free, as in the child of a process that had threads at work in them."""
        self._free: SimpleQueue[np.ndarray] = SimpleQueue()
        for arena in self._arenas:
            self._free.put(arena)

    # Running --------------------------------------------------------------------------------

    def load(self, name: str, kept: np.ndarray) -> None:
        """Take the values of the kept weights of layer `name`, in ascending position."""
        if name in self._lists:  # a layer that no output reads has no way back
            self._lists[name].fill(kept)

    def run(self, arrays: Sequence[np.ndarray]) -> None:
        """All steps for all images of `arrays`."""
        images = len(arrays[0])
        work = images * self._multiply_adds
        # Two threads on halves of a group have nothing to tell each other. A half is as many images
        # as any step takes together, so that they run together as they would in the whole.
        halved = self.threads > 1 and HALF < images <= GROUP and work >= HALVED
        size = HALF if halved else GROUP
        groups = -(-images // size)
        shared = groups == 1 and self.threads > 1 and work >= SHARED
        helpers = nullcontext()
        if shared:
            pace = self._paces.setdefault(images, Pace())
            helpers = helped(self.kernels, self.threads, work >= LONG, pace)
        with helpers as team:

            def one(group: int) -> None:
                arena = self._free.get()
                try:
                    addresses = [a[group * size :].ctypes.data for a in arrays]
                    self.kernels.run_rows(
                        self._linked,
                        arena.ctypes.data,
                        np.array(addresses, np.uint64),
                        min(size, images - group * size),
                        team,
                    )
                finally:
                    self._free.put(arena)

            each(one, groups, self.threads)

    # Places ---------------------------------------------------------------------------------

    def _place(self) -> int:
        """Give every map its place and its copies; the bytes of all."""
        begin = 0  # of the steps that run together as often
        segments: dict[Map, set[int]] = {}
        for number, step in enumerate(self._steps):
            step.together = self._together((step.out or step.read).whole)
            if step.together != self._steps[begin].together:
                begin = number
            for held in step.maps():
                segments.setdefault(held, set()).add(begin)
        for held, begins in segments.items():
            if held.image > LARGEST:
                raise NotInRows(f"a map takes {held.image} numbers in rows, over {LARGEST}")
            held.copies = self._steps[min(begins)].together if len(begins) == 1 else GROUP
        onto = {
            step.made.whole: step.other.whole
            for step in self._steps
            if step.other is not None
            and step.other.whole is not step.read.whole
            # Only there does each position take the place of what it has added.
            and step.other.channel == 0
        }
        maps = [step.maps() for step in self._steps]
        return place_maps(maps, self._size, reuse=True, onto=onto)

    def _together(self, written: Map) -> int:
        """Images whose planes make HALF sums, enough to hide the latency of one."""
        if written.vectors > 1:
            return 1
        return max(1, HALF // (1 << (written.lines - 1).bit_length()))

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
        for name, bits in (
            ("signs_out", step.signs_out),
            ("signs_in", step.signs_in),
            ("kept", step.kept),
        ):
            row[name] = -1 if bits is None else bits.at
        row["record"] = self._record if self._record_bytes else -1
        row["record_bytes"] = self._record_bytes
        if step.source is not None:
            row["in_vectors"] = step.source.whole.vectors
            _, row["in_height"], row["in_width"] = step.source.whole.shape
        for name, vector in zip(("scale", "shift"), step.vectors):
            if vector in self.vectors:
                row[name] = self.vectors[vector].ctypes.data
        if step.kind in ("split", "join"):
            row["stride_y"], row["stride_x"] = step.stride
        elif step.kind == "convolve":
            self._link_list(row, step)
        elif isinstance(step.node, Pool):
            window = step.node.window
            row["size_y"], row["size_x"] = window.size
            row["stride_y"], row["stride_x"] = window.stride
            row["pad_y"], row["pad_x"] = window.padding
            row["full_area"] = isinstance(step.node, MeanPool) and step.node.full_area

    def _link_list(self, row: np.void, step: RowStep) -> None:
        name = step.convolution.name
        pattern, read, lanes = self.patterns[name], step.read.whole, self.kernels.lanes
        quads = _in_quads(step, pattern, self.kernels)
        row["whole"] = as_it_is = reads_whole(step, QUAD if quads else 1, self.kernels)
        taps = _taps_of(step, as_it_is)
        listed = _row_quads if quads else _row_list
        self._lists[name] = made = listed(step, pattern, taps, self.kernels.dtype)
        row["starts"], row["offsets"] = made.starts.ctypes.data, made.offsets.ctypes.data
        row["values"], row["list_width"] = made.values.ctypes.data, made.width
        moves, moved = np.zeros(len(step.taps), DISPLACEMENT), np.array(step.taps, np.int64)
        moves["vectors"], moves["lanes"] = np.divmod(moved, lanes)
        place = np.arange(lanes) % read.pitch + moved[:, None]
        moves["mask"] = as_bits((place >= 0) & (place < read.pitch) | (not read.packed))
        row["displacements"], row["displaced"] = self._address(moves), len(moves)

    def _address(self, table: np.ndarray | None) -> int:
        if table is None:
            return 0
        self._tables.append(table)
        return table.ctypes.data


def _in_quads(step: RowStep, pattern: Pattern, kernels: Kernels) -> bool:
    """Whether four filters of a layer that keeps all its weights walk one list.

    A piece of a row takes a vector of sums more than it has. Where a tile has room for pieces of
    one vector alone, that is half of all work, and more lines of one filter are faster.
    """
    if pattern.index is not None or step.convolution.groups > 1:
        return False
    if kernels.tile < 4 * QUAD and not reads_whole(step, QUAD, kernels):
        return False
    if step.transposed:  # the phases of a stride see different taps
        return step.window.stride == (1, 1) and pattern.shape[1] % QUAD == 0
    return pattern.filters % QUAD == 0


class _Taps(NamedTuple):
    """Of each tap of a convolution's window, row by row.

    Attributes:
        displacement: its number among the step's; -1 where no output position sees the tap within
            the map.
        offset: numbers from an output position to what is read for it in a plane.
        phase: which of a channel's planes it meets, where a stride has split the map.
        phases: how many there are.
    """

    displacement: np.ndarray
    offset: np.ndarray
    phase: np.ndarray
    phases: int

    def planes(self, channels: int) -> np.ndarray:
        """The plane that each place (channel, tap) of a filter meets."""
        return np.arange(channels)[:, None] * self.phases + self.phase


def _taps_of(step: RowStep, as_it_is: bool) -> _Taps:
    """The taps of a convolution's step, or of its way back.

    With `as_it_is` a row is read from its start, else from the vector where it begins displaced.
    """
    (sy, sx), read, size = step.window.stride, step.read.whole, step.window.size
    (down, phase_y), (across, phase_x) = (taps_and_phases(step.window, axis) for axis in (0, 1))
    if step.transposed:
        down, across = -down, -across
    displacement = np.array([step.taps.index(x) if x in step.taps else -1 for x in across])
    begin = np.zeros_like(across) if as_it_is else across // read.lanes * read.lanes
    return _Taps(
        np.broadcast_to(displacement, size).ravel(),
        (down[:, None] * read.pitch + begin).ravel(),
        (phase_y[:, None] * sx + phase_x).ravel(),
        sy * sx,
    )


def _row_list(step: RowStep, pattern: Pattern, taps: _Taps, dtype) -> List:
    """A layer's kept weights, by the plane that they make and then by their displacement.

    A weight meets one plane of the input and one filter: forwards it reads the plane and makes the
    filter's, on the way back the other way round.
    """
    channels, displacements = pattern.shape[1], len(step.taps)
    filters, places = pattern.filter_and_place
    filters = filters.astype(np.int64)
    group = filters // (pattern.filters // step.convolution.groups)
    planes = group * (channels * taps.phases) + taps.planes(channels).ravel()[places]
    reading, making = (filters, planes) if step.transposed else (planes, filters)
    displacement = np.tile(taps.displacement, channels)[places]
    offsets = reading * step.read.whole.plane + np.tile(taps.offset, channels)[places]
    key, many = making * displacements + displacement, step.shape.channels * displacements
    order = order_by(key, many)
    order = order[displacement[order] >= 0]
    starts, values = starts_by(key[order], many), np.empty(len(order), dtype)
    return List(starts, offsets[order].astype(np.int32), order, 1, values)


def _row_quads(step: RowStep, pattern: Pattern, taps: _Taps, dtype) -> List:
    """Every weight kept: four of the planes that are made walk one list, the same for all fours."""
    filters, channels = pattern.shape[:2]
    weights = np.arange(pattern.size).reshape(filters, channels, -1)
    if step.transposed:
        weights = weights.swapaxes(0, 1)
    made, read, _ = weights.shape
    displacement = np.tile(taps.displacement, read)
    order = np.argsort(displacement, kind="stable")
    order = order[displacement[order] >= 0]
    offsets = (taps.planes(read) * step.read.whole.plane + taps.offset).ravel()[order]
    starts = starts_by(displacement[order], len(step.taps))
    fours, entries = made // QUAD, len(order)
    first = np.arange(fours)[:, None] * entries
    starts = np.append((first + starts[:-1]).ravel(), fours * entries)
    weights = weights.reshape(fours, QUAD, -1)[:, :, order].transpose(0, 2, 1).reshape(-1, QUAD)
    offsets = np.tile(offsets, fours).astype(np.int32)
    values = np.empty(weights.shape, dtype)
    return List(starts, offsets, np.ascontiguousarray(weights), QUAD, values)
