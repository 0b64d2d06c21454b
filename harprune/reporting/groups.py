# SPDX-License-Identifier: Apache-2.0
"""Runs that differ in their seed alone, gathered, and what they are called."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev
from typing import Any

from harprune.reporting.protocol import uses_allocation
from harprune.reporting.records import RunRecord
from harprune.reporting.tables import format_budget

DENSE = "dense"
"""The network that a run began with, among configurations."""


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone."""

    configuration: str
    density: float
    runs: Mapping[int, RunRecord]
    seconds: Sequence[float | None]

    @property
    def method(self) -> str:
        return next(iter(self.runs.values())).method

    @property
    def budget(self) -> str:
        """What `density` is a share of, in words."""
        return format_budget(next(iter(self.runs.values())).section("budget"))

    @property
    def point(self) -> dict[str, Any]:
        return {"configuration": self.configuration, "density": self.density, "budget": self.budget}


def groups_of(
    runs: Sequence[RunRecord], labels: Sequence[str], took: Mapping[Path, float | None]
) -> list[Group]:
    """Runs by configuration and density, in order of appearance.

    Args:
        labels: the configuration of each run.
        took: seconds, by the run's folder, where they are known.

    Raises:
        ValueError: a run has no density, or two of one configuration have the same seed.
    """
    found: dict[tuple[str, float], dict[int, RunRecord]] = {}
    for run, configuration in zip(runs, labels, strict=True):
        density = _density(run)
        members = found.setdefault((configuration, density), {})
        if run.seed in members:
            raise ValueError(
                f"{members[run.seed].folder} and {run.folder} are both {configuration} at density "
                f"{density} with seed {run.seed}; compare runs that differ in method, allocation, "
                "density or seed"
            )
        members[run.seed] = run
    return [
        Group(configuration, density, members, [took[run.folder] for run in members.values()])
        for (configuration, density), members in found.items()
    ]


def _density(run: RunRecord) -> float:
    density = run.section("budget").get("density")
    if not isinstance(density, float | int):
        raise ValueError(f"{run.folder / 'recipe.json'} has no budget.density; restore the file")
    return float(density)


def configuration_of(run: RunRecord, without_allocation: Container[str]) -> str:
    """`hydra + erk`; with what else the recipe sets for the method or prunes other than weights."""
    method, budget = dict(run.section("method")), run.section("budget")
    method.pop("name", None)
    allocation = method.pop("allocation", None) or budget.get("allocation")
    if not uses_allocation(run, without_allocation):
        allocation = None
    granularity = budget.get("granularity", "weight")
    options = [f"{key}={value}" for key, value in sorted(method.items())]
    options += [f"{granularity}s"] if granularity != "weight" else []
    options += [f"{key}={value}" for key, value in _priced(budget).items()]
    label = f"{run.method} + {allocation}" if allocation else run.method
    return f"{label} ({', '.join(options)})" if options else label


def _priced(budget: Mapping[str, Any]) -> dict[str, Any]:
    """What a budget counts beside or in place of weights."""
    cost = budget.get("cost", "parameters")
    share = budget.get("multiply_add_share") if cost == "mixed" else None
    known = {
        "cost": None if cost == "parameters" else cost,
        "multiply_add_share": share,
        "multiply_adds": budget.get("multiply_adds"),
    }
    return {key: value for key, value in known.items() if value is not None}


def spread_of(values: Sequence[float]) -> float | None:
    """Sample standard deviation over seeds; one alone has none."""
    return stdev(values) if len(values) > 1 else None
