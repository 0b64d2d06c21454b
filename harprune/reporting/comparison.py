# SPDX-License-Identifier: Apache-2.0
"""Several runs side by side under one protocol: seeds averaged, methods compared image by image."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from harprune.outcomes import Evaluation, Measure
from harprune.reporting.baseline import paired_rows, pairs_with, pooled_rows
from harprune.reporting.groups import DENSE, Group, configuration_of, groups_of, spread_of
from harprune.reporting.protocol import protocol_of, require_alike
from harprune.reporting.records import STAGES, RunRecord, read_run
from harprune.reporting.summary import measure_order


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
    labels = labels or [configuration_of(run, without_allocation) for run in runs]
    took = dict(zip((run.folder for run in runs), seconds or [None] * len(runs), strict=True))
    groups = groups_of(runs, labels, took)
    for group in groups:
        called = f"{group.configuration} at density {group.density}"
        require_alike(group.runs.values(), called, complete, without_allocation)
    pairs = [] if baseline is None else list(pairs_with(groups, baseline))
    return {
        "protocol": protocol,
        "rows": [*_dense_rows(runs), *map(_row, groups)],
        "baseline": baseline,
        "paired": list(paired_rows(pairs)),
        "pooled": list(pooled_rows(pairs)),
        "warnings": list(_warnings(groups)),
        "runs": [_made(run, label) for run, label in zip(runs, labels, strict=True)],
    }


def _row(group: Group) -> dict[str, Any]:
    runs = group.runs.values()
    audits = [run.audit for run in runs if run.audit]
    finetuned = {seed: run.attacked["finetuned"] for seed, run in group.runs.items()}
    return group.point | {
        "method": group.method,
        "seeds": list(group.runs),
        "images": sorted({evaluation.size for evaluation in finetuned.values()}),
        "measures": _measures({seed: e.measures for seed, e in finetuned.items()}),
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
    seeds = [seed for known in networks for seed in {run.seed for run in known}]
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
        known[0].seed: _widest(run.attacked[DENSE] for run in known if DENSE in run.attacked)
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


def _dense_network(run: RunRecord) -> Any:
    """What tells dense networks apart; by their results where an earlier version kept no digest.

    None of a network that nobody was to attack, nor gave to the run.
    """
    if DENSE not in run.attacked:
        return run.began_with
    evaluation = run.attacked[DENSE]
    counted = ((name, m.correct, m.size) for name, m in evaluation.measures.items())
    return evaluation.identity.get("model") or (run.seed, *counted)


def _measures(known: Mapping[int, Mapping[str, Measure]]) -> dict[str, Any]:
    """Mean and sample standard deviation of each accuracy, over those of the seeds that have it."""
    found: dict[str, dict[int, float]] = {}
    for seed, measures in known.items():
        for name, measure in measures.items():
            found.setdefault(name, {})[seed] = measure.accuracy
    return {name: _statistics(found[name]) for name in measure_order(found)}


def _statistics(values: Mapping[int, float]) -> dict[str, Any]:
    each = list(values.values())
    return {"seeds": list(values), "values": each, "mean": fmean(each), "spread": spread_of(each)}


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
