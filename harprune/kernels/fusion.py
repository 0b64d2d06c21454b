# SPDX-License-Identifier: Apache-2.0
"""Which nodes of a graph become one step: a sum and a ReLU follow in the step that feeds them.

A map is then written once, and read once less.
"""

from dataclasses import dataclass

from harprune.kernels.graph import (
    Affine,
    Convolution,
    Graph,
    Node,
    Normalisation,
    Rectifier,
    Sum,
)


@dataclass(frozen=True)
class Fused:
    """A node with the sum and the ReLU that follow it."""

    main: Node
    other: int | None
    rectify: bool
    out: int

    @property
    def sources(self) -> tuple[int, ...]:
        return self.main.sources if self.other is None else (*self.main.sources, self.other)


def fuse(graph: Graph) -> list[Fused]:
    """The graph's nodes, with sums and ReLUs drawn into the step before them where one reads it."""
    users = graph.users()
    fused: dict[int, Fused] = {}  # by the value each makes, in the order of computation

    def open_step(value: int) -> Fused | None:
        """The step that makes `value`, if more can follow in it: nobody else reads the value."""
        step = fused.get(value)
        if step is None or step.rectify or value in graph.outputs or len(users[value]) > 1:
            return None
        return step if isinstance(step.main, Convolution | Affine | Normalisation | Copy) else None

    for node in graph.nodes:
        main, other, rectify = node, None, isinstance(node, Rectifier)
        if isinstance(node, Sum):
            # Into the later of the two steps: what it adds is then there when it runs.
            order = list(fused)
            last = max(node.sources, key=lambda v: order.index(v) if v in fused else -1)
            other = node.sources[1] if last == node.sources[0] else node.sources[0]
            step = open_step(last)
            if step is not None and step.other is None:
                main = fused.pop(last).main
            else:
                main, other = Copy(node.sources[:1], node.out), node.sources[1]
        elif rectify:
            step = open_step(node.sources[0])
            if step is not None:
                main, other = step.main, step.other
                del fused[node.sources[0]]
            else:
                main = Copy(node.sources, node.out)
        fused[node.out] = Fused(main, other, rectify, node.out)
    return list(fused.values())


@dataclass(frozen=True)
class Copy(Node):
    """Its source as it is."""
