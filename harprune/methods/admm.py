# SPDX-License-Identifier: Apache-2.0
"""Robust-ADMM (Ye et al., ICCV 2019): adversarial training pulled towards a pruned network.

    min over W   L_robust(W)   with W in S, the networks within the budget

split by W = Z into training with a penalty and a projection (eq. 6-9; scaled duals U):

    W:  L_robust(W) + sum over layers of rho / 2 |W - Z + U|^2         every optimiser step
    Z = project(W + U),   U += W - Z                                  every few epochs

The projection keeps each layer's units of the largest Euclidean norm. The authors also start the
learning rate anew after each update; here it follows the stage's schedule.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from harprune.methods.base import Budget, Method, given_counts, parameter_group
from harprune.sparsity import masks
from harprune.sparsity.layers import Layer
from harprune.sparsity.masks import OpenMask
from harprune.sparsity.selection import keep_top

_CUT = 0.2  # share of the squared norm from which on a projection is more than a last touch


class _Apart(OpenMask):
    """Z, which meets the budget, and the scaled dual U, beside the free weights W."""

    z: Tensor
    u: Tensor


@dataclass(eq=False)
class ADMM(Method):
    """All weights are trained; the allocation sets each layer's density (the paper's: uniform).

    Attributes:
        rho: weight of the penalty at first. What draws the weights is its sum over the steps, times
            the learning rate: 0.001 is meant for 200 epochs of 391 steps, fewer need more.
        growth: factor on rho at each update.
        updates: how often Z and U are updated, evenly over the training; the paper's 200 epochs
            have one every 20.
    """

    rho: float = 1e-3
    growth: float = 1.3
    updates: int = 10
    _counts: dict[str, int] = field(init=False, repr=False)
    _epochs: int = field(init=False, repr=False, default=0)
    _weight: float = field(init=False, repr=False, default=0.0)

    def __post_init__(self):
        if not self.rho > 0.0:
            raise ValueError(f"rho {self.rho:g} must be above 0")
        if not self.growth >= 1.0:
            raise ValueError(f"growth {self.growth:g} must be at least 1")
        if self.updates < 1:
            raise ValueError(f"updates = {self.updates} must be at least 1")
        self._weight = self.rho

    def beyond(self, epochs: int, steps: int) -> dict[str, str]:
        short = self.updates > epochs
        return {"updates": f"exceeds {epochs} epochs; there is one after each"} if short else {}

    @torch.no_grad()
    def attach(self, model: nn.Module, budget: Budget) -> None:
        self._budget, self._counts = budget, given_counts(model, budget)
        for name, layer in budget.layers(model).items():
            w = layer.parameter.detach()
            z = w * self._support(name, layer, w)
            masks.install(layer, _Apart(z=z, u=torch.zeros_like(w)))

    def _support(self, name: str, layer: Layer, values: Tensor) -> Tensor:
        """Where the projection of `values` is not zero: the units of the largest norm."""
        return keep_top(self._budget.granularity.total(layer, values**2), self._counts[name])

    def begin(self, epochs: int, steps: int) -> None:
        self._epochs = epochs

    def trainable(self, model: nn.Module) -> list[dict]:
        return [parameter_group(list(model.parameters()), decay=True)]

    def penalty(self, model: nn.Module) -> Tensor:
        """rho / 2 times the squared distance of W + U to Z."""
        apart = [
            (layer.weight - mask.z + mask.u).square().sum()
            for layer, mask in masks.of_kind(model, _Apart).values()
        ]
        return self._weight / 2.0 * torch.stack(apart).sum()

    @torch.no_grad()
    def epoch_ended(self, model: nn.Module, epoch: int) -> None:
        if (epoch + 1) * self.updates // self._epochs == epoch * self.updates // self._epochs:
            return
        self._weight *= self.growth
        for name, (layer, mask) in masks.of_kind(model, _Apart).items():
            w = layer.parameter
            mask.z = (w + mask.u) * self._support(name, layer, w + mask.u)
            mask.u = mask.u + w - mask.z

    @torch.no_grad()
    def metrics(self, model: nn.Module) -> dict:
        return {"rho": self._weight, "penalty": float(self.penalty(model))}

    def budget_met(self, model: nn.Module) -> bool:
        """Never: what validation sees is not yet projected, so the last epoch counts."""
        return False

    @torch.no_grad()
    def doubt(self, model: nn.Module) -> str | None:
        whole, left = 0.0, 0.0
        for name, (layer, _) in masks.installed(model).items():
            squares = layer.parameter.square()
            whole += float(squares.sum())
            left += float((squares * self._support(name, layer, layer.parameter)).sum())
        if left >= (1.0 - _CUT) * whole:
            return None
        return (
            f"{100 * (1.0 - left / whole):.0f} % of the squared norm of the weights are cut away: "
            "training has not drawn them to the pruned network; raise method.rho or prune longer"
        )

    @torch.no_grad()
    def settle(self, model: nn.Module) -> None:
        for name, (layer, _) in masks.installed(model).items():
            masks.fix(layer, self._support(name, layer, layer.parameter).bool())

    def state_dict(self) -> dict:
        return {"rho": self._weight}

    def load_state_dict(self, state: dict) -> None:
        self._weight = float(state["rho"])
