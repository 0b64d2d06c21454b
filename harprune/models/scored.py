# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of HYDRA and HARP, which hold scores beside weights; the mask is in nobody's file.

Their layers keep the weights of the largest |scores|, and sort them anew in every forward. HYDRA
keeps the same share of every layer (Sehwag et al., NeurIPS 2020, sec. 3); HARP one that is learned
(Zhao & Wressnegger, ICLR 2023, eq. 6). The share itself is in no checkpoint, so it must be given.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

SCORES, RATE = ".popup_scores", ".k_score"
LEAST = 0.1
"""The least density of a layer that HARP learns, as a share of the target: its alpha."""


def has_scores(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is of this form."""
    return any(name.endswith(SCORES) for name in tensors)


def masked(path: object, tensors: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """The state dict with its masks multiplied into the weights, and without scores.

    Of n weights of a layer the int((1 - a) n) with the smallest |scores| go, a being `density` or,
    where a layer holds a rate r, sigmoid(r) (1 - a_min) + a_min with a_min = 0.1 `density`; both as
    the releases round. Among equal scores the one with the lower index goes.

    Args:
        path: what errors name.
        density: the target in (0, 1] that the network was pruned for; 1 keeps every weight.

    Raises:
        ValueError: a density outside (0, 1], or scores that are not one for each weight.
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density {density} must lie in (0, 1]: the share of weights kept")
    rest = {n: t for n, t in tensors.items() if not n.endswith((SCORES, RATE))}
    for name in [name for name in tensors if name.endswith(SCORES)]:
        layer, scores = name.removesuffix(SCORES), tensors[name]
        weight = rest.get(f"{layer}.weight")
        if weight is None or weight.shape != scores.shape:
            shape = "no weight" if weight is None else f"a weight of {list(weight.shape)}"
            raise ValueError(
                f"{path}: {name} is {list(scores.shape)} beside {shape}; only scores of single "
                "weights are read, not those of channels"
            )
        removed = _removed(scores.numel(), density, tensors.get(layer + RATE))
        flat = weight.clone().flatten()
        flat[scores.abs().flatten().argsort(stable=True)[:removed]] = 0
        rest[f"{layer}.weight"] = flat.view_as(weight)
    return rest


def _removed(size: int, density: float, rate: Tensor | None) -> int:
    if density == 1.0:
        return 0
    if rate is None:
        return int((1 - density) * size)
    least = LEAST * density
    return int((1 - (torch.sigmoid(rate) * (1 - least) + least)) * size)
