# SPDX-License-Identifier: Apache-2.0
"""Two models on the same images: the difference of their accuracies, sharpened by pairing."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from harprune.intervals import Z, mcnemar, paired_interval


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of the second model minus that of the first, on `size` images.

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


def paired_difference(
    first: Mapping[str, np.ndarray] | None, second: Mapping[str, np.ndarray] | None, name: str
) -> PairedDifference | None:
    """The difference in outcome `name`; None where the two were not measured on the same images.

    Args:
        first, second: arrays (n,) of outcomes.npz: "index", "labels", bool outcomes by name.
    """
    if first is None or second is None or name not in first or name not in second:
        return None
    if not np.array_equal(first["index"], second["index"]):
        return None
    if not np.array_equal(first["labels"], second["labels"]):
        raise ValueError(
            "two evaluations give other labels to the same images; compare runs of one data set"
        )
    a, b = first[name].astype(bool), second[name].astype(bool)
    return PairedDifference(int((a & ~b).sum()), int((~a & b).sum()), len(a))


def pooled_difference(
    pairs: Sequence[tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]], name: str
) -> PooledDifference:
    """The difference in outcome `name` over seeds, each pair measured on the same images.

    Args:
        pairs: of a seed, (first, second) as `paired_difference` takes them; one or more.
    """
    images = np.concatenate([first["index"] for first, _ in pairs])
    each = np.concatenate([b[name].astype(float) - a[name].astype(float) for a, b in pairs])
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
