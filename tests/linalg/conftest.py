"""Matrices of known spectrum for the tests of `diag.linalg`."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from diag.linalg.operator import LinearOperator


@pytest.fixture
def planted() -> Callable[..., LinearOperator]:
    """A function (values, dtype, seed) -> an operator with these eigenvalues in a Haar-random basis."""

    def make(values: Sequence[float] | Tensor, dtype: torch.dtype = torch.float64, seed: int = 0) -> LinearOperator:
        spectrum = torch.as_tensor(values, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        square = torch.randn(len(spectrum), len(spectrum), generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(square).Q
        matrix = (basis * spectrum) @ basis.T
        return LinearOperator.from_matrix(((matrix + matrix.T) / 2).to(dtype))

    return make


def outliers_and_bulk(outliers: Sequence[float], size: int = 200, seed: int = 3) -> Tensor:
    """Some outliers over a bulk that is uniform in [-0.1, 0.1]."""
    generator = torch.Generator().manual_seed(seed)
    bulk = torch.rand(size - len(outliers), generator=generator, dtype=torch.float64) * 0.2 - 0.1
    return torch.cat([torch.tensor(outliers, dtype=torch.float64), bulk])


@pytest.fixture
def o6c() -> Tensor:
    """A planted spectrum: 10, 5, 2 over a bulk, 200 in all."""
    return outliers_and_bulk([10.0, 5.0, 2.0])
