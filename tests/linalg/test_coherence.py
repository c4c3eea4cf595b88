"""Coherence from block sums against the same from the gradients themselves."""

import math

import pytest
import torch

from diag.linalg.coherence import between_groups, coherence, noise_scale, random_blocks


def of(matrix, count=10):
    blocks = random_blocks(len(matrix), count, seed=0)
    sums = torch.stack([matrix[b].sum(0) for b in blocks])
    return coherence(sums @ sums.T, matrix.square().sum(1), blocks), blocks


def corrected(matrix):
    gram = matrix @ matrix.T
    m = len(matrix)
    return float((gram.sum() - gram.trace()) / (m - 1) / gram.trace())


def test_blocks_part_the_examples():
    blocks = random_blocks(23, 10, seed=1)
    assert sorted(torch.cat(blocks).tolist()) == list(range(23))
    assert {len(b) for b in blocks} == {2, 3}
    assert len(random_blocks(4, 10, seed=1)) == 4


def test_jackknife_against_leaving_blocks_out():
    torch.manual_seed(0)
    matrix = torch.randn(37, 5, dtype=torch.float64) + 0.4
    found, blocks = of(matrix)
    kept = [matrix[torch.tensor([i for i in range(37) if i not in set(b.tolist())])] for b in blocks]
    values = torch.tensor([corrected(part) for part in kept], dtype=torch.float64)
    error = ((len(values) - 1) / len(values) * (values - values.mean()).square().sum()).sqrt()
    assert found.standard_error == pytest.approx(float(error) * 2.262157163 / 2, rel=1e-9)  # t of nine, 97.5 %
    assert found.corrected == pytest.approx(corrected(matrix), rel=1e-10)


def test_noise_scale_is_infinite_without_agreement():
    assert noise_scale(of(torch.eye(8, dtype=torch.float64))[0]) == math.inf
    assert noise_scale(of(torch.ones(8, 2, dtype=torch.float64))[0]) == pytest.approx(0)
    assert math.isnan(noise_scale(of(torch.zeros(8, 2, dtype=torch.float64))[0]))


def test_groups_of_opposite_gradients():
    g = torch.randn(4, dtype=torch.float64)
    first, second = g.expand(3, 4), -2 * g.expand(5, 4)
    sums = torch.stack([first.sum(0), second.sum(0)])
    matrix = between_groups(sums @ sums.T, [first.square().sum(1), second.square().sum(1)])
    torch.testing.assert_close(matrix, torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64))
