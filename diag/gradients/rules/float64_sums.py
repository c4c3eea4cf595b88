"""Sums of float32 numbers that keep more digits than float32 does, at its speed."""

from __future__ import annotations

import torch
from torch import Tensor


def sums(values: Tensor) -> Tensor:
    """(n,) float64: the sum of each example's numbers."""
    return values.sum(tuple(range(1, values.ndim)), dtype=torch.float64)


def sums_of_squares(values: Tensor) -> Tensor:
    """(n,) float64, to the accuracy that an estimate of rounding needs."""
    return torch.linalg.vector_norm(values, dim=tuple(range(1, values.ndim))).double().square()


def squared(values: Tensor) -> Tensor:
    """(n,) float64: the squared norm of each example's numbers."""
    return squared_rows(values.reshape(values.shape[0], -1))


def squared_rows(values: Tensor) -> Tensor:
    """Squared norm over the last axis, float64."""
    if values.dtype == torch.float64:
        return (values * values).sum(-1)
    return row_norms(values).double().square()


def row_norms(values: Tensor) -> Tensor:
    """Norms over the last axis. A float32 sum of 10^6 squares can be off by 1e-5, so long rows are summed in
    pieces, and the pieces in float64."""
    width = values.shape[-1]
    if width <= 4096:
        return torch.linalg.vector_norm(values, dim=-1)
    whole = width - width % 1024
    pieces = (
        torch.linalg.vector_norm(values[..., :whole].unflatten(-1, (-1, 1024)), dim=-1).double().square().sum(-1)
    )
    return (pieces if whole == width else pieces + squared_rows(values[..., whole:])).sqrt()
