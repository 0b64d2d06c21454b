# SPDX-License-Identifier: Apache-2.0
"""Intervals and tests against brute force and published values."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harprune.intervals import Z, mcnemar, paired_interval, wilson


@pytest.mark.parametrize(
    ("correct", "size", "low", "high"),
    # Newcombe 1998, table I, method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_matches_the_published_table(correct, size, low, high):
    assert wilson(correct, size) == pytest.approx((low, high), abs=5e-5)


@given(size=st.integers(1, 10_000), share=st.floats(0, 1))
def test_wilsons_ends_solve_its_equation(size, share):
    correct = round(share * size)
    low, high = wilson(correct, size)
    assert 0 <= low <= correct / size <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            gap = Z * math.sqrt(end * (1 - end) / size)
            assert abs(correct / size - end) == pytest.approx(gap, rel=1e-6, abs=1e-9)


@given(b=st.integers(0, 60), c=st.integers(0, 60))
def test_mcnemar_is_the_binomial_test(b, c):
    n = b + c
    likely = [math.comb(n, k) / 2**n for k in range(n + 1)]
    expected = min(1.0, 2 * sum(likely[: min(b, c) + 1]))
    assert mcnemar(b, c) == pytest.approx(expected)


def test_mcnemar_stays_exact_on_a_whole_test_set():
    assert mcnemar(5000, 5000) == 1.0
    assert mcnemar(4000, 6000) == pytest.approx(0, abs=1e-80)
    assert mcnemar(0, 10) == 2 / 1024


def test_the_paired_interval_covers_as_often_as_it_says():
    draw, inside, trials = random.Random(1), 0, 2000
    for _ in range(trials):
        cells = [draw.random() for _ in range(200)]
        b, c = sum(u < 0.05 for u in cells), sum(0.05 <= u < 0.15 for u in cells)
        low, high = paired_interval(b, c, 200)
        inside += low <= 0.05 <= high
    assert 0.93 < inside / trials < 0.97


def test_the_paired_interval_is_never_empty_and_turns_with_its_sides():
    assert paired_interval(0, 0, 50)[0] < 0 < paired_interval(0, 0, 50)[1]
    low, high = paired_interval(3, 9, 100)
    assert paired_interval(9, 3, 100) == pytest.approx((-high, -low))
    assert paired_interval(4, 0, 4)[0] >= -1 and paired_interval(0, 4, 4)[1] <= 1
