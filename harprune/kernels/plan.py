# SPDX-License-Identifier: Apache-2.0
"""From a graph to steps over an arena, forwards and backwards.

A *forward* step computes relu(main(x) + other), main being a convolution, an affine map, a batch
norm or nothing; what else a graph knows is a step of its own. A *backward* step computes what one
reader of a value adds to its gradient; the last reader also applies the signs of the value's ReLU,
so a gradient in the arena is always that of the sum before the ReLU.
"""

from collections.abc import Collection
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
    Node,
    Normalisation,
    Pool,
    Shape,
)
from harprune.kernels.memory import Buffer, Kept, Unflattened, View, place_kept, place_maps
from harprune.kernels.native import Kernels


@dataclass(eq=False)
class Step:
    """One `struct step` before its buffers have places.

    Attributes:
        shape: of what the step walks over: its result, but what it reads in `pack`, `unpack`,
            `moments`, a flattening and the way back of a pool.
        other: what is added to the result.
        second: what `moments` and `combine` read beside `source`.
        signs_out: where the bits of its own ReLU go.
        signs_in: those of an earlier ReLU, which cut its result.
        signs_view: of a result that is every so many positions of a map: the first (row, column)
            and the steps (down, right), by which it also reads signs.
        vectors: names of scale, shift and slope; of `moments` who asks for the sums.
        weights: the layer, and the first filter of its list.
        external: number of the caller's array that a `pack` or `unpack` copies.
        kept: the winners of a max-pool, the slopes of an activation.
    """

    kind: str
    shape: Shape
    source: View | None = None
    out: View | None = None
    other: View | None = None
    second: View | None = None
    rectify: bool = False
    signs_out: Kept | None = None
    signs_in: Kept | None = None
    signs_view: tuple[int, int, int, int] = (0, 0, 1, 1)
    vectors: tuple[str, str, str] = ("", "", "")
    weights: tuple[str, int] | None = None
    transposed: bool = False
    external: int = -1
    pool: Pool | None = None
    kept: Kept | None = None

    @property
    def read(self) -> View:
        """`source`, which every kind but `pack` has."""
        return cast(View, self.source)

    @property
    def made(self) -> View:
        """`out`, which every kind but `unpack` has."""
        return cast(View, self.out)

    @property
    def gives_way(self) -> Buffer | None:
        """The buffer added, if the sum may take its place: a position is read, then written."""
        if self.kind != "convolve" or self.other is None:
            return None
        return self.other.buffer if self.other.buffer is not self.read.buffer else None

    def buffers(self) -> list[Buffer]:
        """Whose memory the step views."""
        views = (self.source, self.out, self.other, self.second)
        return [view.buffer.memory for view in views if view is not None]


@dataclass(eq=False)
class _Total:
    """The gradient to a value, while its readers give their shares of it.

    Attributes:
        signs: of the ReLU that made the value; the last share's step applies them.
        left: readers that have not given theirs, the caller among them if it is an output.
        deferred: the first share, where it is another value's gradient as it is: whoever writes
            the next one adds it in the same step.
        buffer: where the gradient stands.
    """

    signs: Kept | None
    left: int = 0
    deferred: Buffer | None = None
    buffer: Buffer | None = None

    @property
    def begun(self) -> bool:
        return self.deferred is not None or self.buffer is not None

    def counted(self) -> Kept | None:
        """One reader less to wait for; the signs to apply, if it was the last."""
        self.left -= 1
        return self.signs if self.left == 0 else None


