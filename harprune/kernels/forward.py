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


class Forward:
    """A graph with weights in both layouts; each is made when it is first wanted.

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

    def load(self, name: str, kept: np.ndarray) -> None:
        """Take the values of the kept weights of layer `name`, in ascending position.

        The array must not change afterwards: a layout that is made later reads it then.
        """
        self._values[name] = kept
        for layout in ("rows", "blocks"):
            made = vars(self).get(layout)
            if made is not None:
                made.load(name, kept)

    def forward(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The outputs for `inputs`, contiguous [images, ...] arrays of the kernels' dtype."""
        if (len(inputs[0]) < LANES or not self.busy) and self.rows is not None:
            return self.rows.forward(inputs)
        outputs, memory = self.blocks.forward(inputs)
        self.blocks.release(memory)
        # The largest memory serves smaller batches too.
        del self.blocks.plan.spare[:-1]
        return outputs

    @cached_property
    def rows(self) -> RowExecutable | None:
        """For few images or few weights; None for a graph whose maps do not go in rows."""
        try:
            made = RowExecutable(self.graph, self.kernels, **self._options)
        except ValueError:
            return None
        return self._loaded(made)

    @cached_property
    def blocks(self) -> Executable:
        """For whole blocks of 16 images."""
        return self._loaded(Executable(Plan(self.graph, self.kernels), **self._options))

    @cached_property
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
    def _options(self) -> dict:
        return {"patterns": self.patterns, "vectors": self.vectors, "threads": self.threads}

    def _loaded(self, made):
        for name, kept in self._values.items():
            made.load(name, kept)
        return made
