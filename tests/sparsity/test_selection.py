# SPDX-License-Identifier: Apache-2.0
"""The straight-through selection against its definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harprune.sparsity import selection
from harprune.sparsity.selection import keep_top, keep_top_at, kept_count, top_fraction


def naive_keep(scores, count):
    order = sorted(range(len(scores)), key=lambda i: (-abs(scores[i]), i))
    return [float(i in order[:count]) for i in range(len(scores))]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=60), st.data())
def test_the_count_is_exact_and_ties_go_to_the_lower_index(values, data):
    count = data.draw(st.integers(0, len(values)))
    mask = keep_top(torch.tensor(values, dtype=torch.float64), count)
    assert mask.tolist() == naive_keep(values, count)


def test_the_mask_has_the_shape_and_type_of_the_scores():
    scores = torch.randn(4, 3, 2, 2)
    mask = keep_top(scores, 7)
    assert mask.shape == scores.shape
    assert mask.dtype == scores.dtype
    assert mask.sum() == 7


@pytest.mark.parametrize(
    ("density", "units", "kept"),
    [(1.0, 10, 10), (0.9, 10, 9), (0.1, 10, 1), (0.01, 10, 1), (0.15, 10, 2), (1e-9, 10, 1),
     (0.01, 100, 1), (0.001, 11_164_352, 11_165)],
)  # fmt: skip
def test_counts_round_the_number_removed_down(density, units, kept):
    assert kept_count(density, units) == kept


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(-4, 4), min_size=1, max_size=60),
    st.floats(2**-10, 1.0, width=32),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_an_accelerator_keeps_what_the_host_keeps(values, density, dtype):
    scores, density = torch.tensor(values, dtype=torch.float32), torch.tensor(density, dtype=dtype)
    on_host = keep_top_at(scores, density)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_on_host", lambda scores: False)
        assert torch.equal(keep_top_at(scores, density), on_host)


def test_gradients_go_straight_through_to_scores_and_density():
    scores = torch.tensor([[0.5, -2.0], [1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    density = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    upstream = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    mask = top_fraction(scores, density)
    assert mask.tolist() == [[0.0, 1.0], [1.0, 0.0]]
    (mask * upstream).sum().backward()
    assert scores.grad.tolist() == [[1.0, -2.0], [3.0, 0.0]]
    assert density.grad == 10.0


def test_a_score_that_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match="score is NaN"):
        keep_top(torch.tensor([1.0, float("nan"), 2.0]), 1)


@pytest.mark.parametrize("count", [-1, 4])
def test_a_count_outside_the_layer_is_refused(count):
    with pytest.raises(ValueError, match=f"cannot keep {count} of 3"):
        keep_top(torch.ones(3), count)
