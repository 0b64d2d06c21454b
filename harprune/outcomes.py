# SPDX-License-Identifier: Apache-2.0
"""What an evaluation found: accuracies with their intervals, counted from each image's outcome.

Attacks write it, reports read it, and a folder keeps it as `evaluation.json` and `outcomes.npz`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, field, replace
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked

from harprune.files import garbled, parsed, read_arrays, to_json, write, write_arrays
from harprune.intervals import wilson
from harprune.pairing import PairedDifference, paired_difference

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]

WORST_CASE = "worst case"
"""An image counts when it withstands every attack."""

REPEATED = 0.01
"""Fraction of images that may differ where an evaluation is repeated on another machine."""

_RECORD = "evaluation.json"
_ANEW = f"restore it, or delete {_RECORD} and repeat the command, which attacks anew"

_STRICT = ConfigDict(extra="ignore", strict=True, arbitrary_types_allowed=True)


@checked(frozen=True, config=_STRICT)
class Check:
    """Whether one sanity check passed, and what was seen."""

    passed: bool
    detail: str = ""


@checked(frozen=True, config=_STRICT)
class Measure:
    """Accuracy on `size` images, in [0, 1].

    Attributes:
        interval: 95 % Wilson interval of the accuracy.
        balanced: mean over the classes of each class's accuracy.
        attack: what was run, as text; None for clean images.
        parts: for AutoAttack, the accuracy after each part.
    """

    accuracy: Fraction
    interval: tuple[float, float]
    balanced: Fraction
    correct: Count
    size: Annotated[int, Field(ge=1)]
    attack: str | None = None
    parts: dict[str, Fraction] | None = None

    def __post_init__(self) -> None:
        if abs(self.correct / self.size - self.accuracy) > 1e-4:
            raise ValueError(f"accuracy {self.accuracy} is not correct {self.correct}/{self.size}")


@checked(frozen=True, config=_STRICT)
class Evaluation:
    """One model under attacks.

    Attributes:
        identity: what the outcomes depend on: model, attacked function, images, their choice and
            labels, seed, batch size and attacks.
        outcomes: "clean", each attack, "attack:part" of AutoAttack and "worst case" -> bool (n,),
            still correct; "index" and "labels" -> int (n,). Empty where a folder has lost them.
    """

    model: str
    threat: str | None
    seed: int
    size: Count
    clean: Measure
    attacks: dict[str, Measure]
    worst_case: Measure
    checks: dict[str, Check]
    flags: tuple[str, ...]
    identity: dict[str, str] = field(default_factory=dict, repr=False)
    outcomes: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @property
    def measures(self) -> dict[str, Measure]:
        """Clean accuracy, every attack and, of several attacks, the worst case, by name."""
        several = {WORST_CASE: self.worst_case} if len(self.attacks) > 1 else {}
        return {"clean": self.clean, **self.attacks, **several}

    def lines(self) -> list[str]:
        """The result as lines of text: accuracies, then flags and failed checks."""
        failed = [f"check failed: {n}: {c.detail}" for n, c in self.checks.items() if not c.passed]
        return [
            *(_line(name, measure) for name, measure in self.measures.items()),
            *(f"flag: {flag}" for flag in self.flags),
            *failed,
        ]

    def outcome(self, name: str) -> np.ndarray:
        """The images still correct, bool (n,): clean, under an attack, or in the worst case."""
        if name not in ("clean", WORST_CASE, *self.attacks):
            known = ", ".join(["clean", *self.attacks, WORST_CASE])
            raise ValueError(f"{name!r} was not evaluated; choose among {known}")
        return self.outcomes[name]


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


def with_worst_case(
    outcomes: Mapping[str, np.ndarray], attacks: Iterable[str]
) -> dict[str, np.ndarray]:
    """`outcomes` with the images that stay correct clean and under every attack."""
    rows = [outcomes["clean"], *(outcomes[name] for name in attacks)]
    return {**outcomes, WORST_CASE: np.logical_and.reduce(rows)}


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Write `outcomes.npz`, then `evaluation.json`, whose presence says that all is there."""
    record = asdict(evaluation)
    outcomes = record.pop("outcomes")
    del outcomes[WORST_CASE]
    write_arrays(folder / "outcomes.npz", outcomes)
    write(folder / _RECORD, to_json(record))


def read_evaluation(folder: str | Path) -> Evaluation:
    """A finished evaluation from its folder; without outcomes where `outcomes.npz` is lost.

    Raises:
        ValueError: the folder holds none, or a file in it is garbled.
    """
    path = Path(folder) / _RECORD
    if not path.exists():
        raise ValueError(f"{folder} holds no finished evaluation; run it to the end first")
    found = parsed(Evaluation, path.read_bytes(), path, _ANEW)
    path = path.with_name("outcomes.npz")
    return replace(found, outcomes=_read_outcomes(path, found)) if path.exists() else found


def load_evaluation(folder: str | Path) -> Evaluation:
    """As `read_evaluation`; raises ValueError where the outcomes are lost, too."""
    found = read_evaluation(folder)
    if not found.outcomes:
        raise ValueError(f"{Path(folder) / 'outcomes.npz'} is missing; {_ANEW}")
    return found


def _read_outcomes(path: Path, evaluation: Evaluation) -> dict[str, np.ndarray]:
    """Arrays that agree with the evaluation's counts."""
    try:
        arrays = read_arrays(path)
    except (OSError, ValueError) as error:
        raise garbled(path, str(error), _ANEW) from None
    if lacking := {"index", "labels", "clean", *evaluation.attacks} - arrays.keys():
        raise garbled(path, f"it lacks {', '.join(sorted(lacking))}", _ANEW)
    if len({array.shape for array in arrays.values()}) > 1 or arrays["index"].ndim != 1:
        raise garbled(path, "its arrays differ in length", _ANEW)
    outcomes = with_worst_case(arrays, evaluation.attacks)
    for name, measure in evaluation.measures.items():
        correct = int(outcomes[name].sum())
        if correct != measure.correct:
            counted = f"{correct} correct under {name} where {_RECORD} says {measure.correct}"
            raise garbled(path, counted, _ANEW)
    return outcomes


def paired(a: Evaluation, b: Evaluation, name: str = WORST_CASE) -> PairedDifference:
    """How `b` differs from `a` under `name`: "clean", an attack, or "worst case".

    Raises:
        ValueError: the two are not of the same images, or give them other labels; one lacks the
            attack.
    """
    for each in (a, b):
        if not isinstance(each, Evaluation):
            raise ValueError(f"{each!r} is no evaluation; give what harprune.evaluate returned")
        each.outcome(name)
    found = paired_difference(a.outcomes, b.outcomes, name)
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
