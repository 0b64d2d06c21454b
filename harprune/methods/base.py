# SPDX-License-Identifier: Apache-2.0
"""What every pruning method is asked for: `Budget` says how much, `Method` says how."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, sqrt
from typing import ClassVar

import torch
from torch import Tensor, nn

from harprune.sparsity import masks
from harprune.sparsity.allocation import Allocation, Bound, apportion, erk, global_top
from harprune.sparsity.audit import Audit, audit, budget_of
from harprune.sparsity.costs import Cost, parameter_prices, weighted_cost
from harprune.sparsity.density import Density, GivenDensity
from harprune.sparsity.granularity import Granularity
from harprune.sparsity.layers import Layer, prunable_layers, weights
from harprune.sparsity.selection import keep_top

Prices = Callable[[nn.Module, Mapping[str, Layer]], dict[str, int]]


@dataclass(frozen=True)
class Limit:
    """A second bound beside a budget's own: at most `density` of the dense cost at these prices.

    Raises:
        ValueError: density outside (0, 1].
    """

    density: float
    prices: Prices

    def __post_init__(self):
        if not 0.0 < self.density <= 1.0:
            raise ValueError(
                f"the limit {self.density:g} must lie in (0, 1]; it is a fraction of "
                "what the dense network costs"
            )


@dataclass(frozen=True)
class Budget:
    """What may be kept, and of what.

    Attributes:
        density: fraction of the cost that may be kept, in (0, 1).
        allocation: how the density is shared among layers where a method does not learn it.
        granularity: what is kept or dropped together.
        include: name patterns of the layers to prune; None takes every weight layer.
        exclude: name patterns taken away from these.
        floor: least density of a layer, as a fraction of `density` (alpha in HARP).
        prices: cost of one weight in each layer; parameters by default, multiply-adds through
            `sparsity.costs.multiply_add_prices`.
        limit: a second bound that the kept weights must also meet; none by default.

    Raises:
        ValueError: density outside (0, 1) or floor outside [0, 1].
    """

    density: float
    allocation: Allocation = erk
    granularity: Granularity = Granularity.WEIGHT
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    floor: float = 0.1
    prices: Prices = lambda model, layers: parameter_prices(layers)
    limit: Limit | None = None

    def __post_init__(self):
        if not 0.0 < self.density < 1.0:
            raise ValueError(
                f"density {self.density:g} must lie strictly between 0 and 1; it is the fraction "
                "of the weights that is kept, so 0.01 keeps 1 %"
            )
        if not 0.0 <= self.floor <= 1.0:
            raise ValueError(
                f"floor {self.floor:g} must lie in [0, 1]; it is a fraction of density"
            )

    def layers(self, model: nn.Module) -> dict[str, Layer]:
        """The layers of `model` under this budget."""
        return prunable_layers(model, include=self.include, exclude=self.exclude)

    def cost(self, model: nn.Module) -> Cost:
        """densities -> fraction of the dense cost; call before masks are installed."""
        layers = self.layers(model)
        return weighted_cost(layers, self.prices(model, layers))

    def overrun(self, model: nn.Module) -> Cost:
        """densities -> max(cost / bound - 1, 0), summed over the bounds; before masks are on."""
        layers = self.layers(model)
        costs = [
            (density, weighted_cost(layers, prices(model, layers)))
            for density, prices in self._bounds()
        ]

        def overrun(densities: Mapping[str, Tensor]) -> Tensor:
            over = [(cost(densities) / bound - 1.0).clamp(min=0.0) for bound, cost in costs]
            return sum(over, torch.zeros(()))

        return overrun

    def _bounds(self) -> list[tuple[float, Prices]]:
        first = [(self.density, self.prices)]
        return first if self.limit is None else [*first, (self.limit.density, self.limit.prices)]

    def allocate(self, model: nn.Module, density: float) -> dict[str, float]:
        """`density` shared among the layers by the allocation."""
        return self.allocation(weights(self.layers(model)), density)

    def counts(self, model: nn.Module, densities: Mapping[str, float]) -> dict[str, int]:
        """Integer units of each layer in proportion to `densities`, exactly within the budget."""
        layers = self.layers(model)
        grain = self.granularity
        units = {name: grain.units(layer) for name, layer in layers.items()}
        least = self.floor * self.density
        minimum = {name: max(1, ceil(least * n - 1e-9)) for name, n in units.items()}
        bounds = []
        for density, prices in self._bounds():
            weight_price = prices(model, layers)
            price = {n: weight_price[n] * grain.unit_size(layers[n]) for n in layers}
            total = sum(units[n] * price[n] for n in units)
            bounds.append(Bound(budget_of(density, total), price))
        return apportion(densities, units, *bounds, minimum=minimum)

    def audit(self, model: nn.Module) -> Audit:
        """What `model` keeps, counted from its tensors; refused above the budget.

        Raises:
            ValueError: more is kept than the budget allows, or a layer is empty.
        """
        layers = self.layers(model)
        for density, prices in reversed(self._bounds()):
            counts = audit(layers, density, prices(model, layers)).require_within_budget()
        return counts


@dataclass(frozen=True)
class Sample:
    """Training images that a method asks for.

    Attributes:
        batches: how many batches of the pruning stage; None for one pass over all images.
        attacked: adversarial images of the stage's training attack instead of clean ones.
        passes: forward + backward passes that `observe` spends on each of them.

    Raises:
        ValueError: fewer than one batch.
    """

    batches: int | None
    attacked: bool = False
    passes: int = 1

    def __post_init__(self):
        if self.batches is not None and self.batches < 1:
            raise ValueError(f"batches = {self.batches} must be at least 1; scores need images")


class Method(ABC):
    """A pruning method: what it installs, trains and adds to the loss. It never owns a loop.

    The life of a method: `check` before any training; `attach` once, and `observe` if it asks for a
    `sample`; then `begin` and, while the model trains, `penalty` in every loss, `step_ended` after
    every optimiser step and `epoch_ended` after every epoch; then `doubt`, and `settle` last. A
    stage that goes on after an interruption lives it again, up to `begin`, and is then given the
    model's tensors and `load_state_dict`. So what a method learns lies in tensors of its masks, or
    in `state_dict`.
    """

    _budget: Budget

    uses_allocation: ClassVar[bool] = True
    """Whether the budget's allocation plays a part; not where one ranking of all layers decides."""

    @property
    def trains_scores(self) -> bool:
        """Whether it trains scores of `LearnedMask`s, which S2AP perturbs; no by default."""
        return False

    @property
    def sample(self) -> Sample | None:
        """The images that `observe` is shown; none by default."""
        return None

    def without_effect(self, epochs: int) -> dict[str, str]:
        """Options that cannot matter in a stage of `epochs`, as the others stand; none by default.

        By name, each with the reason: "with learn_densities = false".
        """
        return {}

    def beyond(self, epochs: int, steps: int) -> dict[str, str]:
        """Options that ask for more than `epochs` of `steps` batches have; none by default.

        By name, each with what happens instead: "exceeds 5 epochs; there is one after each".
        """
        return {}

    def check(self, model: nn.Module, budget: Budget) -> None:
        """Before any training: raise ValueError for a network or a budget that cannot be pruned."""

    @abstractmethod
    def attach(self, model: nn.Module, budget: Budget) -> None:
        """Install masks on `model`, or remember what `settle` will need."""

    def observe(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """See the `sample` once, after `attach`; `model` is in eval mode, as under attack."""

    def trainable(self, model: nn.Module) -> list[dict]:
        """What this stage trains, as parameter groups of a torch optimiser; none by default."""
        return []

    def begin(self, epochs: int, steps: int) -> None:
        """Before training: it will last `epochs` of `steps` batches each."""

    def penalty(self, model: nn.Module) -> Tensor | float:
        """Scalar added to the objective; zero by default."""
        return 0.0

    def step_ended(self, model: nn.Module, step: int) -> None:
        """After batch `step` (from 0), of which free training takes several optimiser steps."""

    def epoch_ended(self, model: nn.Module, epoch: int) -> None:
        """After epoch `epoch` (from 0); nothing by default."""

    def budget_met(self, model: nn.Module) -> bool:
        """Whether the network as it stands is worth selecting; always, by default."""
        return True

    def done(self, model: nn.Module) -> bool:
        """Whether training may end before its epochs are over, asked after each; no by default."""
        return False

    @property
    def watches(self) -> bool:
        """Whether `judged` is to be called, at the cost of two more validations; no by default."""
        return False

    def judged(self, gap: float, loss: float) -> None:
        """Before `epoch_ended`, how the network overfits.

        Args:
            gap: robust accuracy on training images minus that on validation images.
            loss: mean cross-entropy on attacked validation images.
        """

    def metrics(self, model: nn.Module) -> dict:
        """What to log after an epoch, as plain values; nothing by default."""
        return {}

    def doubt(self, model: nn.Module) -> str | None:
        """Before `settle`, where there was training: what it may undo, and what helps.

        A clause without a full stop, shown as a warning; None by default.
        """
        return None

    @abstractmethod
    def settle(self, model: nn.Module) -> None:
        """Leave a `FixedMask` on every layer of the budget, exactly within it."""

    def state_dict(self) -> dict:
        """Plain values that a resumed stage needs beside the model's tensors."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Take back what `state_dict` gave."""


class Scored(Method):
    """A `LearnedMask` on each layer, at the density that the allocation gives it."""

    @abstractmethod
    def score(self, layer: Layer, magnitude: Tensor) -> Tensor:
        """The first scores of a layer, in the shape of `magnitude`."""

    def attach(self, model: nn.Module, budget: Budget) -> None:
        self._budget = budget
        densities = given_densities(model, budget)
        install_scores(budget.layers(model), densities, budget.granularity, self.score)

    def settle(self, model: nn.Module) -> None:
        settle_scores(model, self._budget)


class Ranked(Method):
    """One ranking of all layers by the `_scores`, as `settle_ranking` takes them, of `observe`."""

    _scores: dict[str, Tensor]

    uses_allocation = False

    def attach(self, model: nn.Module, budget: Budget) -> None:
        self._budget = budget

    def settle(self, model: nn.Module) -> None:
        settle_ranking(model, self._budget, self._scores)


def install_scores(
    layers: Mapping[str, Layer],
    densities: Mapping[str, Density],
    granularity: Granularity,
    scores: Callable[[Layer, Tensor], Tensor],
) -> None:
    """Put a `LearnedMask` on each layer: `scores(layer, magnitude)` are its first scores."""
    for name, layer in layers.items():
        magnitude = granularity.magnitude(layer, layer.parameter.detach())
        masks.install(layer, masks.LearnedMask(scores(layer, magnitude), densities[name]))


def given_counts(model: nn.Module, budget: Budget) -> dict[str, int]:
    """Units that each layer keeps when the budget's allocation shares its density.

    Raises:
        ValueError: the allocation leaves a layer empty and the budget has no floor.
    """
    shares = budget.allocate(model, budget.density)
    empty = [name for name, share in shares.items() if share == 0.0]
    if empty and budget.floor == 0.0:
        raise ValueError(
            f"layer collapse: the allocation keeps no weight of {empty[0]} (such layers: "
            f"{len(empty)}); set budget.floor above 0 or choose another allocation"
        )
    return budget.counts(model, {name: max(share, 1e-12) for name, share in shares.items()})


def given_densities(model: nn.Module, budget: Budget) -> dict[str, Density]:
    """`given_counts` as fixed densities, exact to the unit."""
    counts, layers = given_counts(model, budget), budget.layers(model)
    units = {name: budget.granularity.units(layer) for name, layer in layers.items()}
    return {name: GivenDensity(counts[name] / units[name]) for name in layers}


def gradients(
    value: Tensor, layers: Mapping[str, Layer], *, create_graph: bool = False
) -> tuple[Tensor, ...]:
    """Of `value` to the weights of `layers`; zero where a layer has no part in it."""
    held = [layer.parameter for layer in layers.values()]
    return torch.autograd.grad(value, held, create_graph=create_graph, materialize_grads=True)


@contextmanager
def differentiable(layers: Mapping[str, Layer]) -> Iterator[None]:
    """Weights that the user froze have gradients inside: they are not trained, but ranked."""
    frozen = [p for layer in layers.values() if not (p := layer.parameter).requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def scaled_magnitude(layer: Layer, magnitude: Tensor) -> Tensor:
    """sqrt(6 / fan_in) * theta / max|theta|, the scores from which HYDRA and HARP start."""
    return sqrt(6.0 / layer.fan_in) * magnitude / magnitude.abs().max().clamp_min(1e-30)


def best_of_all(
    model: nn.Module, budget: Budget, scores: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Boolean masks of the units with the highest scores of the whole network.

    How many units each layer keeps follows from the ranking; its floor and the budget's bounds
    then hold to the unit, the budget's allocation plays no part.

    Args:
        scores: by layer, of any sign, in the `score_shape` of the budget's granularity.
    """
    least = min(float(s.min()) for s in scores.values())
    if least < 0.0:  # `keep_top` goes by magnitude
        scores = {name: s.double() - least for name, s in scores.items()}
    shares = global_top(scores, budget.density)
    counts = budget.counts(model, {name: max(share, 1e-12) for name, share in shares.items()})
    return {name: keep_top(score, counts[name]).bool() for name, score in scores.items()}


def settle_ranking(model: nn.Module, budget: Budget, scores: Mapping[str, Tensor]) -> None:
    """Fix the masks that `best_of_all` gives."""
    best = best_of_all(model, budget, scores)
    for name, layer in budget.layers(model).items():
        masks.fix(layer, best[name])


def settle_scores(model: nn.Module, budget: Budget) -> None:
    """Freeze every `LearnedMask` at its best units, counted within the budget."""
    wanted = {name: float(value.detach()) for name, value in masks.densities(model).items()}
    masks.freeze(model, budget.counts(model, wanted))


def score_group(model: nn.Module, *, decay: bool) -> dict:
    """The scores of all masks as one parameter group; without `decay`, no weight decay."""
    scores = [m.scores for _, m in masks.installed(model).values()]
    return parameter_group(scores, decay=decay)


def parameter_group(parameters: list, *, decay: bool) -> dict:
    """A torch parameter group that takes the stage's weight decay, or none."""
    return {"params": parameters} if decay else {"params": parameters, "weight_decay": 0.0}


def generator(*stream: int) -> torch.Generator:
    """Random numbers of a method's own: the same in every process and after a resume."""
    mixed = 0
    for part in stream:
        mixed = (mixed * 1_000_003 + part + 1) % 2**63
    return torch.Generator().manual_seed(mixed)


def batch_norm_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Scale and shift of every batch norm."""
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return [p for norm in norms for p in norm.parameters(recurse=False)]


def network_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the network itself, without those that its masks learn."""
    learned = {p for _, mask in masks.installed(model).values() for p in mask.parameters()}
    return [p for p in model.parameters() if p not in learned]
