# SPDX-License-Identifier: Apache-2.0
"""Several runs side by side under one protocol: seeds averaged, methods compared image by image."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from harprune.outcomes import Evaluation, Measure
from harprune.pairing import Outcomes, PairedDifference, paired_difference, pooled_difference
from harprune.reporting.protocol import protocol_of, require_alike, uses_allocation
from harprune.reporting.records import STAGES, RunRecord, read_run
from harprune.reporting.summary import AUTOATTACK, measure_order
from harprune.reporting.tables import format_budget

DENSE = "dense"


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


def compare_runs(
    folders: Sequence[str | Path],
    *,
    baseline: str | None = None,
    labels: Sequence[str] | None = None,
    seconds: Sequence[float | None] | None = None,
    complete: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    without_allocation: Container[str] = (),
) -> dict[str, Any]:
    """Runs grouped over seeds: mean and sample standard deviation of accuracies, exact counts.

    Args:
        folders: finished run folders of one data set, model and threat, measured on one set of
            images.
        baseline: a configuration ("hydra + erk"), a method ("hydra") or "dense", against which
            the others of the same density are tested, seed by seed, on the same images.
        labels: what each run's configuration is called; said by its recipe when absent.
        seconds: what each run took, where that is known.
        complete: gives a recipe of an earlier version the keys that came since.
        without_allocation: methods for which budget.allocation has no effect.

    Raises:
        ValueError: a run is unfinished, protocols differ, a seed occurs twice in one configuration,
            runs of one configuration and density differ in more than their seed, runs were attacked
            on other images, or the baseline is unknown.
    """
    runs = [read_run(folder) for folder in folders]
    if not runs:
        raise ValueError("nothing to compare; name one run folder or more")
    protocol = protocol_of(runs)
    labels = labels or [_configuration(run, without_allocation) for run in runs]
    took = dict(zip((run.folder for run in runs), seconds or [None] * len(runs), strict=True))
    groups = _groups(runs, labels, took)
    for group in groups:
        called = f"{group.configuration} at density {group.density}"
        require_alike(group.runs.values(), called, complete, without_allocation)
    pairs = [] if baseline is None else list(_pairs(groups, baseline))
    return {
        "protocol": protocol,
        "rows": [*_dense_rows(runs), *map(_row, groups)],
        "baseline": baseline,
        "paired": list(_paired(pairs)),
        "pooled": list(_pooled(pairs)),
        "warnings": list(_warnings(groups)),
        "runs": [_made(run, label) for run, label in zip(runs, labels, strict=True)],
    }


def _groups(
    runs: Sequence[RunRecord], labels: Sequence[str], took: Mapping[Path, float | None]
) -> list[Group]:
    """Runs by configuration and density, in order of appearance."""
    found: dict[tuple[str, float], dict[int, RunRecord]] = {}
    for run, configuration in zip(runs, labels, strict=True):
        density = _density(run)
        members = found.setdefault((configuration, density), {})
        seed = _seed(run)
        if seed in members:
            raise ValueError(
                f"{members[seed].folder} and {run.folder} are both {configuration} at density "
                f"{density} with seed {seed}; "
                "compare runs that differ in method, allocation, density or seed"
            )
        members[seed] = run
    return [
        Group(configuration, density, members, [took[run.folder] for run in members.values()])
        for (configuration, density), members in found.items()
    ]


def _density(run: RunRecord) -> float:
    density = run.section("budget").get("density")
    if not isinstance(density, float | int):
        raise ValueError(f"{run.folder / 'recipe.json'} has no budget.density; restore the file")
    return float(density)


def _configuration(run: RunRecord, without_allocation: Container[str]) -> str:
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


def _finetuned(run: RunRecord) -> Evaluation:
    return run.attacked["finetuned"]


def _row(group: Group) -> dict[str, Any]:
    runs = group.runs.values()
    audits = [run.audit for run in runs if run.audit]
    return group.point | {
        "method": group.method,
        "seeds": list(group.runs),
        "images": sorted({_finetuned(run).size for run in runs}),
        "measures": _measures({seed: _finetuned(run).measures for seed, run in group.runs.items()}),
        "kept": [audit.kept for audit in audits],
        "total": audits[0].total,
        "denominator": audits[0].denominator,
        "multiply_adds": [a.multiply_adds["kept"] for a in audits if a.multiply_adds],
        "dense_multiply_adds": (audits[0].multiply_adds or {}).get("dense"),
        "passes": [run.passes("prune") + run.passes("finetune") for run in runs],
        "seconds": list(group.seconds),
        "layers": {name: layer.density for name, layer in audits[0].layers.items()},
    }


def _dense_rows(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """One row of the dense networks, a network for each seed; else a row for each network.

    Of one that several runs attacked, of each accuracy the evaluation on most images counts.
    """
    begun: dict[Any, list[RunRecord]] = {}
    for run in runs:
        begun.setdefault(_dense_network(run), []).append(run)
    networks = [known for known in begun.values() if any(DENSE in run.attacked for run in known)]
    seeds = [seed for known in networks for seed in {_seed(run) for run in known}]
    if len(seeds) == len(set(seeds)):
        return [_dense_row(DENSE, networks)] if networks else []
    names = (_few([run.folder.name for run in known]) for known in networks)
    return [_dense_row(f"{DENSE} of {n}", [k]) for n, k in zip(names, networks, strict=True)]


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 3 else ""
    return ", ".join(names[:2] if more else names) + more


def _dense_row(name: str, networks: Sequence[Sequence[RunRecord]]) -> dict[str, Any]:
    """Of networks, each with the runs that began with it."""
    audits = [run.audit for known in networks for run in known[:1] if run.audit]
    measures = {
        _seed(known[0]): _widest(run.attacked[DENSE] for run in known if DENSE in run.attacked)
        for known in networks
    }
    return {
        "configuration": name,
        "density": 1.0,
        "budget": "100 % kept",
        "seeds": list(measures),
        "measures": _measures(measures),
        "kept": [audit.total for audit in audits],
        "total": audits[0].total,
        "denominator": audits[0].denominator,
        "images": sorted({m.size for known in measures.values() for m in known.values()}),
    }


def _widest(attacked: Iterable[Evaluation]) -> dict[str, Measure]:
    """Of each accuracy of one network the measure on most images."""
    found: dict[str, Measure] = {}
    for evaluation in sorted(attacked, key=lambda evaluation: evaluation.size):
        found |= evaluation.measures
    return found


def _seed(run: RunRecord) -> int:
    return run.recipe.get("seed", 0)


def _dense_network(run: RunRecord) -> Any:
    """What tells dense networks apart; by their results where an earlier version kept no digest.

    None of a network that nobody was to attack, nor gave to the run.
    """
    if DENSE not in run.attacked:
        return run.began_with
    evaluation = run.attacked[DENSE]
    counted = ((name, m.correct, m.size) for name, m in evaluation.measures.items())
    return evaluation.identity.get("model") or (_seed(run), *counted)


def _measures(known: Mapping[int, Mapping[str, Measure]]) -> dict[str, Any]:
    """Mean and sample standard deviation of each accuracy, over those of the seeds that have it."""
    found: dict[str, dict[int, float]] = {}
    for seed, measures in known.items():
        for name, measure in measures.items():
            found.setdefault(name, {})[seed] = measure.accuracy
    return {name: _statistics(found[name]) for name in measure_order(found)}


def _statistics(values: Mapping[int, float]) -> dict[str, Any]:
    each = list(values.values())
    return {"seeds": list(values), "values": each, "mean": fmean(each), "spread": _spread(each)}


def _spread(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Pair:
    """The configuration of a group, or its dense network, beside the baseline, with one seed."""

    configuration: str
    group: Group
    seed: int
    first: Sequence[Evaluation]
    second: Sequence[Evaluation]

    @property
    def point(self) -> dict[str, Any]:
        return self.group.point | {"configuration": self.configuration}

    def outcomes(self, name: str) -> tuple[Outcomes, Outcomes]:
        """Of each of the two the evaluation on most images that has the accuracy `name`."""
        return _outcomes(self.first, name), _outcomes(self.second, name)

    def difference(self, name: str) -> PairedDifference | None:
        return paired_difference(*self.outcomes(name), name)


def _outcomes(attacked: Sequence[Evaluation], name: str) -> Outcomes:
    known = [evaluation for evaluation in attacked if name in evaluation.outcomes]
    return max(known, key=lambda evaluation: evaluation.size).outcomes if known else None


def _pairs(groups: Sequence[Group], baseline: str) -> Iterator[Pair]:
    """Each configuration against the baseline of its density, seed by seed.

    Where the baseline is pruned, the dense network that it began with stands in its own place.
    """
    names = [DENSE, *dict.fromkeys(n for g in groups for n in (g.method, g.configuration))]
    if baseline not in names:
        raise ValueError(
            f"baseline {baseline!r} is not among the runs; choose one of: {', '.join(names)}"
        )
    for group in groups:
        reference = None if baseline == DENSE else _reference(groups, group.density, baseline)
        for seed, run in group.runs.items():
            ours, dense = [_finetuned(run)], _dense_of(run, groups)
            name, first, second = group.configuration, dense, ours
            if reference is group:
                name, first, second = DENSE, ours, dense
            elif baseline != DENSE:
                beside = reference.runs.get(seed) if reference else None
                first = [_finetuned(beside)] if beside else []
            if first and second:
                yield Pair(name, group, seed, first, second)


def _dense_of(run: RunRecord, groups: Sequence[Group]) -> list[Evaluation]:
    """The dense network under attack, by whichever of the runs that began with it."""
    known = [run.attacked[DENSE]] if DENSE in run.attacked else []
    for other in (r for group in groups for r in group.runs.values() if DENSE in r.attacked):
        digest = other.attacked[DENSE].identity.get("model")
        if run.began_with is not None and digest == run.began_with:
            known.append(other.attacked[DENSE])
    return known


def _paired(pairs: Iterable[Pair]) -> Iterator[dict[str, Any]]:
    """The difference to the baseline with each seed."""
    for pair in pairs:
        for name in ("clean", AUTOATTACK):
            if found := pair.difference(name):
                yield pair.point | {"seed": pair.seed, "measure": name} | found.as_dict()


def _pooled(pairs: Iterable[Pair]) -> Iterator[dict[str, Any]]:
    """The difference to the baseline over all seeds that both have.

    `spread` is the sample standard deviation of the seeds' own differences.
    """
    grouped: dict[tuple[str, float], list[Pair]] = {}
    for pair in pairs:
        grouped.setdefault((pair.configuration, pair.group.density), []).append(pair)
    for alike in grouped.values():
        for name in ("clean", AUTOATTACK):
            pooled = pooled_difference([pair.outcomes(name) for pair in alike], name)
            if pooled:
                each = {p.seed: f.difference for p in alike if (f := p.difference(name))}
                measured = {"measure": name, "seeds": list(each)} | pooled.as_dict()
                yield alike[0].point | measured | {"spread": _spread(list(each.values()))}


def _reference(groups: Sequence[Group], density: float, baseline: str) -> Group | None:
    same = [group for group in groups if group.density == density]
    found = [group for group in same if baseline == group.configuration]
    found = found or [group for group in same if baseline == group.method]
    if len(found) > 1:
        names = ", ".join(group.configuration for group in found)
        raise ValueError(
            f"baseline {baseline!r} names several configurations; choose one of: {names}"
        )
    return found[0] if found else None


def _warnings(groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    """What stages warned of, and failed checks and flags of every evaluation."""
    for group in groups:
        for seed, run in group.runs.items():
            where = group.point | {"seed": seed}
            for stage, warnings in run.warnings.items():
                for warning in warnings:
                    yield where | {"model": STAGES[stage], "warning": warning}
            for model, evaluation in run.attacked.items():
                for name, check in evaluation.checks.items():
                    if not check.passed:
                        said = f"check '{name}' FAILED: {check.detail}"
                        yield where | {"model": model, "warning": said}
                for flag in evaluation.flags:
                    yield where | {"model": model, "warning": flag}


def _made(run: RunRecord, configuration: str) -> dict[str, Any]:
    return {
        "run": run.folder.name,
        "seed": run.recipe.get("seed"),
        "configuration": configuration,
        "density": run.section("budget").get("density"),
        "environment": _environment(run),
    }


def _environment(run: RunRecord) -> dict[str, Any]:
    """The run's, with the threads it took: records of earlier versions have the process's."""
    threads = run.section("execution").get("threads")
    found = [dict(run.environment), *run.environment.get("continued", [])]
    if threads is not None:
        found = [{**e, "machine": {**e.get("machine", {}), "threads": threads}} for e in found]
    first, *later = found
    return {**first, "continued": later} if later else first
