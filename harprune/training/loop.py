# SPDX-License-Identifier: Apache-2.0
"""`fit`: the only training loop. Stages differ in the loss they hand in and in what they train.

Randomness is a function of (seed, step): the global generators, of torch, NumPy and Python, are
seeded anew before each step. A run that was killed can therefore go on from any step with nothing
but the step's number.

With several processes each takes its rows of every batch. Gradients and the loss are averaged, so
the weights stay equal; batch norm counts with each process's own rows, and before every forward
its running statistics are those of rank 0. The noise of an attack is each rank's own.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import islice
from typing import cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from harprune.randomness import seed_generators
from harprune.training.averaging import SETTLING, Average
from harprune.training.batches import Batches
from harprune.training.schedules import Schedule

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
_SEED_STRIDE = 1_000_003  # a prime, so that the seeds of different stages and steps do not meet


class Diverged(ValueError):
    """The loss is not a finite number."""


def fit(
    model: nn.Module,
    batches: Batches,
    *,
    loss: Loss,
    optimiser: Optimizer,
    schedule: Schedule,
    epochs: int,
    fabric: Fabric,
    seed: int,
    start: int = 0,
    replays: int = 1,
    average: Average | None = None,
    nearby: Callable[[float], AbstractContextManager | None] = lambda progress: None,
    after_step: Callable[[int, Tensor], None] = lambda step, loss: None,
    after_epoch: Callable[[int], bool | None] = lambda epoch: None,
) -> None:
    """Train the parameters in `optimiser`, and only these, for `epochs` over `batches`.

    Args:
        loss: (model, x, y) -> scalar. It may run an attack on the model it is given.
        schedule: progress in [0, 1] -> multiplier of each group's learning rate.
        start: step to begin with, counted over all epochs; earlier ones count as done.
        replays: optimiser steps on each batch (free adversarial training).
        average: takes in the model after every optimiser step, and at the end of an epoch
            batch-norm statistics from a few batches of it.
        nearby: called as (progress) when a step has its gradients. Where it gives a context, they
            are taken anew inside it, and the optimiser steps outside (sharpness-aware training).
        after_step: called as (step, loss) when step `step` is done.
        after_epoch: called with the number of the epoch that ended; true ends the training.

    Raises:
        Diverged: a loss that is not finite, named with its step.
    """
    total = epochs * len(batches)
    with training_only(model, optimiser), peak_rates(optimiser) as rates:
        objective, optimiser = fabric.setup(_Objective(model, loss), optimiser)
        for epoch in range(start // len(batches), epochs):
            first = max(start - epoch * len(batches), 0)
            for index, (x, y) in enumerate(batches.epoch(epoch, first), start=first):
                step = epoch * len(batches) + index
                seed_generators(step_seed(seed, step, fabric.global_rank))
                for group, rate in zip(optimiser.param_groups, rates):
                    group["lr"] = rate * schedule(step / total)
                for _ in range(replays):
                    there = partial(nearby, step / total)
                    value = _step(fabric, objective, optimiser, x, y, there)
                    if average is not None:
                        average.update_parameters(model)
                _require_finite(value, step)
                after_step(step, value)
            if average is not None:
                seed_generators(step_seed(seed, epoch * len(batches), fabric.global_rank))
                with fabric.autocast():
                    average.settle(islice(batches.epoch(epoch), SETTLING), loss)
            for network in (model,) if average is None else (model, average.module):
                _share_buffers(fabric, network)
            if after_epoch(epoch):
                return


class _Objective(nn.Module):
    """The loss as a module, so that a data-parallel wrapper sees one forward and one backward.

    The attack inside then runs on the bare model: no hooks, no buffers broadcast. It takes the
    batch from a function, for Fabric rounds the tensors it is given to the precision of training,
    and an attack on rounded images is another attack.
    """

    def __init__(self, model: nn.Module, loss: Loss):
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
        _fill_cache(self.model)
        return self.loss(self.model, *batch())


def _step(fabric, objective, optimiser, x: Tensor, y: Tensor, nearby) -> Tensor:
    """One optimiser step, on the gradients here or, where there is one, at the point nearby."""
    objective.train()
    value = _differentiate(fabric, objective, x, y)
    if (context := nearby()) is not None:
        with context:
            optimiser.zero_grad(set_to_none=True)
            _differentiate(fabric, objective, x, y)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    # The mean over processes: all of them record, and stop at, the same loss.
    return fabric.all_reduce(value.detach(), reduce_op="mean")


def _differentiate(fabric, objective, x: Tensor, y: Tensor) -> Tensor:
    """The loss, its gradients left behind; every mask is computed once for attack and loss."""
    with parametrize.cached():
        value = objective(lambda: (x, y))
        fabric.backward(value)
    return value


def _fill_cache(model: nn.Module) -> None:
    # A weight first touched under no_grad inside `cached()` would stay cached without a graph,
    # and the loss would silently train nothing.
    for module in model.modules():
        if parametrize.is_parametrized(module):
            for name in cast(nn.ModuleDict, module.parametrizations):
                getattr(module, name)


def _share_buffers(fabric: Fabric, model: nn.Module) -> None:
    """Rank 0's buffers to every process, as before each step, so that all validate one network."""
    if fabric.world_size > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def _require_finite(value: Tensor, step: int) -> None:
    # On an accelerator asking costs a synchronisation, so it is asked seldom there.
    if value.device.type != "cpu" and step % 50:
        return
    if not torch.isfinite(value):
        raise Diverged(f"the loss is {float(value)} at step {step}")


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """The seed of one step: different for every (seed, step, rank) a run can meet."""
    return ((seed * _SEED_STRIDE + step) * 1_024 + rank) % 2**63  # as much as torch takes


@contextmanager
def peak_rates(optimiser: Optimizer) -> Iterator[list[float]]:
    """The learning rate of each group, given back afterwards whatever was made of it."""
    rates = [group["lr"] for group in optimiser.param_groups]
    try:
        yield rates
    finally:
        for group, rate in zip(optimiser.param_groups, rates):
            group["lr"] = rate


@contextmanager
def training_only(model: nn.Module, optimiser: Optimizer) -> Iterator[None]:
    """Freeze the parameters that `optimiser` does not hold; give back their flags afterwards."""
    held = {id(p) for group in optimiser.param_groups for p in group["params"]}
    before = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(id(parameter) in held)
    try:
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
