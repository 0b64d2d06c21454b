# SPDX-License-Identifier: Apache-2.0
"""Passes forwards and back to the inputs under fixed weights, as attacks take them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from harprune.kernels.graph import Graph
from harprune.kernels.layouts import Layouts
from harprune.kernels.plan import Plan
from harprune.kernels.rows import RowGradient
from harprune.kernels.runtime import Executable


@dataclass
class Pass:
    """What the stages of one pass forwards keep for the way back, each in a form of its own."""

    stages: list[RowGradient | Executable]
    kept: list[Any]


class Gradient(Layouts[RowGradient | Executable]):
    """A graph with weights, forwards and back to its inputs; see `Layouts`."""

    def in_rows(self, graph: Graph) -> RowGradient:
        return RowGradient(graph, self.kernels, **self.options)

    def in_blocks(self, graph: Graph) -> Executable:
        return Executable(Plan(graph, self.kernels, gradients=graph.inputs), **self.options)

    def forward(self, inputs: Sequence[np.ndarray]) -> tuple[list[np.ndarray], Pass]:
        """The outputs for `inputs`, contiguous [images, ...] arrays of the kernels' dtype.

        Give the pass back with `release`, after `backward` where that is wanted.
        """
        values, done = list(inputs), Pass(self.stages(len(inputs[0])), [])
        for stage in done.stages:
            values, kept = stage.forward(values)
            done.kept.append(kept)
        return values, done

    def backward(self, done: Pass, gradients: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The gradients to the inputs, of those to the outputs."""
        for stage, kept in zip(reversed(done.stages), reversed(done.kept)):
            gradients = stage.backward(kept, gradients)
        return list(gradients)

    def release(self, done: Pass) -> None:
        """Let a later batch use what `done` held."""
        for stage, kept in zip(done.stages, done.kept):
            stage.release(kept)
