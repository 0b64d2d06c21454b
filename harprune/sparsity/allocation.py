# SPDX-License-Identifier: Apache-2.0
"""How one global density is shared among layers, and how shares become integer counts.

An allocation is a function `(weights, density) -> {layer: density}` over a mapping of layer names
to weight tensors. The densities it gives add up, weighted by size, to the global one; integers
come last, in `apportion`, which meets a budget to the unit.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import floor
from pathlib import Path

import torch
from torch import Tensor

from harprune.sparsity.selection import keep_top

Allocation = Callable[[Mapping[str, Tensor], float], dict[str, float]]


def uniform(weights: Mapping[str, Tensor], density: float) -> dict[str, float]:
    """The same density in every layer."""
    _check(density)
    return dict.fromkeys(weights, density)


def erk(weights: Mapping[str, Tensor], density: float) -> dict[str, float]:
    """Erdos-Renyi-Kernel (Evci et al. 2020): density in proportion to sum(shape) / prod(shape).

    A layer whose share would exceed 1 is kept dense and the rest is scaled again.
    """
    raw = {name: sum(w.shape) / w.numel() for name, w in weights.items()}
    return _scaled_to(raw, _sizes(weights), density)


def igq(weights: Mapping[str, Tensor], density: float) -> dict[str, float]:
    """Integrated Gradient Quota as Flying Bird uses it: keep n / (f n + 1), f set by the total."""
    _check(density)
    sizes = _sizes(weights)
    total = density * sum(sizes.values())

    def kept(f: float) -> float:
        return sum(n / (f * n + 1.0) for n in sizes.values())

    low, high = 0.0, 1.0
    while kept(high) > total:
        high *= 2.0
    for _ in range(200):
        middle = (low + high) / 2.0
        low, high = (middle, high) if kept(middle) > total else (low, middle)
    return {name: 1.0 / (high * n + 1.0) for name, n in sizes.items()}


def global_magnitude(weights: Mapping[str, Tensor], density: float) -> dict[str, float]:
    """Keep the largest |weight| of the whole network; a layer may end up empty."""
    return global_top({name: w.detach().abs() for name, w in weights.items()}, density)


def lamp(weights: Mapping[str, Tensor], density: float) -> dict[str, float]:
    """LAMP (Lee et al. 2021, eq. 3): global top of w^2 / (sum of all w^2 not smaller in its layer).

    The largest weight of a layer scores 1, so no layer is emptied before every layer is down to
    its last weight.
    """
    return global_top({name: lamp_scores(w) for name, w in weights.items()}, density)


def lamp_scores(weight: Tensor) -> Tensor:
    """w[u]^2 / sum of w[v]^2 over v that sort not before u, in the shape of `weight`, float64."""
    squared = weight.detach().double().flatten().square()
    order = squared.argsort(stable=True)
    ascending = squared[order]
    remaining = ascending.flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(squared)
    scores[order] = ascending / remaining.clamp_min(torch.finfo(torch.float64).tiny)
    return scores.view_as(weight)


@dataclass(frozen=True)
class Explicit:
    """Densities that somebody chose, by layer name, scaled in proportion to the global density."""

    densities: Mapping[str, float]

    def __call__(self, weights: Mapping[str, Tensor], density: float) -> dict[str, float]:
        """Raises ValueError where the names are not the model's."""
        unknown, missing = set(self.densities) - set(weights), set(weights) - set(self.densities)
        if unknown or missing:
            raise ValueError(
                f"allocation does not fit the model: {_some(unknown)} unknown, {_some(missing)} "
                "missing; give one density for each prunable layer"
            )
        chosen = {name: float(self.densities[name]) for name in weights}
        for name, value in chosen.items():
            if not 0.0 < value <= 1.0:
                raise ValueError(f"allocation: density {value:g} of {name} must lie in (0, 1]")
        return _scaled_to(chosen, _sizes(weights), density)


def read_allocation(path: str | Path) -> Explicit:
    """An allocation from a JSON file `{layer: density}`."""
    try:
        content = json.loads(Path(path).read_text())
        if not all(type(value) in (int, float) for value in content.values()):
            raise ValueError("a density is no number")
        return Explicit({str(name): float(value) for name, value in content.items()})
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not an allocation ({error}); expected JSON of the form "
            '{"layer name": density}'
        ) from None


