# SPDX-License-Identifier: Apache-2.0
"""Schedules against their closed forms, and the numbers of HARP's released code."""

from math import cos, pi

import pytest

from harprune.training.schedules import (
    SCHEDULES,
    constant,
    cosine,
    make_schedule,
    offset_cosine,
    one_cycle,
    steps,
)

PROGRESS = [n / 40 for n in range(41)]


def test_constant_is_one():
    assert {constant(p) for p in PROGRESS} == {1.0}


def test_cosine_is_half_a_period_from_one_to_zero():
    for p in PROGRESS:
        assert cosine(p) == pytest.approx((1 + cos(pi * p)) / 2, abs=1e-15)
    assert (cosine(0.0), cosine(0.5), cosine(1.0)) == pytest.approx((1.0, 0.5, 0.0), abs=1e-15)


@pytest.mark.parametrize("peak", [0.1, 0.3, 0.75])
def test_one_cycle_is_a_triangle(peak):
    for p in PROGRESS:
        assert one_cycle(p, peak=peak) == pytest.approx(min(p / peak, (1 - p) / (1 - peak)))
    assert (one_cycle(0.0), one_cycle(0.3), one_cycle(1.0)) == (0.0, 1.0, 0.0)


def test_steps_fall_at_half_and_three_quarters():
    assert [steps(p) for p in (0.0, 0.4999, 0.5, 0.7499, 0.75, 1.0)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )
    assert steps(0.95, at=(0.2, 0.5, 0.9), factor=0.5) == 0.125


def test_offset_cosine_gives_the_rates_of_the_authors():
    rates = [0.1 * offset_cosine(epoch / 20, epochs=20) for epoch in range(20)]
    assert rates[:2] == pytest.approx([0.09938, 0.1], abs=5e-6)
    assert rates[-1] == pytest.approx(0.00245, abs=5e-6)
    assert rates == pytest.approx([0.05 * (1 + cos(pi * (e - 1) / 20)) for e in range(20)])


@pytest.mark.parametrize(("epochs", "batches"), [(20, 391), (3, 7), (90, 10_009), (1, 1)])
def test_offset_cosine_holds_through_each_epoch(epochs, batches):
    total = epochs * batches
    for epoch in range(epochs):
        expected = 0.5 * (1 + cos(pi * (epoch - 1) / epochs))
        for batch in {0, batches // 2, batches - 1}:
            progress = (epoch * batches + batch) / total
            assert offset_cosine(progress, epochs=epochs) == pytest.approx(expected, abs=1e-12)
    # The end of training belongs to the last epoch.
    assert offset_cosine(1.0, epochs=epochs) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_by_name_stays_between_zero_and_one(name):
    schedule = make_schedule(name, epochs=5)
    assert schedule is SCHEDULES[name]
    assert all(0.0 <= schedule(p) <= 1.0 for p in PROGRESS)


def test_the_offset_is_a_form_of_the_cosine_alone():
    schedule = make_schedule("cosine", epochs=20, offset=True)
    assert [schedule(p) for p in PROGRESS] == [offset_cosine(p, epochs=20) for p in PROGRESS]
    with pytest.raises(ValueError, match=r"cosine_offset.*'steps'"):
        make_schedule("steps", epochs=20, offset=True)
