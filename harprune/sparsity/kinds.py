# SPDX-License-Identifier: Apache-2.0
"""Which layers the kernels know. It goes by what a class computes: a subclass may do otherwise."""

from typing import Protocol, TypeGuard

from torch import Tensor, nn

from harprune.kernels import graph as g

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

Weighted = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
"""Layers with weights to prune."""

Trained = Weighted | nn.BatchNorm2d
"""Layers that the kernels run while they train."""


class RunningNorm(Protocol):
    """A batch norm with running statistics."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    momentum: float | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor


def is_weighted(module: object) -> TypeGuard[Weighted]:
    """Whether `module` is a convolution or linear layer, and no more."""
    return _is_linear(module) or is_convolution(module)


def _is_linear(module: object) -> TypeGuard[nn.Linear]:
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def is_convolution(module: object) -> TypeGuard[nn.Conv1d | nn.Conv2d | nn.Conv3d]:
    """Whether `module` is a convolution, and no more."""
    # A mask makes a leaf of a user's own convolution, and says no more of what it overrides.
    return any(
        isinstance(module, kind)
        and type(module).forward is kind.forward
        and type(module)._conv_forward is kind._conv_forward
        for kind in _CONVOLUTIONS
    )


def is_running_norm(module: object) -> TypeGuard[RunningNorm]:
    """Whether `module` is a batch norm that has a fixed function in eval mode."""
    return isinstance(module, _BATCH_NORMS) and module.track_running_stats


def role_of_layer(module: nn.Module) -> type[g.Node] | None:
    """What a layer of a model in training mode is to the kernels."""
    if is_weighted(module):
        return g.Convolution
    if is_running_norm(module) and isinstance(module, nn.BatchNorm2d) and module.affine:
        return g.Normalisation
    return None
