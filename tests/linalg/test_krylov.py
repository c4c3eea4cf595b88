"""The Lanczos basis where one pass of orthogonalisation is not enough, and where nothing but rounding is left."""

from collections.abc import Callable

import pytest
import torch

from diag.linalg.lanczos import eigenpairs, run_lanczos
from diag.linalg.operator import LinearOperator

Planted = Callable[..., LinearOperator]


@pytest.mark.parametrize(("dtype", "small"), [(torch.float64, 1e-7), (torch.float32, 1e-3)])
def test_the_basis_stays_orthogonal_where_a_product_is_almost_inside_it(
    planted: Planted, dtype: torch.dtype, small: float
) -> None:
    """After five steps what is new in a product is `small` of it, so that one pass leaves rounding / small, which
    is 1e-9 and 1e-4; a second pass leaves rounding."""
    operator = planted([5.0, 4.0, 3.0, 2.0, 1.0, *(small * torch.linspace(-1, 1, 95)).tolist()], dtype)
    run = run_lanczos(operator, None, max_products=12)
    assert run.space.blocks == [0], "no breakdown: the second pass alone is looked at"
    basis = run.space.basis[: run.space.steps].double()
    off = basis @ basis.T - torch.eye(len(basis), dtype=torch.float64)
    assert float(off.abs().max()) < 20 * torch.finfo(dtype).eps


def test_multiplicity_is_found_behind_the_rounding_of_the_products(planted: Planted) -> None:
    """5, 5, 3 and ones, with products that are right to 1e-12 as those of a large float64 network: one start vector
    sees 5, 3 and 1, and then rounding. Following that, a run for two would have 5 and 3 converged and stop."""
    exact = planted([5.0, 5.0, 3.0] + [1.0] * 61).to_dense()
    for seed in range(5):
        noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        operator = LinearOperator.from_matrix(exact + 1e-12 * (noise + noise.T) / 16)
        pairs = eigenpairs(operator, largest=2, seed=seed)
        assert pairs.values.tolist() == pytest.approx([5, 5], abs=1e-9)
