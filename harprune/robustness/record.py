# SPDX-License-Identifier: Apache-2.0
"""What an evaluation found: accuracies with their intervals, counted from each image's outcome."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from harprune.files import read_arrays, to_json, write, write_arrays
from harprune.intervals import wilson
from harprune.pairing import PairedDifference, paired_difference
from harprune.robustness.sanity import Check

WORST_CASE = "worst case"

REPEATED = 0.01
"""Fraction of images that may differ where an evaluation is repeated on another machine."""


@dataclass(frozen=True)
class Measure:
    """Accuracy on `size` images, in [0, 1].

    Attributes:
        interval: 95 % Wilson interval of the accuracy.
        balanced: mean over the classes of each class's accuracy.
        attack: what was run, as text; None for clean images.
        parts: for AutoAttack, the accuracy after each part.
    """

    accuracy: float
    interval: tuple[float, float]
    balanced: float
    correct: int
    size: int
    attack: str | None = None
    parts: dict[str, float] | None = None


@dataclass(frozen=True)
class Evaluation:
    """One model under attacks.

    Attributes:
        outcomes: "clean", each attack, and "attack:part" of AutoAttack -> bool (n,), still correct;
            "index" and "labels" -> int (n,).
        identity: what the outcomes depend on: model, attacked function, images, their choice and
            labels, seed, batch size and attacks.
    """

    model: str
    threat: str | None
    seed: int
    size: int
    clean: Measure
    attacks: dict[str, Measure]
    worst_case: Measure
    checks: dict[str, Check]
    flags: tuple[str, ...]
    identity: dict[str, str] = field(repr=False)
    outcomes: dict[str, np.ndarray] = field(repr=False, compare=False)

    def lines(self) -> list[str]:
        """The result as lines of text: accuracies, then flags and failed checks."""
        rows = {"clean": self.clean, **self.attacks}
        if len(self.attacks) > 1:
            rows[WORST_CASE] = self.worst_case
        failed = [f"check failed: {n}: {c.detail}" for n, c in self.checks.items() if not c.passed]
        return [
            *(_line(name, measure) for name, measure in rows.items()),
            *(f"flag: {flag}" for flag in self.flags),
            *failed,
        ]

    def outcome(self, name: str) -> np.ndarray:
        """The images still correct, bool (n,): clean, under an attack, or in the worst case."""
        rows = {**self.outcomes, WORST_CASE: worst_case_of(self.outcomes, self.attacks)}
        if name not in ("clean", WORST_CASE, *self.attacks):
            known = ", ".join(["clean", *self.attacks, WORST_CASE])
            raise ValueError(f"{name!r} was not evaluated; choose among {known}")
        return rows[name]


def count_outcomes(
    outcomes: Mapping[str, np.ndarray],
    row: str,
    attack: str | None = None,
    parts: dict[str, float] | None = None,
) -> Measure:
    """Accuracy in one row of outcomes; `attack` and `parts` as in Measure."""
    correct, labels = outcomes[row], outcomes["labels"]
    balanced = np.mean([correct[labels == label].mean() for label in np.unique(labels)])
    total, size = int(correct.sum()), len(correct)
    return Measure(total / size, wilson(total, size), float(balanced), total, size, attack, parts)


def worst_case_of(outcomes: Mapping[str, np.ndarray], attacks: Iterable[str]) -> np.ndarray:
    """The images, bool (n,), that stay correct clean and under every attack."""
    return np.logical_and.reduce([outcomes["clean"], *(outcomes[name] for name in attacks)])


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Write `outcomes.npz`, then `evaluation.json`, whose presence says that all is there."""
    record = asdict(evaluation)
    del record["outcomes"]
    write_arrays(folder / "outcomes.npz", evaluation.outcomes)
    write(folder / "evaluation.json", to_json(record))


def read_outcomes(path: Path, deleted: Path) -> dict[str, np.ndarray]:
    """The arrays of outcomes.npz or partial.npz.

    Raises:
        ValueError: a damaged file; it names the one that has to be `deleted` to start again.
    """
    try:
        return read_arrays(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); restore it, or delete {deleted} to start again"
        ) from None


def load_evaluation(folder: str | Path) -> Evaluation:
    """A finished evaluation from its folder.

    Raises:
        ValueError: the folder holds none, or a file in it is garbled.
    """
    folder = Path(folder)
    path = folder / "evaluation.json"
    if not path.exists():
        raise ValueError(f"{folder} holds no finished evaluation; run it to the end first")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["checks"] = {name: Check(**check) for name, check in record["checks"].items()}
        record["attacks"] = {name: _measure(m) for name, m in record["attacks"].items()}
        record |= {name: _measure(record[name]) for name in ("clean", "worst_case")}
        found = Evaluation(**record | {"flags": tuple(record["flags"]), "outcomes": {}})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is garbled ({error}); restore it, or delete it to start again"
        ) from None
    return replace(found, outcomes=read_outcomes(folder / "outcomes.npz", path))


def _measure(record: dict[str, Any]) -> Measure:
    return Measure(**{**record, "interval": tuple(record["interval"])})


def paired(a: Evaluation, b: Evaluation, name: str = WORST_CASE) -> PairedDifference:
    """How `b` differs from `a` under `name`: "clean", an attack, or "worst case".

    Raises:
        ValueError: the two are not of the same images, or give them other labels; one lacks the
            attack.
    """
    for each in (a, b):
        if not isinstance(each, Evaluation):
            raise ValueError(f"{each!r} is no evaluation; give what harprune.evaluate returned")
    first, second = ({**each.outcomes, name: each.outcome(name)} for each in (a, b))
    found = paired_difference(first, second, name)
    if found is None or not a.size == b.size == found.size:
        raise ValueError(
            f"{a.model} ({a.size} images) and {b.model} ({b.size} images) were not evaluated on "
            "the same images; evaluate both on the same subset"
        )
    return found


def differing(a: Evaluation, b: Evaluation) -> dict[str, int]:
    """Images that are right in one evaluation alone: clean, and under each attack of the first.

    Raises:
        ValueError: the two are not of the same images, or the second lacks an attack.
    """
    pairs = {name: paired(a, b, name) for name in ("clean", *a.attacks)}
    return {name: pair.lost + pair.won for name, pair in pairs.items()}


def _line(name: str, measure: Measure) -> str:
    low, high = (100 * end for end in measure.interval)
    text = f"{name} {100 * measure.accuracy:.2f} % [{low:.2f}, {high:.2f}] of {measure.size}"
    if measure.parts:
        text += " (" + ", ".join(f"{p} {100 * a:.2f}" for p, a in measure.parts.items()) + ")"
    return text
