# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: seconds and rows, from `harprune.delivery.timing`, and two checks.

A fast variant that computes something else must not win: `overlap` says how far two results agree,
and `kernel_calls` what really ran.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from harprune.delivery.timing import (
    circumstances,
    interleaved,
    seconds,
    speed,
    summary,
    table,
    write_rows,
)
from harprune.kernels import native

__all__ = [
    "circumstances",
    "interleaved",
    "kernel_calls",
    "overlap",
    "seconds",
    "speed",
    "summary",
    "table",
    "write_rows",
]


def overlap(a: Tensor, b: Tensor) -> float:
    """a b / max(a a, b b): 1 where two tensors are equal, less for any other angle or length."""
    a, b = a.detach().double().flatten(), b.detach().double().flatten()
    if torch.equal(a, b):
        return 1.0  # also where both are zero, as the gradient of a network that is cut off
    return float(a @ b / max(a @ a, b @ b))


@contextmanager
def kernel_calls() -> Iterator[set]:
    """What the kernels did inside: "run", and which gradients to weights they computed."""
    run, gradient, seen = native.Kernels.run, native.Kernels.gradient, set()

    def watched_run(self, *arguments) -> None:
        seen.add("run")
        run(self, *arguments)

    def watched_gradient(self, which: int, *arguments) -> None:
        seen.add(which)
        gradient(self, which, *arguments)

    native.Kernels.run, native.Kernels.gradient = watched_run, watched_gradient
    try:
        yield seen
    finally:
        native.Kernels.run, native.Kernels.gradient = run, gradient
