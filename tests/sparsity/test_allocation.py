# SPDX-License-Identifier: Apache-2.0
"""Allocations against naive oracles; apportionment against its definition."""

import json
from math import floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harprune.sparsity.allocation import (
    Bound,
    Explicit,
    apportion,
    erk,
    global_magnitude,
    igq,
    lamp,
    read_allocation,
    uniform,
)
from tests.oracles.naive_allocation import naive_erk, naive_global, naive_igq, naive_lamp

SHAPES = {"stem": (8, 3, 3, 3), "middle": (16, 8, 3, 3), "wide": (32, 16, 3, 3), "head": (10, 32)}


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(3)
    return {
        n: torch.randn(s, generator=generator) / (i + 1) for i, (n, s) in enumerate(SHAPES.items())
    }


def counts_of(densities, weights):
    return {n: densities[n] * w.numel() for n, w in weights.items()}


@pytest.mark.parametrize("density", [0.5, 0.1, 0.02])
@pytest.mark.parametrize("allocation", [uniform, erk, igq, lamp, global_magnitude])
def test_the_layers_share_exactly_the_global_density(allocation, density, weights):
    total = sum(w.numel() for w in weights.values())
    kept = sum(counts_of(allocation(weights, density), weights).values())
    assert kept == pytest.approx(density * total, abs=1.0)


@pytest.mark.parametrize("density", [0.5, 0.1, 0.02])
def test_erk_and_igq_equal_their_naive_forms(density, weights):
    expected = naive_erk(SHAPES, density)
    assert erk(weights, density) == pytest.approx(expected, rel=1e-6)
    sizes = {n: w.numel() for n, w in weights.items()}
    assert igq(weights, density) == pytest.approx(naive_igq(sizes, density), rel=1e-6)


@pytest.mark.parametrize("density", [0.5, 0.1, 0.02])
@pytest.mark.parametrize(
    ("allocation", "naive"), [(lamp, naive_lamp), (global_magnitude, naive_global)]
)
def test_lamp_and_global_equal_their_naive_forms(allocation, naive, density, weights):
    values = {n: w.flatten().tolist() for n, w in weights.items()}
    count = floor(density * sum(map(len, values.values())))
    kept = {n: round(c) for n, c in counts_of(allocation(weights, density), weights).items()}
    assert kept == naive(values, count)


def test_erk_keeps_a_small_layer_dense_and_spends_the_rest_elsewhere(weights):
    shares = erk(weights, 0.5)
    assert shares["stem"] == 1.0
    assert shares["wide"] < 0.5


def test_global_magnitude_may_empty_a_layer_and_says_so_with_a_zero(weights):
    weights["head"] = weights["head"] * 1e-6
    assert global_magnitude(weights, 0.1)["head"] == 0.0


def test_explicit_densities_go_through_a_file(tmp_path, weights):
    path = tmp_path / "densities.json"
    path.write_text(json.dumps(erk(weights, 0.2)))
    assert read_allocation(path)(weights, 0.2) == pytest.approx(erk(weights, 0.2))


def test_explicit_densities_are_scaled_to_the_density_asked_for(weights):
    shares = Explicit(dict.fromkeys(weights, 0.5))(weights, 0.1)
    assert shares == pytest.approx(dict.fromkeys(weights, 0.1))


@pytest.mark.parametrize(
    ("densities", "message"),
    [({"stem": 0.1}, "3 .* missing"), ({**dict.fromkeys(SHAPES, 0.1), "x": 0.1}, "x"),
     ({**dict.fromkeys(SHAPES, 0.1), "stem": 1.5}, "1.5 of stem")],
)  # fmt: skip
def test_explicit_densities_that_do_not_fit_are_refused(densities, message, weights):
    with pytest.raises(ValueError, match=message):
        Explicit(densities)(weights, 0.1)


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": "0.5"}', '{"a": true}', "[" * 100_000])
def test_a_file_that_is_no_allocation_is_refused(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not an allocation"):
        read_allocation(path)


@pytest.mark.parametrize("density", [0.0, 1.5, -0.1])
def test_a_density_outside_its_range_is_refused(density, weights):
    with pytest.raises(ValueError, match="must lie in"):
        erk(weights, density)


LAYER = st.tuples(st.integers(1, 5000), st.floats(1e-4, 1.0))


@settings(max_examples=200, deadline=None)
@given(st.lists(LAYER, min_size=1, max_size=12), st.floats(0.01, 0.99))
def test_apportioned_counts_sum_to_the_budget_whatever_the_densities_were(layers, density):
    units = {str(i): n for i, (n, _) in enumerate(layers)}
    densities = {str(i): a for i, (_, a) in enumerate(layers)}
    budget = max(floor(density * sum(units.values())), len(units))
    counts = apportion(densities, units, Bound(budget, dict.fromkeys(units, 1)))
    assert sum(counts.values()) == min(budget, sum(units.values()))
    assert all(1 <= counts[n] <= units[n] for n in units)


PRICED = st.lists(st.tuples(LAYER, st.integers(1, 64), st.integers(1, 64)), min_size=1, max_size=12)
SHARE = st.floats(0.05, 0.95)


@settings(max_examples=200, deadline=None)
@given(PRICED, st.lists(SHARE, min_size=1, max_size=2))
def test_bounds_are_kept_and_leave_no_room_for_a_unit(layers, shares):
    units = {str(i): n for i, ((n, _), *_) in enumerate(layers)}
    densities = {str(i): a for i, ((_, a), *_) in enumerate(layers)}
    bounds = []
    for number, share in enumerate(shares, start=1):
        price = {str(i): layer[number] for i, layer in enumerate(layers)}
        total = sum(units[n] * price[n] for n in units)
        bounds.append(Bound(max(floor(share * total), sum(price.values())), price))
    counts = apportion(densities, units, *bounds)
    left = [bound.budget - bound.cost(counts) for bound in bounds]
    assert min(left) >= 0
    for n in units:
        fits = all(bound.price[n] <= rest for bound, rest in zip(bounds, left, strict=True))
        assert counts[n] == units[n] or not fits
    # What was learned under these counts is what is settled.
    assert apportion({n: counts[n] / units[n] for n in units}, units, *bounds) == counts


def test_floors_dearer_than_the_budget_are_refused():
    with pytest.raises(ValueError, match="budget of 5 is below 8"):
        apportion(
            {"a": 0.5, "b": 0.5},
            {"a": 10, "b": 10},
            Bound(5, {"a": 1, "b": 1}),
            minimum={"a": 4, "b": 4},
        )
