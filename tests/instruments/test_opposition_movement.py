"""Ends, shares, swaps and ranks against values worked out by hand or by another way."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diag.instruments.opposing_signals.movement import (
    correlation,
    ends,
    lag_one,
    leading_mode,
    rank_auc,
    share,
    swap_and_persistence,
)


def test_ends_and_share():
    change = torch.tensor([0.0, 3.0, -5.0, 1.0, -1.0], dtype=torch.float64)
    a, b = ends(change, 2)
    assert a.tolist() == [1, 3] and b.tolist() == [2, 4]
    assert share(change, torch.tensor([1, 2])) == pytest.approx(0.8)
    assert math.isnan(share(torch.zeros(3), torch.tensor([0])))


def test_swapping_and_staying_ends():
    row = torch.tensor([4.0, 3.0, 0.0, 0.0, -3.0, -4.0])
    assert swap_and_persistence(torch.stack([row, -row, row]), 2) == (1.0, 0.0)
    assert swap_and_persistence(torch.stack([row, row]), 2) == (0.0, 1.0)
    half = torch.tensor([4.0, -4.0, 0.0, 0.0, 3.0, -3.0])  # one of two at each end stays, the other trades
    assert swap_and_persistence(torch.stack([row, half]), 2) == (0.5, 0.5)
    assert all(math.isnan(x) for x in swap_and_persistence(row[None], 2))


def test_chance_level_is_k_over_n():
    torch.manual_seed(0)
    swap, persist = swap_and_persistence(torch.randn(400, 100), 10)
    assert abs(swap - 0.1) < 0.02 and abs(persist - 0.1) < 0.02  # 8,000 draws each: an error of .0034


@given(steps=st.integers(2, 6), n=st.integers(2, 9), seed=st.integers(0, 50))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_leading_mode_is_the_first_right_singular_vector(steps, n, seed):
    torch.manual_seed(seed)
    changes = torch.randn(steps, n, dtype=torch.float64)
    truth = torch.linalg.svd(changes).Vh[0]
    assert abs(float(leading_mode(changes) @ truth)) == pytest.approx(1, abs=1e-8)
    assert float(leading_mode(changes).max()) == pytest.approx(float(leading_mode(changes).abs().max()))


def test_leading_mode_of_nothing():
    assert not leading_mode(torch.zeros(3, 4, dtype=torch.float64)).any()


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=12))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_auc_counts_pairs(items):
    scores, members = torch.tensor([s for s, _ in items]), torch.tensor([m for _, m in items])
    inside, outside = scores[members].tolist(), scores[~members].tolist()
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in inside for b in outside]
    if wins:
        assert rank_auc(scores, members) == pytest.approx(sum(wins) / len(wins))
    else:
        assert math.isnan(rank_auc(scores, members))


def test_correlations():
    x = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    assert correlation(x, -x) == pytest.approx(-1)
    assert lag_one(x) == pytest.approx(-1)
    assert math.isnan(correlation(x, torch.ones(5))) and math.isnan(lag_one(x[:2]))
