# SPDX-License-Identifier: Apache-2.0
"""A graph under fixed weights in two layouts: in rows or in blocks, whichever is faster."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Generic, Protocol, TypeVar

import numpy as np

from harprune.kernels.graph import Convolution, Graph
from harprune.kernels.lists import Pattern
from harprune.kernels.native import Kernels
from harprune.kernels.rowsteps import NotInRows

BUSY = 0.5
"""Share of multiply-adds from which blocks are as fast as rows, for whole blocks."""
SMALL = 16
"""Positions of a map up to which blocks are faster than rows, for whole blocks."""


class Loaded(Protocol):
    """A graph, or a part of one, that runs under the weights it was given last."""

    def load(self, name: str, kept: np.ndarray, /) -> None:
        """Take the values of the kept weights of layer `name`, in ascending position."""


Stage = TypeVar("Stage", bound=Loaded)


class Layouts(ABC, Generic[Stage]):
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
        self._made: list[tuple[set[str], Stage]] = []

    def load(self, name: str, kept: np.ndarray) -> None:
        """Take the values of the kept weights of layer `name`, in ascending position.

        The array must not change afterwards: a layout that is made later reads it then.
        """
        self._values[name] = kept
        for names, made in self._made:
            if name in names:
                made.load(name, kept)

    def stages(self, images: int) -> list[Stage]:
        """What runs one after the other on so many images."""
        return self.for_few if images < self.kernels.lanes else self.for_blocks

    @cached_property
    def for_few(self) -> list[Stage]:
        """What runs on less than a block of images."""
        rows = self._rows(self.graph)
        return [self.whole_in_blocks if rows is None else rows]

    @cached_property
    def for_blocks(self) -> list[Stage]:
        """What runs on a block of images or more."""
        large, small = self.graph.parted(0 if self.is_busy else self._first_small)
        if not small.nodes:  # then `large` may lack what the graph gives out twice
            return self.for_few
        rows = self._rows(large) if large.nodes else None
        if rows is None:
            return [self.whole_in_blocks]
        return [rows, self._loaded(small, self.in_blocks(small))]

    @cached_property
    def whole_in_blocks(self) -> Stage:
        """The whole graph in blocks."""
        return self._loaded(self.graph, self.in_blocks(self.graph))

    @abstractmethod
    def in_rows(self, graph: Graph) -> Stage:
        """`graph`, a part of the whole, in rows; `NotInRows` where its maps do not go in rows."""

    @abstractmethod
    def in_blocks(self, graph: Graph) -> Stage:
        """`graph`, a part of the whole, in blocks."""

    @property
    def options(self) -> dict:
        """What every stage takes besides its graph."""
        return {"patterns": self.patterns, "vectors": self.vectors, "threads": self.threads}

    def _rows(self, graph: Graph) -> Stage | None:
        try:
            made = self.in_rows(graph)
        except NotInRows:
            return None
        return self._loaded(graph, made)

    def _loaded(self, graph: Graph, made: Stage) -> Stage:
        names = {node.name for node in graph.nodes if isinstance(node, Convolution)}
        for name in names & self._values.keys():
            made.load(name, self._values[name])
        self._made.append((names, made))
        return made

    @property
    def is_busy(self) -> bool:
        """Whether so many multiply-adds are left that whole blocks are no slower than rows."""
        kept = total = 0
        for node in self.graph.nodes:
            if isinstance(node, Convolution):
                _, height, width = self.graph.shapes[node.out]
                pattern = self.patterns[node.name]
                kept += height * width * int(pattern.starts[-1])
                total += height * width * pattern.size
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
