# SPDX-License-Identifier: Apache-2.0
"""Two models on the same images: the difference of their accuracies, sharpened by pairing."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from harprune.intervals import Z, mcnemar, paired_interval

Outcomes = Mapping[str, np.ndarray] | None
"""Arrays (n,) by name: "index" and "labels" of the images, bool whether right in each outcome."""


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of the second model minus that of the first, on the `size` images of both.

    Attributes:
        lost: images only the first has right (b10).
        won: images only the second has right (b01).
    """

    lost: int
    won: int
    size: int

    @property
    def difference(self) -> float:
        return (self.won - self.lost) / self.size

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the difference (Agresti & Min 2005)."""
        return paired_interval(self.lost, self.won, self.size)

    @property
    def p_value(self) -> float:
        """Exact two-sided McNemar test: is a discordant image as likely lost as won?"""
        return mcnemar(self.lost, self.won)

    def as_dict(self) -> dict:
        return {
            "difference": self.difference,
            "interval": list(self.interval),
            "lost": self.lost,
            "won": self.won,
            "size": self.size,
            "p_value": self.p_value,
        }


@dataclass(frozen=True)
class PooledDifference:
    """Accuracy of the second models minus that of the first, over pairs of several seeds.

    Attributes:
        difference: mean over all pairs of an image and a seed.
        interval: 95 %, over images: those of one image go together through all seeds, so it does
            not shrink with seeds that agree. Of one seed it is that of `PairedDifference`.
    """

    difference: float
    interval: tuple[float, float]

    def as_dict(self) -> dict:
        return {"difference": self.difference, "interval": list(self.interval)}


def paired_difference(first: Outcomes, second: Outcomes, name: str) -> PairedDifference | None:
    """The difference in outcome `name`, on the images of both; None where there is none.

    Raises:
        ValueError: the two give other labels to an image.
    """
    found = _paired(first, second, name)
    if found is None:
        return None
    _, a, b = found
    return PairedDifference(int((a & ~b).sum()), int((~a & b).sum()), len(a))


def pooled_difference(
    pairs: Sequence[tuple[Outcomes, Outcomes]], name: str
) -> PooledDifference | None:
    """The difference in outcome `name` over seeds, (first, second) of each, on the images of both.

    None where no seed has such images.

    Raises:
        ValueError: the two of a seed give other labels to an image.
    """
    found = [pair for a, b in pairs if (pair := _paired(a, b, name))]
    if not found:
        return None
    images = np.concatenate([index for index, _, _ in found])
    each = np.concatenate([b.astype(float) - a.astype(float) for _, a, b in found])
    _, image = np.unique(images, return_inverse=True)
    sums, counts = np.bincount(image, each), np.bincount(image)
    # The half images of Agresti and Min, as many seeds of them as a real one has.
    seeds = len(images) / len(counts)
    total = len(images) + 2 * seeds
    mean = sums.sum() / total
    spread = ((sums - mean * counts) ** 2).sum()
    spread += seeds**2 * (mean**2 + ((1 - mean) ** 2 + (1 + mean) ** 2) / 2)
    half = Z * math.sqrt(spread) / total
    return PooledDifference(float(each.mean()), (max(mean - half, -1.0), min(mean + half, 1.0)))


def _paired(
    first: Outcomes, second: Outcomes, name: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """The index of the images that both have, and whether each has them right: three (m,)."""
    if first is None or second is None or name not in first or name not in second:
        return None
    index, here, there = np.intersect1d(
        first["index"], second["index"], assume_unique=True, return_indices=True
    )
    if not np.array_equal(first["labels"][here], second["labels"][there]):
        raise ValueError(
            "two evaluations give other labels to the same images; compare those of one data set"
        )
    return (index, first[name][here], second[name][there]) if len(index) else None
