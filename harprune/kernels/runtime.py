# SPDX-License-Identifier: Apache-2.0
"""Run a plan: its steps as the kernels read them, memory for every block, one thread per block.

Blocks of images do not depend on one another, and sums over blocks are taken in their order,
so a result does not depend on the number of threads.
"""

import mmap as mmap_module
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from mmap import mmap
from queue import SimpleQueue
from threading import Lock
from typing import cast
from weakref import WeakSet

import numpy as np

from harprune.kernels.graph import Convolution, MeanPool, Pool
from harprune.kernels.lists import (
    REACHES,
    List,
    Pattern,
    forward_list,
    transposed_list,
    window_offsets,
)
from harprune.kernels.memory import ALIGNMENT, View
from harprune.kernels.native import ALL, GRADIENT, KEPT, KINDS, STEP
from harprune.kernels.plan import Plan, Step

_CACHE = 1280 * 1024
"""Bytes of input that a band of rows may touch: about what a core's second-level cache holds.

Smaller bands gain nothing at density 0.1 and lose a sixth at 0.01, where a band is read but a few
times; without bands 0.1 loses a tenth.
"""


_LARGE_PAGE = 2**21
"""Bytes of a large page of memory."""


@dataclass(eq=False)
class Memory:
    """What one batch occupies between its forward and its backward steps."""

    images: int
    lanes: int
    arena: np.ndarray
    kept: np.ndarray

    @property
    def blocks(self) -> int:
        return -(-self.images // self.lanes)


Normalise = Callable[[str, np.ndarray, int], None]
"""(name, sums, how many values of a channel they count) -> None: called at a step `moments`.

Sums are float64 [channels, 2]: of the values, and of these times what the step reads beside them.
Forwards the name is a batch norm's, and the vectors that the next step reads are set here; on the
way back it is "NAME/gradient", also of a convolution with a bias, whose gradient is the first sum.
"""


class Executable:
    """A plan with weights.

    Args:
        plan: what to run.
        patterns: where the kept weights of each convolution are.
        vectors: bias, scale and shift of each layer as "NAME/bias" and so on, one number per
            channel; arrays of the kernels' dtype that are read anew at each run.
        threads: how many blocks are run at once.
    """

    def __init__(
        self,
        plan: Plan,
        patterns: Mapping[str, Pattern],
        vectors: Mapping[str, np.ndarray],
        *,
        threads: int = 1,
    ):
        self.plan, self.patterns, self.vectors = plan, patterns, vectors
        self.threads = threads
        self._size = plan.kernels.dtype.itemsize
        self._nodes = {n.name: n for n in plan.graph.nodes if isinstance(n, Convolution)}
        self._forward_lists: dict[str, List] = {}
        self._transposed_lists: dict[str, List] = {}
        self._moments: dict[Step, int] = {}  # their numbers among the arrays that a step names
        self._externals = 2 * (len(plan.graph.inputs) + len(plan.graph.outputs))
        self._forward = self._link(plan.forward)
        self._backward = self._link(plan.backward)
        self.renew()
        renewed_after_fork(self)

    def renew(self) -> None:
        """Forget who is at work: nobody, in the child of a process."""
        self._choosing = Lock()

    # Weights --------------------------------------------------------------------------------

    def load(self, name: str, kept: np.ndarray) -> None:
        """Take the present values of the kept weights of `name`, in ascending position."""
        self._forward_lists[name].fill(kept)
        if name in self._transposed_lists:
            self._transposed_lists[name].fill(kept)

    def _list(self, step: Step, name: str) -> List:
        lists = self._transposed_lists if step.transposed else self._forward_lists
        if name not in lists:
            node, pattern, read = self._nodes[name], self.patterns[name], step.read.buffer
            kernels, shape = self.plan.kernels, self.plan.graph.shapes[node.sources[0]]
            make = transposed_list if step.transposed else forward_list
            lists[name] = make(node, pattern, shape, read.strides, kernels.dtype, kernels.tile)
        return lists[name]

    # Steps ----------------------------------------------------------------------------------

    def _link(self, steps: Sequence[Step]) -> np.ndarray:
        """The steps as an array of `struct step`."""
        linked = np.zeros(len(steps), STEP)
        for row, step in zip(linked, steps):
            self._link_one(row, step)
        return linked

    def _link_one(self, row: np.void, step: Step) -> None:
        row["kind"] = KINDS.index(step.kind)
        row["channels"], row["height"], row["width"] = step.shape
        for name, view in (
            ("in", step.source),
            ("second", step.second),
            ("out", step.out),
            ("other", step.other),
        ):
            if view is not None:
                row[name] = view.place(self._size)
        row["has_other"] = step.other is not None
        row["rectify"] = step.rectify
        for name, signs in (("signs_out", step.signs_out), ("signs_in", step.signs_in)):
            row[name] = -1
            if signs is not None:
                _, height, width = signs.shape
                top, left, down, right = step.signs_view
                row[name] = signs.at + (top * width + left) * self.plan.kernels.sign_bytes
                row["signs_plane"], row["signs_row"] = height * width, down * width
                row["signs_column"] = right
        if step.weights is not None:
            self._link_list(row, step, *step.weights)
        if step.kind == "moments":
            row["external"] = self._externals + len(self._moments)
            self._moments[step] = self._externals + len(self._moments)
        else:
            row["external"] = step.external
            for name, vector in zip(("scale", "shift", "slope"), step.vectors):
                if vector in self.vectors:
                    row[name] = self.vectors[vector].ctypes.data
        row["index"] = -1 if step.kept is None else step.kept.at
        if step.pool is not None:
            self._link_pool(row, step, step.pool)

    def _link_list(self, row: np.void, step: Step, name: str, first: int) -> None:
        kept = self._list(step, name)
        if first % kept.width:
            raise ValueError(f"filter {first} does not start a group of {kept.width}")
        begin = first * REACHES if kept.reaches else first // kept.width
        row["list"] = (
            kept.starts[begin:].ctypes.data,
            kept.offsets.ctypes.data,
            kept.values.ctypes.data,
            kept.width,
            kept.reaches,
        )
        row["band"] = self._band(step.read)

    def _band(self, read: View) -> int:
        """Rows of a convolution's output whose input the cache holds."""
        buffer = read.buffer
        bytes_of_row = buffer.shape.channels * buffer.strides.row * self._size
        return max(1, int(_CACHE / bytes_of_row - 2) // read.skip[0])

    def _link_pool(self, row: np.void, step: Step, pool: Pool) -> None:
        back = step.kind.endswith("back")
        wide = (step.made if back else step.read).buffer.shape
        row["in_height"], row["in_width"] = wide.height, wide.width
        for name in ("size", "stride", "padding"):
            y, x = getattr(pool.window, name)
            short = name.removesuffix("ding")
            row[f"{short}_y"], row[f"{short}_x"] = y, x
        if isinstance(pool, MeanPool):
            row["full_area"] = pool.full_area

    # Running --------------------------------------------------------------------------------

    def forward(
        self, inputs: Sequence[np.ndarray], normalise: Normalise | None = None
    ) -> tuple[list[np.ndarray], Memory]:
        """The outputs for `inputs`, contiguous [images, ...] arrays of the kernels' dtype.

        Give the memory back with `release`, after `backward` where that is wanted.
        """
        images = len(inputs[0])
        memory = self._memory(images)
        shapes = [self.plan.graph.shapes[v] for v in self.plan.graph.outputs]
        outputs = [np.empty((images, *shape), self.plan.kernels.dtype) for shape in shapes]
        self._run(self._forward, self.plan.forward, [*inputs, *outputs], 0, memory, normalise)
        return outputs, memory

    def backward(
        self,
        memory: Memory,
        gradients: Sequence[np.ndarray],
        normalise: Normalise | None = None,
    ) -> list[np.ndarray]:
        """The gradients to those inputs whose gradient the plan was made for, in their order."""
        plan, graph = self.plan, self.plan.graph
        wanted = cast(Collection[int], plan.gradients)
        nothing = np.empty((memory.images, 0), plan.kernels.dtype)
        found = {}
        for value in graph.inputs:
            if value in wanted:  # zero where no output reads it
                make = np.empty if value in plan.gradient_of else np.zeros
                found[value] = make((memory.images, *graph.shapes[value]), plan.kernels.dtype)
        arrays = [*gradients, *(found.get(value, nothing) for value in graph.inputs)]
        first = len(graph.inputs) + len(graph.outputs)
        self._run(self._backward, plan.backward, arrays, first, memory, normalise)
        return list(found.values())

    def release(self, memory: Memory) -> None:
        """Let a later batch use `memory`."""
        self.plan.spare.append(memory)

    def _memory(self, images: int) -> Memory:
        lanes = self.plan.kernels.lanes
        blocks = -(-images // lanes)
        arenas = blocks if self.plan.training else min(self.threads, blocks)
        with self._choosing:
            for position, spare in enumerate(self.plan.spare):
                if len(spare.kept) >= blocks and len(spare.arena) >= arenas:
                    del self.plan.spare[position]
                    spare.images = images
                    return spare
            self.plan.spare.clear()  # smaller ones, which a larger one soon stands in for
        arena = aligned((arenas, self.plan.arena_bytes))
        return Memory(images, lanes, arena, aligned((blocks, self.plan.kept_bytes)))

    def _run(
        self,
        linked: np.ndarray,
        steps: Sequence[Step],
        arrays: Sequence[np.ndarray],
        first: int,
        memory: Memory,
        normalise: Normalise | None,
    ) -> None:
        """All steps on all blocks; a step `moments` makes the blocks wait for each other.

        `arrays` are the caller's, and `first` is the number by which steps name the first.
        """
        begin = 0
        for number, step in enumerate(steps):
            if step.kind == "moments":
                sums = np.empty((memory.blocks, step.shape.channels, 2))
                self._stretch(linked[begin : number + 1], arrays, first, memory, (step, sums))
                positions = step.shape.height * step.shape.width
                cast(Normalise, normalise)(step.vectors[0], sums.sum(0), memory.images * positions)
                begin = number + 1
        self._stretch(linked[begin:], arrays, first, memory, None)

    def _stretch(
        self,
        steps: np.ndarray,
        arrays: Sequence[np.ndarray],
        first: int,
        memory: Memory,
        moments: tuple[Step, np.ndarray] | None,
    ) -> None:
        """Steps on all blocks; of `moments`, the last of them, sums of each block come out."""
        free: SimpleQueue[int] = SimpleQueue()
        for arena in range(len(memory.arena)):
            free.put(arena)

        def one(block: int) -> None:
            first_image = block * memory.lanes
            external = np.zeros(self._externals + len(self._moments), np.uint64)
            for number, array in enumerate(arrays, start=first):
                external[number] = array[first_image:].ctypes.data
            if moments is not None:
                external[self._moments[moments[0]]] = moments[1][block].ctypes.data
            arena = block if self.plan.training else free.get()
            try:
                self.plan.kernels.run(
                    steps,
                    memory.arena[arena].ctypes.data,
                    memory.kept[block].ctypes.data,
                    external,
                    min(memory.lanes, memory.images - first_image),
                )
            finally:
                free.put(arena)

        each(one, memory.blocks, self.threads)

    # Gradients to weights -------------------------------------------------------------------

    def weight_gradient(self, name: str, memory: Memory, which: int = KEPT) -> np.ndarray:
        """The gradient to the weights of layer `name`, after `backward`.

        Returns one number per kept weight in ascending position; with `which` = ALL, or ALL_BF16
        for products in bf16, one per weight.
        """
        node, pattern = self._nodes[name], self.patterns[name]
        source = View(self.plan.maps[node.sources[0]], skip=node.window.stride)
        gradient = View(self.plan.gradient_of[self.plan.made_by(node)])
        task = np.zeros(1, GRADIENT)
        row = task[0]
        row["in"], row["out"] = source.place(self._size), gradient.place(self._size)
        row["height"], row["width"] = gradient.buffer.shape[1:]
        row["band"] = self._band(source)
        strides = source.buffer.strides
        kept, starts = self._forward_lists[name], pattern.starts
        if which == KEPT and kept.width == 1:
            offsets = kept.ascending
            result = np.empty(len(offsets), self.plan.kernels.dtype)
        else:
            which = ALL if which == KEPT else which
            table = window_offsets(node, pattern.shape[1], strides)
            groups = np.arange(node.groups, dtype=np.int32) * (pattern.shape[1] * strides.plane)
            offsets = (groups[:, None] + table).astype(np.int32)
            row["per_group"], row["window"] = pattern.filters // node.groups, pattern.window
            result = np.empty(pattern.size, self.plan.kernels.dtype)
        row["starts"], row["offsets"] = starts.ctypes.data, offsets.ctypes.data
        share = -(-pattern.filters // (8 * self.threads)) * 8

        def part(number: int) -> None:
            filters = range(number * share, min((number + 1) * share, pattern.filters))
            self.plan.kernels.gradient(
                which,
                task,
                memory.arena.ctypes.data,
                memory.arena.strides[0],
                memory.blocks,
                filters,
                result,
            )

        each(part, -(-pattern.filters // share), self.threads)
        return result


def aligned(shape: tuple[int, int]) -> np.ndarray:
    """Zeroed bytes whose rows start on cache lines (the row length must be a multiple of one).

    Where there are enough they ask for large pages: a filter's kept weights read from as many
    places as there are weights, more than a core keeps translations of small pages for. Fewer come
    from NumPy, so that an address sanitizer sees where they end, to within a line.
    """
    size = shape[0] * shape[1]
    if size < _LARGE_PAGE:
        spare = np.zeros(size + ALIGNMENT, np.uint8)
        start = -spare.ctypes.data % ALIGNMENT
        return spare[start : start + size].reshape(shape)
    held = mmap(-1, size)
    if hasattr(held, "madvise") and hasattr(mmap_module, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            held.madvise(mmap_module.MADV_HUGEPAGE)
    return np.frombuffer(held, np.uint8, size).reshape(shape)


def each(task: Callable[[int], None], many: int, threads: int) -> None:
    """task(0) ... task(many - 1), several at a time; the caller's thread does its part."""
    numbers = iter(range(many))

    def work() -> None:
        for number in numbers:  # a thread takes what is next
            task(number)

    others = min(threads, many) - 1
    waiting = [_pool(threads).submit(work) for _ in range(others)]
    try:
        work()
    finally:
        wait(waiting)  # all of them, also where one failed: they write to the caller's arrays
        for other in waiting:
            other.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="harprune")


_renewed: WeakSet = WeakSet()


def renewed_after_fork(worker) -> None:
    """`worker.renew()` is called in a child, into which no thread follows that is at work in it."""
    _renewed.add(worker)


def _renew() -> None:
    _pool.cache_clear()
    for worker in list(_renewed):
        worker.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
