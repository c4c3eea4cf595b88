"""Operators against dense arithmetic, and what they refuse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diag.errors import InvalidInput
from diag.linalg.operator import FunctionOperator, LinearOperator


def symmetric(size: int, seed: int) -> torch.Tensor:
    square = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return square + square.T


A, B = symmetric(7, 0), symmetric(7, 1)
SCALE = torch.linspace(0.5, 3, 7, dtype=torch.float64)
PICK = torch.tensor([5, 0, 3])
MASK = torch.arange(7) % 2 == 0
first, second = LinearOperator.from_matrix(A), LinearOperator.from_matrix(B)

DERIVED = {
    "sum": (first + second, A + B),
    "difference": (first - second, A - B),
    "multiple": (2.5 * first, 2.5 * A),
    "negative": (-first, -A),
    "shift": (first.shifted(0.3), A + 0.3 * torch.eye(7, dtype=torch.float64)),
    "scaling": (first.diagonally_scaled(SCALE), SCALE[:, None] * A * SCALE),
    "slice": (first.block(slice(2, 6)), A[2:6, 2:6]),
    "positions": (first.block(PICK), A[PICK][:, PICK]),
    "mask": (first.block(MASK), A[MASK][:, MASK]),
    "function": (FunctionOperator(lambda v: A @ v, 7, torch.float64), A),
    "nested": ((first + second).block(PICK).shifted(-1.0) * 2, 2 * ((A + B)[PICK][:, PICK] - torch.eye(3))),
}


@pytest.mark.parametrize("name", DERIVED)
def test_derived_operators_match_dense_arithmetic(name: str) -> None:
    operator, dense = DERIVED[name]
    v = torch.randn(operator.size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    kept = v.clone()
    # A handful of float64 operations on numbers of order 10: rounding below 1e-12.
    torch.testing.assert_close(operator.matvec(v), dense @ v, rtol=0, atol=1e-12)
    torch.testing.assert_close(operator.to_dense(), dense, rtol=0, atol=1e-12)
    torch.testing.assert_close(operator.matvecs(v[None])[0], dense @ v, rtol=0, atol=1e-12)
    assert torch.equal(v, kept), "a product changed its argument"


def test_products_are_counted_here_and_below() -> None:
    base = LinearOperator.from_matrix(A)
    block = base.block(PICK)
    block.matvec(torch.ones(3, dtype=torch.float64))
    block.matvecs(torch.ones(4, 3, dtype=torch.float64))
    assert (block.num_products, base.num_products) == (5, 5)


@settings(deadline=None, max_examples=20)
@given(size=st.integers(1, 12), factor=st.floats(-3, 3), seed=st.integers(0, 99))
def test_every_derived_operator_is_symmetric(size: int, factor: float, seed: int) -> None:
    operator = LinearOperator.from_matrix(symmetric(size, seed))
    combined = (factor * operator + operator.shifted(factor)).diagonally_scaled(
        torch.linspace(-1, 2, size, dtype=torch.float64)
    )
    u, v = torch.randn(2, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    left, right = u @ combined.matvec(v), v @ combined.matvec(u)
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


def test_refusals_say_what_was_found_and_expected() -> None:
    with pytest.raises(InvalidInput, match=r"vector of shape \(6,\).*takes shape \(7,\)"):
        first.matvec(torch.ones(6, dtype=torch.float64))
    with pytest.raises(InvalidInput, match=r"torch.float32.*torch.float64"):
        first.matvec(torch.ones(7))
    with pytest.raises(InvalidInput, match="expected a square floating-point one"):
        LinearOperator.from_matrix(torch.ones(3, 4))
    with pytest.raises(InvalidInput, match="not symmetric"):
        LinearOperator.from_matrix(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    with pytest.raises(InvalidInput, match="cannot be added"):
        _ = first + LinearOperator.from_matrix(torch.eye(3))
    with pytest.raises(InvalidInput, match="positions of a block repeat"):
        first.block(torch.tensor([1, 1]))
    with pytest.raises(InvalidInput, match="give one entry for each position"):
        first.block(torch.ones(3, dtype=torch.bool))
    with pytest.raises(InvalidInput, match="at least 1"):
        FunctionOperator(lambda v: v, 0)
    with pytest.raises(InvalidInput, match="shape"):
        FunctionOperator(lambda v: v[:2], 3).matvec(torch.ones(3))
