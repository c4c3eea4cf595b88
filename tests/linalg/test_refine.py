"""Eigenpairs in a given subspace, and the search for what was missed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diag.errors import InvalidInput
from diag.linalg.deflation import DeflatedOperator, orthonormal
from diag.linalg.lanczos import eigenpairs
from diag.linalg.operator import LinearOperator
from diag.linalg.refine import complete, refine
from diag.linalg.ritz import Which

Planted = Callable[..., LinearOperator]


def test_refine_stops_at_its_limit_and_says_so(planted: Planted, o6c: Tensor) -> None:
    guess = torch.randn(3, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs = refine(planted(o6c), guess, Which(largest=3), max_products=5)
    assert pairs.num_products == 5
    assert not pairs.converged.all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_missed_copies_of_a_multiple_outlier_are_found(planted: Planted, dtype: torch.dtype) -> None:
    spectrum = torch.cat([torch.tensor([5.0, 5, 5, 4, 3]), torch.linspace(-0.1, 0.1, 195)])
    operator = planted(spectrum, dtype)
    first = eigenpairs(operator, largest=3)
    assert first.values[1] < 4.5, "one start vector sees one copy; else this test says nothing"
    pairs = complete(operator, first, Which(largest=3))
    torch.testing.assert_close(pairs.values, torch.full((3,), 5.0, dtype=torch.float64), rtol=1e-4, atol=0)
    assert pairs.num_products == operator.num_products


def test_nothing_missed_costs_only_the_search(planted: Planted, o6c: Tensor) -> None:
    operator = planted(o6c)
    first = eigenpairs(operator, largest=3)
    pairs = complete(operator, first, Which(largest=3), steps=5)
    assert pairs.num_products == first.num_products + 5
    assert torch.equal(pairs.values, first.values)


def test_orthonormal_spans_drops_and_stays_near() -> None:
    rows = torch.randn(4, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = orthonormal(torch.cat([rows, rows[:2] + rows[2:]]))
    torch.testing.assert_close(basis @ basis.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close((rows @ basis.T) @ basis, rows, rtol=0, atol=1e-10)
    torch.testing.assert_close(orthonormal(basis), basis, rtol=0, atol=1e-12)
    apart = orthonormal(torch.randn(2, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), basis)
    assert (apart @ basis.T).abs().max() < 1e-12


def test_deflated_operator_is_p_a_p(planted: Planted, o6c: Tensor) -> None:
    operator = planted(o6c)
    u = orthonormal(torch.randn(4, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    p = torch.eye(200, dtype=torch.float64) - u.T @ u
    deflated = DeflatedOperator(operator, u)
    v = deflated.project(torch.randn(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    torch.testing.assert_close(deflated.matvec(v), p @ operator.matrix @ p @ v, rtol=0, atol=1e-12)
    values, cross = deflated.known_part()
    torch.testing.assert_close(values, torch.linalg.eigvalsh(u @ operator.matrix @ u.T), rtol=0, atol=1e-12)
    assert cross == pytest.approx((u @ operator.matrix @ p).square().sum().item(), rel=1e-10)


def test_refusals(planted: Planted, o6c: Tensor) -> None:
    with pytest.raises(InvalidInput, match="spans 1 dimensions and 3 eigenpairs are asked for"):
        refine(planted(o6c), torch.ones(2, 200, dtype=torch.float64), Which(largest=3))
