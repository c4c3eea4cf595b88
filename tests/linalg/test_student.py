"""Errors from few values cover as often as is said."""

import math

import pytest
import torch

from diag.linalg.student import SUMMED_UP, covering, covering_skewed

# 97.5 % points of Student's distribution, from printed tables.
TABLE = {2: 12.706, 5: 2.776, 10: 2.262, 31: 2.042, 1_000_001: 1.960}


@pytest.mark.parametrize(("values", "point"), TABLE.items())
def test_against_the_printed_table(values, point):
    assert covering(1.0, values) == pytest.approx(point / 2, abs=5e-4)


@pytest.mark.parametrize("values", [2, 3, 4, 7, 50, SUMMED_UP, SUMMED_UP + 1, SUMMED_UP + 2, 5000])
@pytest.mark.parametrize("of", [1, 20, 10_000])
def test_against_scipy(values, of):
    """The first power of 1 / freedom that is left out is the fifth: 2e-9 of the point where it is used first."""
    scipy = pytest.importorskip("scipy.stats")
    assert 2 * covering(1.0, values, of) == pytest.approx(scipy.t.ppf(1 - 0.025 / of, values - 1), rel=1e-8)


def test_one_value_has_no_error():
    assert math.isnan(covering(0.0, 1))


def test_several_at_once_are_wider():
    """Bonferroni: ten at 95 % are one at 99.5 %, whose point with nine degrees of freedom is 3.690."""
    assert covering(1.0, 10, of=10) == pytest.approx(3.690 / 2, abs=1e-3)


@pytest.mark.parametrize("values", [3, 10, 40])
def test_normal_means_are_covered(values):
    """5,000 means of normal numbers: 95 % within four counting errors (.0031 each)."""
    x = torch.randn(5_000, values, generator=torch.Generator().manual_seed(values), dtype=torch.float64)
    error = torch.tensor([covering(float(s), values) for s in x.std(1) / math.sqrt(values)])
    assert float((x.mean(1).abs() <= 2 * error).double().mean()) == pytest.approx(0.95, abs=4 * 0.0031)


def test_skewed_means_are_covered():
    """5,000 means of sixteen exponential numbers (skewness 2): 93 to 97 % within two errors, where Student's alone
    covers some 90."""
    x = torch.empty(5_000, 16, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(1))
    error = torch.tensor([covering_skewed(row.tolist()) for row in x])
    alone = torch.tensor([covering(float(s) / 4, 16) for s in x.std(1)])
    share = [float(((x.mean(1) - 1).abs() <= 2 * e).double().mean()) for e in (error, alone)]
    assert 0.93 <= share[0] <= 0.97 and share[1] < 0.93


def test_without_skewness_the_two_agree():
    """Samples that lie evenly around their mean."""
    assert covering_skewed([1.0, 2.0, 3.0, 4.0]) == pytest.approx(covering(math.sqrt(5 / 3) / 2, 4))
    assert covering_skewed([2.0, 2.0]) == 0.0 and math.isnan(covering_skewed([2.0]))
