# SPDX-License-Identifier: Apache-2.0
"""The steps that take gradients from the outputs of row steps back to their inputs.

Each step forwards has one that undoes its direction: a convolution reads the gradient of its
result with its taps mirrored, a split is joined, a pooled number is spread. A map's gradient is
what its readers give, summed as they come, and cut by the signs of the ReLU that made the map: the
step that adds the last of it also applies these, so no step reads a gradient that is not whole.
"""

from collections.abc import Sequence

from harprune.kernels.native import Kernels
from harprune.kernels.rowsteps import (
    Bits,
    Map,
    Part,
    RowStep,
    mirrored,
    reach,
    taps_and_phases,
)


def adjoint(steps: Sequence[RowStep], inputs: int, outputs: int, kernels: Kernels) -> list[RowStep]:
    """The steps back of `steps`, which come out with room for the bits that these need.

    Args:
        steps: of a `RowPlan`, not merged.
        inputs, outputs: how many the graph has. The caller's arrays on the way back are the
            outputs' gradients and then the inputs', of which only some may be written.
    """
    walk = _Walk(kernels, inputs, outputs)
    for step in reversed(steps):
        walk.back(step)
    return walk.steps


class _Walk:
    """From the last step to the first."""

    def __init__(self, kernels: Kernels, inputs: int, outputs: int):
        self.kernels, self.inputs, self.outputs = kernels, inputs, outputs
        self.steps: list[RowStep] = []
        self._gradients: dict[Map, Part] = {}  # of maps forwards, as far as they are summed
        self._makers: dict[Map, RowStep] = {}  # steps that made a gradient nobody has read

    def back(self, step: RowStep) -> None:
        """The step back of `step`, after those of all steps that read what it makes."""
        if step.kind == "unpack":
            given = RowStep("pack", step.shape, external=step.external - self.inputs)
            self._make(given, step.read.whole)
            return
        gradient = self._whole(step)
        if gradient is None:
            return
        if step.kind == "pack":
            number = self.outputs + step.external
            self.steps.append(RowStep("unpack", step.shape, gradient, external=number))
            return
        if step.other is not None:
            self._add(step.other.whole, gradient)
        read = step.read.whole
        if step.kind == "scale" and not step.vectors[0]:
            self._add(read, gradient)
        else:
            self._make(self._undoing(step, gradient), read)

    def _whole(self, step: RowStep) -> Part | None:
        """The gradient to what `step` makes, behind its ReLU; None where no output reads it."""
        made = step.made.whole
        total = self._gradients.get(made)
        if total is None:
            return None
        if step.rectify:
            if total.whole not in self._makers:  # it is another map's too, to be read as it is
                total = self._append(RowStep("scale", step.shape, total), made)
            step.signs_out = Bits(made)
            self._makers[total.whole].signs_in = step.signs_out
        self._makers.pop(total.whole, None)
        return Part(total.whole, total.channel + step.made.channel)

    def _make(self, step: RowStep, to: Map) -> None:
        """Let `step` make a part of the gradient to the map `to`."""
        before = self._gradients.get(to)
        if before is not None and step.kind in ("convolve", "scale"):
            step.other, before = before, None
        made = self._append(step, to)
        if before is not None:
            self._gradients[to] = before
            self._add(to, made)

    def _append(self, step: RowStep, to: Map) -> Part:
        """Let `step` make the gradient to the map `to`, in a map of its own."""
        made = Map(to.shape, to.pitch, self.kernels.lanes)
        step.out, step.sums = Part(made), made
        if step.kind == "convolve":
            down, _ = taps_and_phases(step.window, 0)
            reach(step.read.whole, made, -down, step.taps)
        self.steps.append(step)
        self._makers[made] = step
        self._gradients[to] = Part(made)
        return self._gradients[to]

    def _add(self, to: Map, part: Part) -> None:
        """Add the gradient of another map, or a part of it, to the one of `to`."""
        if to in self._gradients:
            self._make(RowStep("scale", to.shape, part), to)
        else:
            self._gradients[to] = part

    def _undoing(self, step: RowStep, gradient: Part) -> RowStep:
        """The step back of `step`, from the gradient of its result."""
        shape = step.read.whole.shape
        match step.kind:
            case "convolve":
                back = RowStep("convolve", shape, gradient, node=step.node, transposed=True)
                back.taps = mirrored(step.taps)
                return back
            case "scale":
                return RowStep("scale", shape, gradient, vectors=(step.vectors[0], ""))
            case "split":
                return RowStep("join", shape, gradient, stride=step.stride)
            case "flatten":
                return RowStep("unflatten", shape, gradient)
            case "max_pool":
                height, width = step.window.size
                step.kept = Bits(step.made.whole, parts=height * width)
                return RowStep("max_spread", shape, gradient, node=step.node, kept=step.kept)
            case "swish" | "relu6":
                vector = self.kernels.lanes * self.kernels.dtype.itemsize
                step.kept = Bits(step.made.whole, parts=vector // self.kernels.sign_bytes)
                return RowStep("times_slopes", shape, gradient, kept=step.kept)
            case _:
                return RowStep("mean_spread", shape, gradient, node=step.node)
