# SPDX-License-Identifier: Apache-2.0
"""Threat models: projections, starts, steepest ascent, and reading a radius."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harprune.robustness.threat import L2, Linf, make_threat, parse_epsilon

SHAPES = [(4, 3, 5, 6), (3, 7), (1, 1, 2, 2, 2), (5, 1)]
THREATS = [Linf(0.1), Linf(8 / 255), L2(0.5), L2(3.0)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("threat", THREATS, ids=repr)
@given(seed=st.integers(0, 2**30), reach=st.sampled_from([0.0, 0.01, 1.0, 100.0]))
def test_a_projection_is_allowed_and_final(threat, shape, seed, reach):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator, dtype=torch.float64).round(decimals=1)
    far = x + reach * torch.randn(shape, generator=generator, dtype=torch.float64)
    near = threat.project(far, x)
    assert near.min() >= 0 and near.max() <= 1
    assert (threat.distance(near, x) <= threat.epsilon * (1 + 1e-12)).all()
    assert torch.allclose(threat.project(near, x), near, rtol=0, atol=1e-12)
    assert torch.allclose(threat.project(x, x), x, rtol=0, atol=0)


@pytest.mark.parametrize("threat", THREATS, ids=repr)
def test_clip_gives_the_nearest_point_of_the_ball(threat):
    noise = torch.randn(6, 3, 4, dtype=torch.float64)
    clipped = threat.clip(noise)
    zero = torch.zeros_like(noise)
    assert (threat.distance(clipped, zero) <= threat.epsilon + 1e-12).all()
    for _ in range(200):
        other = threat.clip(noise + torch.randn_like(noise))
        assert (
            (other - noise).flatten(1).norm(dim=1) >= (clipped - noise).flatten(1).norm(dim=1)
        ).all()


@pytest.mark.parametrize("start", ["random_start", "boundary_start"])
@pytest.mark.parametrize("threat", THREATS, ids=repr)
def test_starts_are_allowed_fill_the_ball_and_follow_the_seed(threat, start):
    x = torch.full((400, 2, 2), 0.5)
    torch.manual_seed(3)
    first = getattr(threat, start)(x)
    torch.manual_seed(3)
    assert torch.equal(getattr(threat, start)(x), first)
    assert first.min() >= 0 and first.max() <= 1
    distance = threat.distance(first, x)
    assert distance.max() <= threat.epsilon * (1 + 1e-5)
    assert ((first - x).mean().abs() < 0.1 * threat.epsilon).item()
    small = threat.epsilon < 0.5
    if start == "boundary_start" and small:
        assert torch.allclose(distance, torch.full_like(distance, threat.epsilon))


def test_the_uniform_start_of_l2_is_uniform_in_the_ball():
    x = torch.full((20_000, 3), 0.5, dtype=torch.float64)
    radius = L2(0.4).distance(L2(0.4).random_start(x), x) / 0.4
    # The share inside half the radius is 2^-dimensions.
    assert abs((radius < 0.5).double().mean().item() - 1 / 8) < 0.01


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5)], ids=repr)
def test_ascent_is_the_best_step_of_unit_length(threat):
    gradient = torch.randn(5, 3, 4, dtype=torch.float64)
    best = threat.ascent(gradient)
    zero = torch.zeros_like(best)
    assert torch.allclose(threat.distance(best, zero), torch.ones(5, dtype=torch.float64))
    gain = (best * gradient).flatten(1).sum(1)
    for _ in range(200):
        step = torch.randn_like(gradient)
        step = step / threat.distance(step, zero)[:, None, None]
        assert ((step * gradient).flatten(1).sum(1) <= gain + 1e-12).all()


def test_ascent_survives_gradients_whose_squares_underflow():
    gradient = torch.zeros(2, 3, 4)
    gradient[0, 0, 0], gradient[0, 1, 1] = 3e-30, 4e-30
    step = L2(1.0).ascent(gradient)
    assert step[0].norm().item() == pytest.approx(1.0)
    assert step[0, 0, 0].item() == pytest.approx(0.6)
    assert not step[1].any()


@pytest.mark.parametrize(
    ("text", "value"),
    [("8/255", 8 / 255), ("0.031", 0.031), (0.03, 0.03), (" 4 / 255 ", 4 / 255), (1, 1.0)],
)
def test_a_radius_is_read(text, value):
    assert parse_epsilon(text) == value
    assert make_threat("linf", text) == Linf(value)


@pytest.mark.parametrize(
    "text",
    ["8/0", "abc", "", "1/2/3", "-8/255", -0.1, 0, "0", "nan", float("nan"), "inf", None, "/"],
)
def test_a_wrong_radius_is_refused_in_one_line(text):
    with pytest.raises(ValueError, match="epsilon") as caught:
        parse_epsilon(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [Linf, L2])
def test_a_radius_that_is_no_number_is_refused(kind):
    with pytest.raises(ValueError, match="epsilon = '8/255' is not a number; give one such a"):
        kind("8/255")


def test_a_radius_in_the_unit_of_bytes_is_refused_for_linf_only():
    with pytest.raises(ValueError, match="8/255"):
        Linf(8)
    assert L2(8).epsilon == 8
    for kind in (Linf, L2):
        for epsilon in (0, -1, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="epsilon"):
                kind(epsilon)


def test_norms_are_known_by_name():
    assert make_threat("l2", "1/2") == L2(0.5)
    assert make_threat("linf", 0.1) == Linf(0.1)
