# SPDX-License-Identifier: Apache-2.0
"""Paired differences against the arithmetic done image by image."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harprune.pairing import PairedDifference, paired_difference, pooled_difference

PAIRS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)


def outcomes(right: list[bool], **other) -> dict[str, np.ndarray]:
    count = len(right)
    fields = {"index": np.arange(count), "labels": np.zeros(count), "clean": np.array(right)}
    return fields | other


@given(PAIRS)
def test_difference_and_interval_equal_those_of_the_mean_of_differences(pairs):
    first, second = (list(side) for side in zip(*pairs, strict=True))
    paired = paired_difference(outcomes(first), outcomes(second), "clean")
    each = np.array(second, dtype=float) - np.array(first, dtype=float)
    # Agresti and Min add half an image to each of the four cells: two that agree, one each way.
    more, weight = np.append(each, [0.0, 1.0, -1.0]), np.append(np.ones(len(each)), [1, 0.5, 0.5])
    mean = np.average(more, weights=weight)
    spread = np.sqrt(np.average((more - mean) ** 2, weights=weight) / weight.sum())
    ends = (max(mean - 1.959963985 * spread, -1), min(mean + 1.959963985 * spread, 1))
    assert paired.difference == pytest.approx(each.mean())
    assert paired.interval == pytest.approx(ends, abs=1e-7)


@given(st.integers(0, 6), st.integers(0, 6))
def test_p_value_equals_the_count_over_all_sign_patterns(lost, won):
    n = lost + won
    patterns = [sum(signs) for signs in itertools.product((0, 1), repeat=n)]
    extreme = sum(abs(k - n / 2) >= abs(won - n / 2) for k in patterns) / len(patterns)
    assert PairedDifference(lost, won, 20).p_value == pytest.approx(extreme)


def test_many_discordant_images_do_not_overflow():
    assert 0 < PairedDifference(4700, 5300, 20000).p_value < 1e-8
    assert PairedDifference(5000, 5000, 20000).p_value == 1.0


@given(PAIRS)
def test_exchanging_the_models_changes_the_sign_alone(pairs):
    first, second = (list(side) for side in zip(*pairs, strict=True))
    there = paired_difference(outcomes(first), outcomes(second), "clean")
    back = paired_difference(outcomes(second), outcomes(first), "clean")
    assert there.difference == -back.difference
    assert there.interval == pytest.approx(tuple(-end for end in reversed(back.interval)))
    assert there.p_value == back.p_value


def test_other_images_are_not_paired():
    here = outcomes([True, False])
    assert paired_difference(here, None, "clean") is None
    assert paired_difference(here, here, "autoattack") is None
    assert paired_difference(here, outcomes([True, False], index=np.array([2, 3])), "clean") is None
    assert pooled_difference([(here, None)], "clean") is None


@given(PAIRS, st.data())
def test_only_the_images_of_both_are_paired(pairs, data):
    first, second = (np.array(side) for side in zip(*pairs, strict=True))
    whole = np.arange(len(first))
    parts = [np.array(data.draw(st.permutations(whole))) for _ in range(2)]
    parts = [part[: data.draw(st.integers(1, len(part)))] for part in parts]
    a, b = (
        outcomes(list(right[part]), index=part)
        for right, part in zip((first, second), parts, strict=True)
    )
    both = np.array(sorted(set(parts[0]) & set(parts[1])), dtype=int)
    if not len(both):
        assert paired_difference(a, b, "clean") is None
        return
    alone = [outcomes(list(right[both]), index=both) for right in (first, second)]
    assert paired_difference(a, b, "clean") == paired_difference(*alone, "clean")
    assert pooled_difference([(a, b)], "clean") == pooled_difference([tuple(alone)], "clean")


def test_other_labels_for_the_same_images_are_refused():
    with pytest.raises(ValueError, match="other labels to the same images"):
        paired_difference(
            outcomes([True, False]), outcomes([True, False], labels=np.ones(2)), "clean"
        )


@given(PAIRS)
def test_one_seed_pooled_is_one_pair(pairs):
    first, second = (outcomes(list(side)) for side in zip(*pairs, strict=True))
    pooled, paired = (
        pooled_difference([(first, second)], "clean"),
        paired_difference(first, second, "clean"),
    )
    assert pooled.difference == pytest.approx(paired.difference)
    assert pooled.interval == pytest.approx(paired.interval)


@given(PAIRS, st.integers(2, 5))
def test_seeds_that_agree_do_not_narrow_the_interval(pairs, seeds):
    first, second = (outcomes(list(side)) for side in zip(*pairs, strict=True))
    once = pooled_difference([(first, second)], "clean")
    often = pooled_difference([(first, second)] * seeds, "clean")
    assert often.difference == pytest.approx(once.difference)
    assert often.interval == pytest.approx(once.interval)


def test_seeds_on_other_images_count_as_more_images():
    rng = np.random.default_rng(0)
    a, b = (rng.random(400) < quality for quality in (0.5, 0.6))
    whole = pooled_difference([(outcomes(a), outcomes(b))], "clean")
    halves = [slice(0, 200), slice(200, 400)]
    parts = [
        tuple(outcomes(side[half], index=np.arange(400)[half]) for side in (a, b))
        for half in halves
    ]
    pooled = pooled_difference(parts, "clean")
    assert pooled.difference == pytest.approx(whole.difference)
    assert pooled.interval == pytest.approx(whole.interval)
