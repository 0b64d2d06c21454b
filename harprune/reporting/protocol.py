# SPDX-License-Identifier: Apache-2.0
"""What runs must have in common for a comparison of them to mean anything."""

from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

from harprune.nested import differences
from harprune.reporting.records import RunRecord
from harprune.reporting.tables import flatten

_FREE = ("name", "seed", "data.folder", "model.weights", "attack.dense", "attack.dense_size")
"""Keys in which recipes of one configuration and density may differ, beside those of execution."""


def protocol_of(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Data, model, threat and number of images, which all runs have in common.

    Raises:
        ValueError: they have not, other images were attacked, or a run is unfinished.
    """
    protocols = [_said_by(run) for run in runs]
    for run, protocol in zip(runs, protocols, strict=True):
        for key, value in protocol.items():
            if value != protocols[0][key]:
                ours, first = flatten(value), flatten(protocols[0][key])
                raise ValueError(
                    f"{run.folder} has {key} {ours} but {runs[0].folder} has {first}; "
                    "compare runs of one protocol"
                )
    _require_same_images(runs)
    # The architecture's usual width goes without saying.
    return {k: v for k, v in protocols[0].items() if k != "width" or v is not None}


def _require_same_images(runs: Sequence[RunRecord]) -> None:
    first = _images(runs[0])
    for run in runs[1:]:
        both = zip(_images(run), first, strict=True)
        if any(None not in (ours, theirs) and ours != theirs for ours, theirs in both):
            raise ValueError(
                f"{run.folder} was attacked on other test images than {runs[0].folder}; compare "
                "runs of the same images, with one attack.seed"
            )


def _images(run: RunRecord) -> tuple[Any, ...]:
    """What is known of the images attacked: positions and labels, and digests; else None."""
    outcomes, identity = run.attacked["finetuned"].outcomes, run.attacked["finetuned"].identity
    chosen = [outcomes[n].tolist() for n in ("index", "labels")] if outcomes else None
    return chosen, identity.get("data"), identity.get("images")


def _said_by(run: RunRecord) -> dict[str, Any]:
    if run.audit is None or "finetuned" not in run.attacked:
        lacking = [stage for stage in run.missing if stage != "attack/dense"]
        lacking = lacking or ["audit.json" if run.audit is None else "attack/finetuned"]
        raise ValueError(
            f"{run.folder} is not finished ({', '.join(lacking)} missing); finish it by the "
            "command that began it, or leave it out"
        )
    return {
        "data": run.section("data").get("name"),
        "model": run.section("model").get("name"),
        "width": run.section("model").get("width"),
        "threat": run.threat,
        "images": run.attacked["finetuned"].size,
    }


def uses_allocation(run: RunRecord, without_allocation: Container[str]) -> bool:
    """Whether the run's method, plug-ins aside, is none of those `without_allocation`."""
    return run.method.partition("+")[0] not in without_allocation


def require_alike(
    runs: Iterable[RunRecord], called: str, complete: Callable, without_allocation: Container[str]
) -> None:
    """Refuse runs of one configuration and density that differ in more than their seed.

    Args:
        called: what these runs all are, for the message.
        complete, without_allocation: see `compare_runs`.

    Raises:
        ValueError: an average over seeds would be one over different recipes.
    """
    first, *others = runs
    idle = () if uses_allocation(first, without_allocation) else ("budget.allocation",)
    for run in others:
        found = differences(complete(run.recipe), complete(first.recipe))
        for key, ours, theirs in found:
            if key in (*_FREE, *idle) or key.startswith("execution."):
                continue
            raise ValueError(
                f"{run.folder} has {key} = {ours!r} but {first.folder} has {theirs!r}, and both "
                f"are {called}; compare only runs that differ in their seed alone as one "
                "configuration"
            )
