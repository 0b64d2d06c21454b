# SPDX-License-Identifier: Apache-2.0
"""A run reduced to the numbers of its report: plain values, from which tables are made."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from math import floor
from typing import Any

from harprune.outcomes import WORST_CASE, Evaluation, Measure
from harprune.pairing import paired_difference
from harprune.reporting.records import ATTACKED, STAGES, Audit, RunRecord

AUTOATTACK = "autoattack"
"""The attack whose accuracy is called *the* robust accuracy."""


def summarise(run: RunRecord) -> dict[str, Any]:
    """Everything a report says about a run, as JSON values; what is not there yet is None."""
    return {
        "recipe": run.recipe.get("name", run.folder.name),
        "seed": run.recipe.get("seed"),
        "data": run.section("data").get("name"),
        "model": run.section("model").get("name"),
        "method": run.section("method").get("name"),
        "density": run.section("budget").get("density"),
        "cost": run.section("budget").get("cost", "parameters"),
        "multiply_adds": run.section("budget").get("multiply_adds"),
        "threat": run.threat,
        "missing": list(run.missing),
        "stages": {stage: _stage(run, stage) for stage in STAGES},
        "audit": _audit(run, run.audit) if run.audit else None,
        "results": _results(run.attacked),
        "checks": list(_checks(run)),
        "flags": [
            {"model": model, "flag": flag}
            for model, evaluation in run.attacked.items()
            for flag in evaluation.flags
        ],
        "warnings": [
            {"model": STAGES[stage], "warning": warning}
            for stage, warnings in run.warnings.items()
            for warning in warnings
        ],
        "environment": dict(run.environment),
    }


def measure_order(names: Iterable[str]) -> list[str]:
    """Names without repetition: clean, AutoAttack, the other attacks as they come, worst case."""
    place = {"clean": 0, AUTOATTACK: 1, WORST_CASE: 3}
    return sorted(dict.fromkeys(names), key=lambda name: place.get(name, 2))


def _stage(run: RunRecord, stage: str) -> dict[str, Any]:
    """Accuracies of the selected epoch (from 0), or of the last where none is known as that.

    `left` are those of the network that the stage left, which pruning cut to the budget after that
    epoch; None where an earlier version did not keep them.
    """
    epochs = run.of_stage(stage)
    last = epochs[-1] if epochs else None
    selected = next((epoch for epoch in epochs if epoch.selected), None)
    shown, left = selected or last, run.left.get(stage)
    return {
        "finished": stage in run.finished,
        "epochs": len(epochs),
        "selected": selected.epoch if selected else None,
        "clean": shown.clean if shown else None,
        "robust": shown.robust if shown else None,
        "left": asdict(left) if left else None,
        "passes": run.passes(stage) or None,
    }


def _audit(run: RunRecord, audit: Audit) -> dict[str, Any]:
    return {
        "denominator": audit.denominator,
        "total": audit.total,
        "kept": audit.kept,
        "budget": audit.budget,
        "bounds": list(_bounds(run, audit)),
        "density": audit.density,
        "layers": {
            name: {"total": layer.total, "kept": layer.kept, "density": layer.density}
            for name, layer in audit.layers.items()
        },
        "allocations": audit.allocations,
    }


def _bounds(run: RunRecord, audit: Audit) -> Iterator[dict[str, Any]]:
    """The budget in the unit it is in, and the second bound where there is one."""
    section = run.section("budget")
    cost, share = section.get("cost", "parameters"), section.get("multiply_adds")
    work = {name: int(count) for name, count in (audit.multiply_adds or {}).items()}
    units = {
        "parameters": audit.denominator,
        "multiply-adds": "multiply-adds",
        "mixed": "mixed units of weights and multiply-adds",
    }
    # Where an audit of an earlier version lacks `spent`, a mixed one cannot be found again.
    known = {"parameters": audit.kept, "multiply-adds": work.get("kept")}
    spent = known.get(cost) if audit.spent is None else audit.spent
    yield {"bound": "budget", "unit": units[cost], "spent": spent, "allowed": audit.budget}
    if share is not None and work:
        allowed = floor(share * work["dense"] + 1e-6)  # float error aside, as the budget's
        bound = {"bound": "budget.multiply_adds", "unit": "multiply-adds"}
        yield bound | {"spent": work["kept"], "allowed": allowed}


def _results(attacked: Mapping[str, Evaluation]) -> list[dict[str, Any]]:
    """Clean, AutoAttack, other attacks: the figures of each model and their difference."""
    order = [attacked[model] for model in reversed(ATTACKED) if model in attacked]
    names = measure_order(name for evaluation in order for name in evaluation.measures)
    return [_result(attacked, name) for name in names]


def _result(attacked: Mapping[str, Evaluation], name: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"measure": name}
    for model in ATTACKED:
        known = attacked[model].measures if model in attacked else {}
        entry[model] = _measure(known[name]) if name in known else None
    dense, finetuned = (attacked[m].outcomes if m in attacked else None for m in ATTACKED)
    paired = paired_difference(dense, finetuned, name)
    return entry | {"difference": paired.as_dict() if paired else None}


def _measure(measure: Measure) -> dict[str, Any]:
    return asdict(measure) | {"interval": list(measure.interval)}


def _checks(run: RunRecord) -> Iterable[dict[str, Any]]:
    """Checks of both evaluations and of the budget; those that failed come first."""
    found = [
        {"model": model, "check": name, "passed": check.passed, "detail": check.detail}
        for model, evaluation in run.attacked.items()
        for name, check in evaluation.checks.items()
    ]
    for bound in _bounds(run, run.audit) if run.audit else ():
        spent, allowed = bound["spent"], bound["allowed"]
        if spent is not None:
            detail = f"{spent:,} of {allowed:,} allowed {bound['unit']} kept"
            check = {"model": "pruned", "check": bound["bound"], "passed": spent <= allowed}
            found.append(check | {"detail": detail})
    return sorted(found, key=lambda check: check["passed"])