@dataclass(frozen=True)
class Bound:
    """What may be kept: at most `budget`, where one unit of a layer costs its `price`."""

    budget: int
    price: Mapping[str, int]

    def cost(self, counts: Mapping[str, float]) -> float:
        return sum(self.price[n] * counts[n] for n in counts)


def apportion(
    densities: Mapping[str, float],
    units: Mapping[str, int],
    *bounds: Bound,
    minimum: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Integer counts in proportion to `densities`, as many as the bounds allow, never above.

    One common factor scales all densities (no layer above its size or below its minimum); what
    rounding leaves is handed out by largest remainder, while units fit all bounds. One bound of
    unit prices *is* met; otherwise no bound has room for another unit of a layer that others allow.

    Args:
        densities: wanted fraction of each layer, > 0.
        units: how many units each layer has.
        bounds: what may be kept.
        minimum: fewest units of each layer; 1 if absent.

    Raises:
        ValueError: the minima alone cost more than a bound.
    """
    minimum = minimum or dict.fromkeys(units, 1)
    for bound in bounds:
        if (least := bound.cost(minimum)) > bound.budget:
            raise ValueError(
                f"the budget of {bound.budget} is below {least}, what the layers' floors alone "
                "cost; raise the density or lower the floor"
            )

    def wanted(factor: float) -> dict[str, float]:
        return {n: min(max(factor * densities[n] * units[n], minimum[n]), units[n]) for n in units}

    def fit(counts: Mapping[str, float]) -> bool:
        return all(bound.cost(counts) <= bound.budget for bound in bounds)

    if fit(units):
        return dict(units)
    low, high = 0.0, 1.0
    while fit(wanted(high)) and high < 1e12:
        high *= 2.0
    for _ in range(200):
        middle = (low + high) / 2.0
        low, high = (middle, high) if fit(wanted(middle)) else (low, middle)
    shares = wanted(low)
    return _hand_out({n: floor(shares[n]) for n in units}, shares, units, bounds)


def _hand_out(counts, shares, units, bounds) -> dict[str, int]:
    """Spend what flooring left, largest remainder first, as often round as units still fit."""
    left = [bound.budget - bound.cost(counts) for bound in bounds]
    order = sorted(units, key=lambda n: counts[n] - shares[n])
    spent = True
    while spent:
        spent = False
        for name in order:
            prices = [bound.price[name] for bound in bounds]
            if counts[name] < units[name] and all(p <= rest for p, rest in zip(prices, left)):
                counts[name] += 1
                left = [rest - p for p, rest in zip(prices, left)]
                spent = True
    return counts


def global_top(scores: Mapping[str, Tensor], density: float) -> dict[str, float]:
    """The density of each layer when the highest of all scores, >= 0, are kept; it may be 0."""
    _check(density)
    sizes = {name: s.numel() for name, s in scores.items()}
    everything = torch.cat([s.double().flatten() for s in scores.values()])
    count = floor(density * everything.numel())
    if count == 0:
        raise ValueError(
            f"density {density:g} keeps none of {everything.numel()} weights; raise it"
        )
    parts = keep_top(everything, count).split(list(sizes.values()))
    return {name: int(part.sum()) / sizes[name] for name, part in zip(scores, parts)}


def _scaled_to(raw: Mapping[str, float], sizes: Mapping[str, int], density: float):
    """`raw` times one factor, capped at 1, so that the total is density * sum(sizes)."""
    _check(density)
    total = density * sum(sizes.values())
    dense: set[str] = set()
    while True:
        rest = {n: raw[n] * sizes[n] for n in raw if n not in dense}
        if not rest:
            return dict.fromkeys(raw, 1.0)
        factor = (total - sum(sizes[n] for n in dense)) / sum(rest.values())
        over = {n for n in rest if factor * raw[n] > 1.0}
        if not over:
            return {n: 1.0 if n in dense else factor * raw[n] for n in raw}
        dense |= over


def _sizes(weights: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: w.numel() for name, w in weights.items()}


def _check(density: float) -> None:
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density {density:g} must lie in (0, 1]; it is the fraction kept")


def _some(names: set[str]) -> str:
    return f"{len(names)} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
