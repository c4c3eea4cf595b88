"""Warm starts against planted spectra: as right as a cold run, also where the top has moved or arisen since."""

import pytest
import torch

from diag.errors import InvalidInput
from diag.linalg.lanczos import eigenpairs
from diag.linalg.operator import FunctionOperator, LinearOperator
from diag.linalg.ritz import Ritz, Which
from diag.linalg.warm import CautiousStoppingRule, search_length, warm_eigenpairs

SIZE = 2000
# A bulk like a network's: most of it near zero, a tail up to 1.
BULK = torch.randn(SIZE, generator=torch.Generator().manual_seed(1)).abs() ** 3
BULK = BULK / BULK.max()


def spectrum(outliers, places):
    """A diagonal operator: the bulk, with outliers along these coordinates. Lanczos sees no difference to a rotated
    one, as its start is random."""
    values = BULK.clone()
    values[places] = torch.tensor(outliers)
    return FunctionOperator(lambda v: values * v, SIZE), values.double().sort(descending=True).values


def check(pairs, operator, truth, before=0):
    """Each value within its residual of the true one, which for float32 products ends at 1e-6 of the largest."""
    error = (pairs.values - truth[: len(pairs.values)]).abs()
    assert (error <= pairs.residuals + pairs.rounding + 1e-6 * truth[0]).all()
    assert pairs.converged.all()
    assert pairs.num_products == operator.num_products - before
    for value, vector, residual in zip(pairs.values, pairs.vectors, pairs.residuals, strict=True):
        left = (operator.matvec(vector) - value * vector).norm()
        assert float(left) <= float(residual) + 1e-5


@pytest.mark.parametrize("count", [1, 3])
def test_the_same_operator_again_is_nearly_free(count):
    operator, truth = spectrum([5.0, 4.0, 3.0], [3, 4, 5])
    cold, earlier = warm_eigenpairs(operator, None, largest=count)
    check(cold, operator, truth)
    before = operator.num_products
    warm, again = warm_eigenpairs(operator, earlier, largest=count, seed=7, unchanged=True)
    assert warm.num_products < cold.num_products
    check(warm, operator, truth, before)
    assert again.cold_products == earlier.cold_products == cold.num_products
    assert earlier.direction.dtype == torch.bfloat16 and earlier.direction.shape == (SIZE,)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 3])
def test_a_top_that_has_moved_elsewhere_wholly_is_found(count, seed):
    """Every outlier in another coordinate: the earlier vectors are of the bulk now."""
    before, _ = spectrum([5.0, 4.0, 3.0], [3, 4, 5])
    _, earlier = warm_eigenpairs(before, None, largest=count, seed=seed)
    after, truth = spectrum([4.5, 3.5, 3.2], [10, 11, 12])
    pairs, _ = warm_eigenpairs(after, earlier, largest=count, seed=seed)
    check(pairs, after, truth)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("new", [5.2, 6.0, 20.0])
def test_one_that_has_arisen_beside_the_old_one_is_found(new, seed):
    """The old eigenvector stays one exactly, so that it converges at once: the hardest case. Without the search the
    new one, 4 % above, is missed."""
    before, _ = spectrum([5.0], [3])
    _, earlier = warm_eigenpairs(before, None, largest=1, seed=seed)
    after, truth = spectrum([5.0, new], [3, 10])
    pairs, _ = warm_eigenpairs(after, earlier, largest=1, seed=seed)
    check(pairs, after, truth)
    careless, _ = warm_eigenpairs(after, earlier, largest=1, seed=seed, unchanged=True)
    assert new > 5.2 or float(careless.values[0]) < 5.1


@pytest.mark.parametrize("seed", range(5))
def test_the_runner_up_may_overtake(seed):
    before, _ = spectrum([2.0, 1.9], [3, 4])
    _, earlier = warm_eigenpairs(before, None, largest=1, seed=seed)
    after, truth = spectrum([2.0, 2.03], [3, 4])
    pairs, _ = warm_eigenpairs(after, earlier, largest=1, seed=seed)
    check(pairs, after, truth)


@pytest.mark.parametrize(
    ("following", "residual", "stops"),
    [(1.9, 0.05, True), (1.9, 0.15, False), (1.9, 5e-4, True), (1.9999, 0.002, True), (1.9999, 0.004, False)],
)
def test_a_run_waits_for_a_next_value_that_may_still_rise_above(following, residual, stops):
    """3 and 2 are wanted. The next may lie below 2 by less than its residual only where it has converged, that
    is within .001 of the largest value, 3."""
    values = torch.tensor([0.5, following, 2.0, 3.0], dtype=torch.float64)
    residuals = torch.tensor([0.5, residual, 1e-5, 1e-5], dtype=torch.float64)
    pairs = Ritz(values, torch.eye(4, dtype=torch.float64), residuals, residuals)
    rule = CautiousStoppingRule(Which(largest=2, tolerance=1e-3))
    checks = [rule.satisfied(products, pairs, torch.zeros(5, 5), [0], False) for products in (10, 11)]
    assert checks == [False, stops]


def test_drifting_vectors_cost_fewer_products_than_a_cold_start():
    """Eight outliers whose vectors turn by 0.05: fewer products in the median over seeds, and every value right."""
    outliers = torch.tensor([5.0, 4.5, 4.0, 3.5, 3.0, 2.5, 2.0, 1.5])
    warm, cold = [], []
    for seed in range(7):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.linalg.qr(torch.randn(SIZE, 8, generator=generator)).Q.T
        turned = torch.linalg.qr((rows + 0.05 * torch.randn(8, SIZE, generator=generator) / SIZE**0.5).T).Q.T

        def operator(u):
            return FunctionOperator(lambda x: BULK * x + (outliers * (u @ x)) @ u, SIZE)

        _, earlier = warm_eigenpairs(operator(rows), None, largest=8, seed=seed)
        warm.append(warm_eigenpairs(operator(turned), earlier, largest=8, seed=seed)[0])
        cold.append(eigenpairs(operator(turned), largest=8, seed=seed))
        assert warm[-1].values.tolist() == pytest.approx(cold[-1].values.tolist(), rel=2e-3)
    spent = [sorted(p.num_products for p in runs)[3] for runs in (warm, cold)]
    assert spent[0] < spent[1], spent


def test_small_spaces_and_few_products():
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64))
    operator = LinearOperator.from_matrix(matrix)
    _, earlier = warm_eigenpairs(operator, None, largest=4)
    pairs, _ = warm_eigenpairs(operator, earlier, largest=4)
    assert pairs.values.tolist() == pytest.approx([3, 2, 1, 0], abs=1e-12)
    large, _ = spectrum([5.0], [3])
    _, earlier = warm_eigenpairs(large, None, largest=1)
    large.num_products = 0
    pairs, _ = warm_eigenpairs(large, earlier, largest=1, max_products=2)
    assert (pairs.num_products, large.num_products) == (2, 2) and not pairs.converged.all()
    with pytest.raises(InvalidInput, match="is not finite; check the loss"):
        warm_eigenpairs(large * float("nan"), earlier, largest=1)


def test_the_search_is_about_half_of_a_cold_run():
    """log sqrt(P) / (log sqrt(P) + log(1 / tolerance)) of the steps that are not taken by the known pairs."""
    assert search_length(10**6, 20, 1, 1e-3) == 2 + 10  # 6.9 / (6.9 + 6.9) of 19, rounded up
    assert search_length(10**6, 20, 10, 1e-3) == 11 + 5
    assert search_length(4, 4, 1, 1e-3) <= 4
