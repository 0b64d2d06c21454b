# SPDX-License-Identifier: Apache-2.0
"""One normalised step uphill: the worst point nearby, where sharpness-aware training looks.

Of scores it is S2AP's, of weights that of adversarial weight perturbation.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def uphill(parameters: Sequence[Tensor], radius: float) -> Iterator[None]:
    """The parameters p at p + radius |p| g / |g|, g their present gradients; given back afterwards.

    Lengths are those of each parameter by itself. One without a gradient, or with none but zeros,
    stays where it is.
    """
    moved = [p for p in parameters if p.grad is not None]
    before = [p.detach().clone() for p in moved]
    with torch.no_grad():
        for p in moved:
            length = p.grad.norm()
            p += p.grad * (radius * p.norm() / length if length > 0 else 0.0)
    try:
        yield
    finally:
        with torch.no_grad():
            for p, original in zip(moved, before):
                p.copy_(original)
