"""How much of the noise of one example a batch keeps."""

from itertools import combinations

import pytest
import torch

from diag.linalg.mean_square import noise_factor


@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_the_noise_of_a_batch_without_replacement(size: int) -> None:
    """Over all batches of 5 numbers: the variance of the batch's mean over that of one number."""
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64)
    means = torch.stack([values[list(rows)].mean() for rows in combinations(range(5), size)])
    variance = (means - values.mean()).square().mean()
    assert noise_factor(5, size) == pytest.approx(float(variance / values.var(correction=0)), abs=1e-12)


def test_one_example_has_no_noise_and_no_batch_is_larger_than_the_data() -> None:
    assert noise_factor(1, 1) == noise_factor(0, 4) == noise_factor(5, 9) == 0.0
