# SPDX-License-Identifier: Apache-2.0
"""Forward passes where no gradient is wanted."""

from collections.abc import Sequence

import numpy as np

from harprune.kernels.graph import Graph
from harprune.kernels.layouts import Layouts
from harprune.kernels.plan import Plan
from harprune.kernels.rows import RowExecutable
from harprune.kernels.runtime import Executable

TOGETHER = 64
"""Images that a thread takes through rows before they go on in blocks."""


class Forward(Layouts[RowExecutable | Executable]):
    """A graph with weights, forwards only; see `Layouts`."""

    def in_rows(self, graph: Graph) -> RowExecutable:
        return RowExecutable(graph, self.kernels, **self.options)

    def in_blocks(self, graph: Graph) -> Executable:
        return Executable(Plan(graph, self.kernels), **self.options)

    def forward(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The outputs for `inputs`, contiguous [images, ...] arrays of the kernels' dtype."""
        images = len(inputs[0])
        stages = self.stages(images)
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


def _run(stage: RowExecutable | Executable, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    if isinstance(stage, RowExecutable):
        return stage.forward(inputs)
    outputs, memory = stage.forward(inputs)
    stage.release(memory)
    # The largest memory serves smaller batches too.
    del stage.plan.spare[:-1]
    return outputs
