# SPDX-License-Identifier: Apache-2.0
"""Forward passes where no gradient is wanted: in rows or in blocks, whichever is faster."""

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from harprune.kernels.graph import Convolution, Graph
from harprune.kernels.lists import Pattern
from harprune.kernels.native import LANES, Kernels
from harprune.kernels.plan import Plan
from harprune.kernels.rows import RowExecutable
from harprune.kernels.runtime import Executable

BUSY = 0.15
"""Share of multiply-adds from which blocks are as fast as rows, for whole blocks."""
SMALL = 16
"""Positions of a map up to which blocks are faster than rows, for whole blocks."""
TOGETHER = 64
"""Images that a thread takes through rows before they go on in blocks."""


class Forward:
    """A graph with weights in both layouts; each is made when it is first wanted.

    A few images run in rows. Whole blocks run in rows as long as maps are large, then in blocks; a
    graph that keeps many of its weights runs in blocks from the start.

    Args:
        graph: what to compute.
        kernels: the instruction set that runs it.
        patterns: where the kept weights of each convolution are.
        vectors: bias, scale and shift of each layer, as for `runtime.Executable`.
        threads: how many blocks, or groups of images, run at once.
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
        self._values: dict[str, np.ndarray] = {}
        self._made: list[tuple[set[str], RowExecutable | Executable]] = []

    def load(self, name: str, kept: np.ndarray) -> None:
        """Take the values of the kept weights of layer `name`, in ascending position.

        The array must not change afterwards: a layout that is made later reads it then.
        """
        self._values[name] = kept
        for names, made in self._made:
            if name in names:
                made.load(name, kept)

    def forward(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The outputs for `inputs`, contiguous [images, ...] arrays of the kernels' dtype."""
        images = len(inputs[0])
        stages = self.for_few if images < LANES else self.for_blocks
        if len(stages) == 1:
            return _run(stages[0], inputs)
        shapes = [self.graph.shapes[v] for v in self.graph.outputs]
        outputs = [np.empty((images, *shape), self.kernels.dtype) for shape in shapes]
        together = TOGETHER * self.threads
        for first in range(0, images, together):
            some = slice(first, first + together)
            values = [array[some] for array in inputs]
            for stage in stages:
                values = _run(stage, values)
            for output, value in zip(outputs, values):
                output[some] = value
        return outputs

    @cached_property
    def for_few(self) -> list[RowExecutable | Executable]:
        """What runs one after the other on less than a block of images."""
        rows = self._rows(self.graph)
        return [rows] if rows is not None else self.for_blocks

    @cached_property
    def for_blocks(self) -> list[RowExecutable | Executable]:
        """What runs one after the other on 16 images or more."""
        first = 0 if self.busy else self._first_small
        large, small = self.graph.parted(first)
        rows = self._rows(large) if large.nodes else None
        if rows is None:
            return [self._blocks(self.graph)]
        return [rows, self._blocks(small)] if small.nodes else [rows]

    def _rows(self, graph: Graph) -> RowExecutable | None:
        """None for a graph whose maps do not go in rows."""
        try:
            return self._loaded(graph, RowExecutable(graph, self.kernels, **self._options))
        except ValueError:
            return None

    def _blocks(self, graph: Graph) -> Executable:
        return self._loaded(graph, Executable(Plan(graph, self.kernels), **self._options))

    @property
    def busy(self) -> bool:
        """Whether so many multiply-adds are left that whole blocks are no slower than rows."""
        kept = total = 0
        for node in self.graph.nodes:
            if isinstance(node, Convolution):
                _, height, width = self.graph.shapes[node.out]
                pattern = self.patterns[node.name]
                kept += height * width * int(pattern.starts[-1])
                total += height * width * pattern.filters * pattern.window
        return kept > BUSY * total

    @property
    def _first_small(self) -> int:
        """The node from which on all convolutions make small maps."""
        first = len(self.graph.nodes)
        for number, node in reversed(list(enumerate(self.graph.nodes))):
            if isinstance(node, Convolution):
                _, height, width = self.graph.shapes[node.out]
                if height * width > SMALL:
                    break
                first = number
        return first

    @property
    def _options(self) -> dict:
        return {"patterns": self.patterns, "vectors": self.vectors, "threads": self.threads}

    def _loaded(self, graph: Graph, made):
        names = {node.name for node in graph.nodes if isinstance(node, Convolution)}
        for name in names & self._values.keys():
            made.load(name, self._values[name])
        self._made.append((names, made))
        return made


def _run(stage: RowExecutable | Executable, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    if isinstance(stage, RowExecutable):
        return stage.forward(inputs)
    outputs, memory = stage.forward(inputs)
    stage.release(memory)
    # The largest memory serves smaller batches too.
    del stage.plan.spare[:-1]
    return outputs
