"""The Lanczos basis where one pass of orthogonalisation is not enough, and where nothing but rounding is left."""

from collections.abc import Callable

import pytest
import torch

from diag.linalg.lanczos import eigenpairs, run_lanczos
from diag.linalg.operator import FunctionOperator, LinearOperator

Planted = Callable[..., LinearOperator]


@pytest.mark.parametrize(("dtype", "small"), [(torch.float64, 1e-7), (torch.float32, 1e-3)])
def test_the_basis_stays_orthogonal_where_a_product_is_almost_inside_it(dtype: torch.dtype, small: float) -> None:
    """Products that are a tenth asymmetric among the five largest, as finite differences may be, and tiny beside:
    what the recurrence does not foresee is 1 / `small` times what is new, so that one pass of Gram-Schmidt leaves
    that many roundings, 1e-9 and 1e-4; a second pass leaves one."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(100, 100, generator=generator, dtype=torch.float64)).Q
    skew = torch.randn(5, 5, generator=generator, dtype=torch.float64).triu(1)
    inner = torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, *(small * torch.linspace(-1, 1, 95))]).double())
    inner[:5, :5] += (skew - skew.T) / 4
    matrix = (vectors @ inner @ vectors.T).to(dtype)
    run = run_lanczos(FunctionOperator(lambda v: matrix @ v, 100, dtype), None, max_products=12)
    assert run.space.blocks == [0], "no breakdown: the second pass alone is looked at"
    basis = run.space.basis[: run.space.steps].double()
    off = basis @ basis.T - torch.eye(len(basis), dtype=torch.float64)
    assert float(off.abs().max()) < 20 * torch.finfo(dtype).eps
    assert run.rounding > 0.1, "and the run knows how asymmetric the products are"


def test_multiplicity_is_found_behind_the_rounding_of_the_products(planted: Planted) -> None:
    """5, 5, 3 and ones, with products that are right to 1e-12 as those of a large float64 network: one start vector
    sees 5, 3 and 1, and then rounding. Following that, a run for two would have 5 and 3 converged and stop."""
    exact = planted([5.0, 5.0, 3.0] + [1.0] * 61).to_dense()
    for seed in range(5):
        noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        operator = LinearOperator.from_matrix(exact + 1e-12 * (noise + noise.T) / 16)
        pairs = eigenpairs(operator, largest=2, seed=seed)
        assert pairs.values.tolist() == pytest.approx([5, 5], abs=1e-9)