class Plan:
    """Forward and backward steps of a graph on one block of images.

    Args:
        graph: what to compute.
        kernels: the instruction set that will run it.
        training: keep every map, for the gradients to the weights.
        gradients: the inputs whose gradient is wanted; None makes no backward steps.

    Attributes:
        forward, backward: the symbolic steps. In training a step `moments` ends a stretch: its sums
            over all blocks must be known before the next step runs.
        maps: where each value lies that a step makes or reads.
        gradient_of: where the gradient lies to each value that has one; that of a value behind a
            ReLU is cut by its signs.
        spare: memory of earlier batches, for the next ones.
    """

    def __init__(
        self,
        graph: Graph,
        kernels: Kernels,
        *,
        training: bool = False,
        gradients: Collection[int] | None = None,
    ):
        self.graph, self.kernels = graph, kernels
        self.training, self.gradients = training, gradients
        self.fused = fuse(graph)
        self.maps: dict[int, Buffer] = {}
        self.signs: dict[int, Kept] = {}
        self.kept: dict[int, Kept] = {}
        self.forward: list[Step] = []
        self.backward: list[Step] = []
        self._forward()
        self._totals: dict[int, _Total] = {}  # of the values whose gradient is wanted
        if gradients is not None:
            self._backward(set(graph.inputs).difference(gradients))
        self.gradient_of = {
            value: total.buffer for value, total in self._totals.items() if total.buffer is not None
        }
        steps = [*self.forward, *self.backward]
        onto: dict[Buffer, Buffer] = {}
        if not training:
            onto = {s.made.buffer: added for s in steps if (added := s.gives_way) is not None}
        viewed = [step.buffers() for step in steps]
        size = kernels.dtype.itemsize
        self.arena_bytes = place_maps(viewed, size, reuse=not training, onto=onto)
        self.kept_bytes = place_kept((*self.signs.values(), *self.kept.values()))
        self.spare: list = []

    # Forward --------------------------------------------------------------------------------

    def _buffer(self, shape: Shape) -> Buffer:
        return Buffer(shape, self.kernels.lanes)

    def _map(self, value: int) -> Buffer:
        if value not in self.maps:
            self.maps[value] = self._buffer(self.graph.shapes[value])
        return self.maps[value]

    def _forward(self) -> None:
        for number, value in enumerate(self.graph.inputs):
            out = View(self._map(value))
            self.forward.append(Step("pack", self.graph.shapes[value], out=out, external=number))
        for fused in self.fused:
            self._step_forward(fused)
        first = len(self.graph.inputs)
        for number, value in enumerate(self.graph.outputs, start=first):
            self.forward.append(
                Step("unpack", self.graph.shapes[value], View(self._map(value)), external=number)
            )

    def _step_forward(self, fused: Fused) -> None:
        main, shape = fused.main, self.graph.shapes[fused.out]
        source, out = self._map(main.sources[0]), self._map(fused.out)
        step = Step("scale", shape, View(source), View(out), rectify=fused.rectify)
        if fused.other is not None:
            step.other = View(self._map(fused.other))
        if fused.rectify and self.gradients is not None:
            step.signs_out = self.signs[fused.out] = Kept(shape, self.kernels.sign_bytes)
        match main:
            case Convolution():
                self._reach(main, source, shape)
                step.kind, step.weights = "convolve", (main.name, 0)
                step.source = View(source, skip=main.window.stride)
                step.vectors = ("", f"{main.name}/bias", "")
            case Affine():
                step.vectors = (f"{main.name}/scale", f"{main.name}/shift", "")
            case Normalisation():
                moments = Step("moments", shape, View(source), second=View(source))
                moments.vectors = (main.name, "", "")
                self.forward.append(moments)
                step.vectors = (f"{main.name}/scale", f"{main.name}/shift", "")
            case Pool():
                step.kind = "max_pool" if isinstance(main, MaxPool) else "mean_pool"
                step.pool = main
                if isinstance(main, MaxPool):
                    step.kept = self.kept[fused.out] = Kept(shape, self.kernels.lanes)
            case Activation():
                step.kind = main.kind
                if self.gradients is not None:
                    size = self.kernels.lanes * self.kernels.dtype.itemsize
                    step.kept = self.kept[fused.out] = Kept(shape, size)
            case Flatten():
                step.shape, step.out = source.shape, View(Unflattened(out, source.shape))
            case Concatenation():
                first = 0
                for value in main.sources:
                    part = View(self._map(value))
                    self.forward.append(
                        Step("scale", part.buffer.shape, part, View(out, channel=first))
                    )
                    first += part.buffer.shape.channels
                return
        self.forward.append(step)

    @staticmethod
    def _reach(node: Convolution, source: Buffer, out: Shape) -> None:
        """The border that the windows of `node` read."""
        w = node.window
        sides = zip(
            w.size, w.stride, w.padding, w.dilation, (out.height, out.width), source.shape[1:]
        )
        source.need(
            *(max(p, (n - 1) * s + (k - 1) * d - p - (m - 1)) for k, s, p, d, n, m in sides)
        )

    # Backward -------------------------------------------------------------------------------

    def _backward(self, needless: Collection[int]) -> None:
        """Steps in reverse, each giving one reader's share of the gradient to what it read."""
        values = set(range(len(self.graph.shapes))).difference(needless)
        self._totals = {value: _Total(self.signs.get(value)) for value in values}
        readers = [source for fused in self.fused for source in fused.sources]
        for value in [*readers, *self.graph.outputs]:
            if value in self._totals:
                self._totals[value].left += 1
        first = len(self.graph.inputs) + len(self.graph.outputs)
        for number, value in enumerate(self.graph.outputs, start=first):
            arrived = self._buffer(self.graph.shapes[value])
            step = Step("pack", arrived.shape, out=View(arrived), external=number)
            self.backward.append(step)
            self._share_as_it_is(value, arrived)
        for fused in reversed(self.fused):
            gradient = self._totals[fused.out].buffer
            if gradient is not None:
                self._step_backward(fused, gradient)
        first += len(self.graph.outputs)
        for number, value in enumerate(self.graph.inputs, start=first):
            gradient = self._totals[value].buffer if value in self._totals else None
            if gradient is not None:
                step = Step("unpack", gradient.shape, View(gradient), external=number)
                self.backward.append(step)

    def _step_backward(self, fused: Fused, gradient: Buffer) -> None:
        main, shape = fused.main, self.graph.shapes[fused.main.sources[0]]
        step = Step("scale", shape, View(gradient))
        if fused.other is not None:
            self._share_as_it_is(fused.other, gradient)
        match main:
            case Convolution():
                if self.training and main.bias:
                    moments = Step("moments", gradient.shape, View(gradient), second=View(gradient))
                    moments.vectors = (f"{main.name}/gradient", "", "")
                    self.backward.append(moments)
                self._share_of_convolution(main, gradient)
            case Copy():
                self._share_as_it_is(main.sources[0], gradient)
            case Affine():
                step.vectors = (f"{main.name}/scale", "", "")
                self._share(main.sources[0], step)
            case Normalisation():
                read = View(self._map(main.sources[0]))
                moments = Step("moments", shape, View(gradient), second=read)
                moments.vectors = (f"{main.name}/gradient", "", "")
                self.backward.append(moments)
                step.kind, step.second = "combine", read
                back = f"{main.name}/back"
                step.vectors = (f"{back}_scale", f"{back}_shift", f"{back}_slope")
                self._share(main.sources[0], step)
            case Pool():
                step.kind = "max_pool_back" if isinstance(main, MaxPool) else "mean_pool_back"
                step.shape = self.graph.shapes[fused.out]
                step.pool, step.kept = main, self.kept.get(fused.out)
                self._share_of_pool(main.sources[0], step)
            case Activation():
                step.kind, step.kept = "times_slopes", self.kept[fused.out]
                self._share(main.sources[0], step)
            case Flatten():
                step.source = View(Unflattened(gradient, shape))
                self._share(main.sources[0], step)
            case Concatenation():
                channel = 0
                for value in main.sources:
                    part = self.graph.shapes[value]
                    self._share(value, Step("scale", part, View(gradient, channel=channel)))
                    channel += part.channels

    def _share_of_convolution(self, node: Convolution, gradient: Buffer) -> None:
        value = node.sources[0]
        if value not in self._totals:
            return
        shape, out, w = self.graph.shapes[value], gradient.shape, node.window
        (sy, sx) = w.stride
        # With a stride, positions of the input fall into phases that different taps see: each is a
        # step with lists of its own, and reads the gradient as `lists.transposed_list` lays it.
        reach = []
        for k, s, p, d, n, m in zip(w.size, w.stride, w.padding, w.dilation, shape[1:], out[1:]):
            taps = p - np.arange(k) * d
            tops = -taps % s
            ups = (tops + taps) // s
            last = (n - 1 - tops) // s + ups
            reach.append(max(0, int(-ups.min()), int(last.max()) - (m - 1)))
        gradient.need(*reach)
        steps = []
        for top in range(min(sy, shape.height)):
            for left in range(min(sx, shape.width)):
                rows, columns = -(-(shape.height - top) // sy), -(-(shape.width - left) // sx)
                step = Step("convolve", Shape(shape.channels, rows, columns), View(gradient))
                step.weights = node.name, (top * sx + left) * shape.channels
                step.transposed = True
                step.signs_view = (top, left, sy, sx)
                steps.append(step)
        self._share(value, *steps)

    def _share_as_it_is(self, value: int, gradient: Buffer) -> None:
        """The share of a reader that only adds `value`: the gradient to the sum, as it is."""
        total = self._totals.get(value)
        if total is None:
            return
        if not total.begun and total.left > 1:
            total.deferred = gradient
            total.counted()
        elif not total.begun and total.signs is None:  # the only reader's, with nothing to apply
            total.buffer = gradient
            total.counted()
        else:
            self._share(value, Step("scale", gradient.shape, View(gradient)))

    def _share(self, value: int, *steps: Step) -> None:
        """The share of a reader that `steps` together write, each adding what was there before."""
        total = self._totals.get(value)
        if total is None:
            return
        signs, before = total.counted(), total.deferred or total.buffer
        total.deferred = None
        total.buffer = total.buffer or self._buffer(self.graph.shapes[value])
        for step in steps:
            (top, left), skip = step.signs_view[:2], step.signs_view[2:]
            step.out = View(total.buffer, 0, top, left, skip)
            if before is not None:
                step.other = View(before, 0, top, left, skip)
            step.signs_in = signs
            self.backward.append(step)

    def _share_of_pool(self, value: int, step: Step) -> None:
        """The share of a pool, whose step adds in place alone, and applies no signs."""
        total = self._totals.get(value)
        if total is None:
            return
        signs, begun, shape = total.counted(), total.begun, self.graph.shapes[value]
        total.buffer = total.buffer or self._buffer(shape)
        whole = View(total.buffer)
        if total.deferred is not None:
            self.backward.append(Step("scale", shape, View(total.deferred), whole))
            total.deferred = None
        step.out, step.other = whole, whole if begun else None
        self.backward.append(step)
        if signs is not None:
            self.backward.append(Step("scale", shape, whole, whole, signs_in=signs))

    def made_by(self, node: Node) -> int:
        """The value that the step of `node` makes, sum and ReLU included."""
        return next(f.out for f in self.fused if f.main is node)
