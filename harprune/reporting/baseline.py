# SPDX-License-Identifier: Apache-2.0
"""Each configuration against a baseline: on the same images, with each seed and over all."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from harprune.outcomes import Evaluation
from harprune.pairing import Outcomes, PairedDifference, paired_difference, pooled_difference
from harprune.reporting.groups import DENSE, Group, spread_of
from harprune.reporting.records import RunRecord
from harprune.reporting.summary import AUTOATTACK


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


def pairs_with(groups: Sequence[Group], baseline: str) -> Iterator[Pair]:
    """Each configuration against the baseline of its density, seed by seed.

    Where the baseline is pruned, the dense network that it began with stands in its own place.

    Raises:
        ValueError: the baseline is unknown, or a method with several configurations.
    """
    names = [DENSE, *dict.fromkeys(n for g in groups for n in (g.method, g.configuration))]
    if baseline not in names:
        raise ValueError(
            f"baseline {baseline!r} is not among the runs; choose one of: {', '.join(names)}"
        )
    for group in groups:
        reference = None if baseline == DENSE else _reference(groups, group.density, baseline)
        for seed, run in group.runs.items():
            ours, dense = [run.attacked["finetuned"]], _dense_of(run, groups)
            name, first, second = group.configuration, dense, ours
            if reference is group:
                name, first, second = DENSE, ours, dense
            elif baseline != DENSE:
                beside = reference.runs.get(seed) if reference else None
                first = [beside.attacked["finetuned"]] if beside else []
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


def paired_rows(pairs: Iterable[Pair]) -> Iterator[dict[str, Any]]:
    """The difference to the baseline with each seed."""
    for pair in pairs:
        for name in ("clean", AUTOATTACK):
            if found := pair.difference(name):
                yield pair.point | {"seed": pair.seed, "measure": name} | found.as_dict()


def pooled_rows(pairs: Iterable[Pair]) -> Iterator[dict[str, Any]]:
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
                yield alike[0].point | measured | {"spread": spread_of(list(each.values()))}
