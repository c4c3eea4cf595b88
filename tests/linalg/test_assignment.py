"""The assignment is optimal: against all permutations, and on planted ones."""

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diag.errors import InvalidInput
from diag.linalg.assignment import best_assignment


@given(st.integers(1, 6), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_no_permutation_scores_higher(n, seed):
    scores = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = best_assignment(scores)
    best = max(sum(float(scores[i, p[i]]) for i in range(n)) for p in permutations(range(n)))
    # Sums of six numbers near 1 in two orders: 1e-12 is far above their rounding.
    assert float(scores[torch.arange(n), found].sum()) == pytest.approx(best, abs=1e-12)
    assert sorted(found.tolist()) == list(range(n))


def test_a_planted_permutation_is_found_in_a_noisy_correlation_matrix():
    generator = torch.Generator().manual_seed(0)
    planted = torch.randperm(64, generator=generator)
    x = torch.randn(500, 64, generator=generator, dtype=torch.float64)
    # Noise as large as the signal: correlations are .7 for true pairs and of order 1/sqrt(500) = .045 for others.
    y = x[:, planted] + torch.randn(500, 64, generator=generator, dtype=torch.float64)
    correlations = torch.corrcoef(torch.cat([y, x], 1).T)[:64, 64:]
    assert torch.equal(best_assignment(correlations), planted)


def test_batches_are_solved_one_by_one():
    scores = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    found = best_assignment(scores)
    assert found.shape == (2, 3, 5)
    assert torch.equal(found[1, 2], best_assignment(scores[1, 2]))
    assert best_assignment(torch.zeros(0, 4, 4)).shape == (0, 4)


def test_errors_name_what_was_found():
    with pytest.raises(InvalidInput, match=r"shape \(2, 3\); expected square"):
        best_assignment(torch.zeros(2, 3))
    with pytest.raises(InvalidInput, match="NaN or infinity; check the weights"):
        best_assignment(torch.full((2, 2), torch.nan))
