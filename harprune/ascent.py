# SPDX-License-Identifier: Apache-2.0
"""One normalised step uphill: the worst point nearby, where sharpness-aware training looks.

Of scores it is S2AP's, of weights that of adversarial weight perturbation.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ascent:
    """How far uphill gradients are taken, and from when on.

    Attributes:
        radius: length of the step as a fraction of the parameters', each by itself.
        warm_up: share of the training that passes first, without it.

    Raises:
        ValueError: radius not above 0, or warm_up outside [0, 1).
    """

    radius: float
    warm_up: float

    def __post_init__(self):
        if not self.radius > 0.0:
            name = type(self).__name__.lower()
            raise ValueError(f"radius {self.radius:g} must be above 0; leave {name} out instead")
        if not 0.0 <= self.warm_up < 1.0:
            raise ValueError(f"warm_up {self.warm_up:g} must lie in [0, 1)")


@contextmanager
def uphill(parameters: Sequence[Tensor], radius: float) -> Iterator[None]:
    """The parameters p at p + radius |p| g / |g|, g their present gradients; given back afterwards.

    Lengths are those of each parameter by itself. One without a gradient, or with none but zeros,
    stays where it is.
    """
    moved = [(p, p.grad) for p in parameters if p.grad is not None]
    before = [p.detach().clone() for p, _ in moved]
    with torch.no_grad():
        for p, gradient in moved:
            length = gradient.norm()
            # `where` and not `if`, for which the host would wait on an accelerator.
            p += gradient * torch.where(length > 0, radius * p.norm() / length, 0.0)
    try:
        yield
    finally:
        with torch.no_grad():
            for (p, _), original in zip(moved, before):
                p.copy_(original)
