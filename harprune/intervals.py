# SPDX-License-Identifier: Apache-2.0
"""How sure an accuracy is, and the difference of two accuracies on the same images."""

import math

Z = 1.959963984540054
"""The normal quantile of a two-sided 95 % interval."""


def wilson(correct: int, size: int) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927), inside [0, 1]; `size` is at least 1."""
    rate, spread = correct / size, Z * Z / size
    centre = (rate + spread / 2) / (1 + spread)
    half = math.sqrt(rate * (1 - rate) * spread + spread * spread / 4) / (1 + spread)
    low = 0.0 if correct == 0 else centre - half
    high = 1.0 if correct == size else centre + half
    return low, high


def paired_interval(only_first: int, only_second: int, size: int) -> tuple[float, float]:
    """95 % interval of `(only_second - only_first) / size` (Agresti & Min 2005), inside [-1, 1].

    Wald's interval after half an image is added to each cell of the 2 x 2 table: it keeps its
    level where the two agree on nearly every image, and is never empty.
    """
    total, gap = size + 2, only_second - only_first
    half = Z * math.sqrt(only_first + only_second + 1 - gap * gap / total) / total
    return max(gap / total - half, -1.0), min(gap / total + half, 1.0)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p that two classifiers err alike, given the images one alone has right."""
    trials, least = only_first + only_second, min(only_first, only_second)
    term = tail = 1
    for k in range(least):
        term = term * (trials - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**trials)
