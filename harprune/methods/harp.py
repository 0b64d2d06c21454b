# SPDX-License-Identifier: Apache-2.0
"""HARP: Holistic Adversarially Robust Pruning (Zhao & Wressnegger, ICLR 2023).

Learns, per layer, how many connections stay (density) and which (scores) by

    min over r, S of   L_robust(theta * M(S, g(r)))  +  gamma * max(cost(g(r)) / target - 1, 0)

with theta fixed (unless `train_weights`). gamma grows by the step of `gamma` each epoch, so that
robustness comes first and the budget after it, and stops growing for good once an epoch ends within
the budget.

A density that one step throws to 1 would stay there, for the sigmoid's slope is then zero and no
penalty moves it: so none is let above 0.99 of its range, where densities also start at most.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from harprune.methods.base import (
    Budget,
    Method,
    batch_norm_parameters,
    given_densities,
    install_scores,
    network_parameters,
    parameter_group,
    scaled_magnitude,
    score_group,
    settle_scores,
)
from harprune.sparsity import masks
from harprune.sparsity.costs import Cost
from harprune.sparsity.density import LARGEST_LOGIT, Density, LearnedDensity
from harprune.sparsity.masks import LearnedMask

_NEWTON_STEPS = 50
_OF_DENSITIES = ("gamma", "enforce_after", "start_density", "start_factor", "decay_densities")


@dataclass(eq=False)
class HARP(Method):
    """Learned densities and learned scores.

    Attributes:
        gamma: step of the penalty's weight; in epoch e (from 0) the weight is (e + 1) * gamma.
        enforce_after: epochs after which the budget holds at every step: what the penalty has left
            over it is taken away along the penalty's own gradient, as if gamma were each time the
            multiplier that just meets the budget. None leaves that to gamma alone, as HARP does;
            a stage of few epochs then ends above its budget, and `settle` cuts what was learned.
        start_density: global density from which the learned densities start, shared by the
            allocation; None takes `start_factor` times the target, at most 1.
        start_factor: 10 as HARP starts; 1 starts at the target.
        learn_scores: False keeps the magnitude scores (ablation "densities only").
        learn_densities: False keeps the allocation at the target (ablation "scores only").
        train_weights: also train the network itself, as no paper of scores does: what is kept then
            adapts while it is chosen, and finetuning starts from there.
        train_batch_norm: also train scale and shift of batch norm (parity).
        decay_scores: weight decay on the scores (parity).
        decay_densities: weight decay on r, which pulls every density to 1/2 (parity).
    """

    gamma: float = 0.01
    enforce_after: int | None = None
    start_density: float | None = None
    start_factor: float = 10.0
    learn_scores: bool = True
    learn_densities: bool = True
    train_weights: bool = False
    train_batch_norm: bool = False
    decay_scores: bool = False
    decay_densities: bool = False
    _cost: Cost = field(init=False, repr=False)
    _overrun: Cost = field(init=False, repr=False)
    _steps: int = field(init=False, repr=False, default=1)
    _reached: bool = field(init=False, repr=False, default=False)
    _enforced: bool = field(init=False, repr=False, default=False)

    def __post_init__(self):
        if not self.gamma >= 0.0:
            raise ValueError(f"gamma {self.gamma:g} must not be negative")
        if self.enforce_after is not None and self.enforce_after < 0:
            raise ValueError(f"enforce_after {self.enforce_after} must not be negative")
        if self.start_density is not None and not 0.0 < self.start_density <= 1.0:
            raise ValueError(f"start_density {self.start_density:g} must lie in (0, 1]")
        if not self.start_factor > 0.0:
            raise ValueError(f"start_factor {self.start_factor:g} must be above 0")
        if not (self.learn_scores or self.learn_densities):
            raise ValueError(
                "harp with neither scores nor densities learned trains nothing; use one-shot"
            )

    @property
    def trains_scores(self) -> bool:
        return self.learn_scores

    def without_effect(self, epochs: int) -> dict[str, str]:
        idle = {}
        if self.enforce_after is not None and self.enforce_after >= epochs:
            idle["enforce_after"] = f"in {epochs} epochs"
        if self.start_density is not None:
            idle["start_factor"] = f"beside start_density = {self.start_density:g}"
        if not self.learn_densities:
            idle |= dict.fromkeys(_OF_DENSITIES, "with learn_densities = false")
        if not self.learn_scores:
            idle["decay_scores"] = "with learn_scores = false"
        if self.train_weights:
            idle["train_batch_norm"] = "with train_weights = true, which trains it as well"
        return idle

    def attach(self, model: nn.Module, budget: Budget) -> None:
        self._budget, self._cost = budget, budget.cost(model)
        self._overrun = budget.overrun(model)
        self._enforced = self.enforce_after == 0
        learn = self.learn_densities
        densities = self._learned(model, budget) if learn else given_densities(model, budget)
        install_scores(budget.layers(model), densities, budget.granularity, scaled_magnitude)

    def _learned(self, model: nn.Module, budget: Budget) -> dict[str, Density]:
        start = self.start_density or min(1.0, self.start_factor * budget.density)
        floor = budget.floor * budget.density
        # An allocation may ask for less than the floor, where g has no inverse.
        return {
            name: LearnedDensity(max(share, 1.01 * floor, 1e-12), floor)
            for name, share in budget.allocate(model, start).items()
        }

    def trainable(self, model: nn.Module) -> list[dict]:
        groups = []
        if self.learn_scores:
            groups.append(score_group(model, decay=self.decay_scores))
        if self.learn_densities:
            groups.append(parameter_group(_logits(model), decay=self.decay_densities))
        if self.train_weights:
            groups.append(parameter_group(network_parameters(model), decay=True))
        elif self.train_batch_norm:
            groups.append(parameter_group(batch_norm_parameters(model), decay=True))
        return groups

    @property
    def weight(self) -> float:
        """The weight of the hardware loss in force, (epoch + 1) * gamma until the budget is met."""
        return self._steps * self.gamma

    def hardware_loss(self, model: nn.Module) -> Tensor:
        """max(cost / target - 1, 0) at the present densities, summed over the budget's bounds."""
        return self._overrun(masks.densities(model))

    def penalty(self, model: nn.Module) -> Tensor | float:
        return self.weight * self.hardware_loss(model) if self.learn_densities else 0.0

    def step_ended(self, model: nn.Module, step: int) -> None:
        """Keep densities where they can be learned and, where it is enforced, within the budget."""
        if not self.learn_densities:
            return
        logits = _logits(model)
        with torch.no_grad():
            for logit in logits:
                logit.clamp_(max=LARGEST_LOGIT)
        if not self._enforced:
            return
        # Newton's method. Where layers are nearly dense the cost is concave in r and a whole step
        # would throw them far below the budget; hence no logit moves by more than 1 at a time.
        for _ in range(_NEWTON_STEPS):
            if self.budget_met(model):
                return
            over = self.hardware_loss(model)
            slopes = torch.autograd.grad(over, logits)
            with torch.no_grad():
                length = over / sum(slope.square() for slope in slopes)
                length = torch.minimum(length, 1.0 / torch.stack(slopes).abs().amax())
                for logit, slope in zip(logits, slopes):
                    logit -= length * slope

    @torch.no_grad()
    def epoch_ended(self, model: nn.Module, epoch: int) -> None:
        self._reached = self._reached or self.budget_met(model)
        if not self._reached:
            self._steps += 1
        self._enforced = self.enforce_after is not None and epoch + 1 >= self.enforce_after

    @torch.no_grad()
    def budget_met(self, model: nn.Module) -> bool:
        return round(float(self.hardware_loss(model)), 4) == 0.0

    @torch.no_grad()
    def metrics(self, model: nn.Module) -> dict:
        densities = masks.densities(model)
        return {
            "density": float(self._cost(densities)),
            "gamma": self.weight,
            "penalty": float(self.hardware_loss(model)),
            "budget_met": self.budget_met(model),
            "densities": {name: float(value) for name, value in densities.items()},
        }

    def doubt(self, model: nn.Module) -> str | None:
        if self.budget_met(model):
            return None
        return (
            "the densities learned have not come down to the budget, so all layers are cut in "
            "proportion; prune longer, raise method.gamma or lower method.start_factor"
        )

    def settle(self, model: nn.Module) -> None:
        settle_scores(model, self._budget)

    def state_dict(self) -> dict:
        return {"steps": self._steps, "reached": self._reached, "enforced": self._enforced}

    def load_state_dict(self, state: dict) -> None:
        self._steps, self._reached = int(state["steps"]), bool(state["reached"])
        self._enforced = bool(state.get("enforced", False))


def _logits(model: nn.Module) -> list[nn.Parameter]:
    """What the densities are learned as, each once where layers share one."""
    densities = [mask.density for _, mask in masks.of_kind(model, LearnedMask).values()]
    return list(dict.fromkeys(d.logit for d in densities if isinstance(d, LearnedDensity)))
