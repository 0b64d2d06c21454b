# SPDX-License-Identifier: Apache-2.0
"""Keep the top fraction of a layer's scores: the one straight-through function of the package."""

from math import floor

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def kept_count(density: float, units: int) -> int:
    """Units kept at `density`: n - floor((1 - density) n), as HARP rounds; at least 1.

    Flooring the number *removed* keeps never less than density * n. The hair added before the
    floor undoes float error only: (1 - 0.9) * 10 must remove one unit, not none.
    """
    return max(1, units - floor((1.0 - density) * units + 1e-9))


def keep_top(scores: Tensor, count: int) -> Tensor:
    """The mask, 0 or 1 in `scores`' dtype and shape, of the `count` largest |scores|.

    Among equal scores the one with the lower index is kept, so the count is exact and the mask
    does not depend on the sorting algorithm.

    Raises:
        ValueError: count outside 0..numel, or a score that is not a number.
    """
    size = scores.numel()
    if not 0 <= count <= size:
        raise ValueError(f"cannot keep {count} of {size} units; the count must lie in 0..{size}")
    magnitude = scores.detach().abs().flatten()
    if count == 0 or count == size:
        return torch.full_like(scores, float(count > 0))
    threshold = torch.kthvalue(magnitude, size - count + 1).values
    if torch.isnan(threshold) or torch.isnan(magnitude.max()):
        raise ValueError("a score is NaN: the pruning stage has diverged; lower its learning rate")
    mask = magnitude > threshold
    ties = (magnitude == threshold).nonzero().flatten()
    mask[ties[: count - int(mask.sum())]] = True
    return mask.view_as(scores).to(scores.dtype)


def keep_top_at(scores: Tensor, density: Tensor) -> Tensor:
    """`keep_top` at `density`, a scalar tensor; on an accelerator the host waits for nothing.

    There a score that is not a number is not refused: the loss that follows is none either.
    """
    size = scores.numel()
    if _on_host(scores):
        return keep_top(scores, kept_count(float(density.detach()), size))
    removed = torch.floor((1.0 - density.detach().double()) * size + 1e-9)
    order = scores.detach().abs().flatten().argsort(descending=True, stable=True)
    ranks = torch.arange(size, device=scores.device)
    mask = torch.empty_like(scores, memory_format=torch.contiguous_format)
    mask.view(-1)[order] = (ranks < (size - removed).clamp_min(1)).to(scores.dtype)
    return mask


def _on_host(scores: Tensor) -> bool:
    return scores.device.type == "cpu"


def top_among(scores: Tensor, among: Tensor, count: int) -> Tensor:
    """The boolean mask of the `count` highest `scores`, sign included, where `among`."""
    index = among.flatten().nonzero().flatten()
    best = index[scores.flatten()[index].topk(count).indices]
    chosen = torch.zeros_like(among, memory_format=torch.contiguous_format)
    chosen.view(-1)[best] = True
    return chosen


class _StraightThrough(torch.autograd.Function):
    """Forward: the mask. Backward: as if the mask were |score|, and its mean level the density.

    With G = dL/dmask, dL/dscores = G * sign(scores) and dL/ddensity = the sum of all entries of G
    (HARP, Zhao & Wressnegger 2023, as released; HYDRA, Sehwag et al. 2020, for the scores).
    """

    @staticmethod
    def forward(ctx, scores: Tensor, density: Tensor) -> Tensor:
        ctx.save_for_backward(scores)
        ctx.density = (density.shape, density.dtype)
        return keep_top_at(scores, density)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor):
        (gradient,) = gradients
        (scores,) = ctx.saved_tensors
        shape, dtype = ctx.density
        wants_scores, wants_density = ctx.needs_input_grad
        to_scores = gradient * scores.sign() if wants_scores else None
        to_density = gradient.sum().to(dtype).reshape(shape) if wants_density else None
        return to_scores, to_density


def top_fraction(scores: Tensor, density: Tensor) -> Tensor:
    """Mask of the top `density` (scalar tensor in (0, 1]) of |scores|, straight-through to both."""
    return _StraightThrough.apply(scores, density)
