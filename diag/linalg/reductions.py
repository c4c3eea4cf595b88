"""Dot products and norms of long float32 vectors that can be trusted, and products with a tall basis.

A float32 reduction on the CPU is off by 1e-5 at a million entries and by 7e-4 at ten million; both are far
above what an eigenvalue to 1e-6 needs. Everything here accumulates in float64, over blocks that stay in the
cache, without a float64 copy of a whole vector. A basis holds one vector in each row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Entries handled at once: small enough for the CPU's cache, large enough to keep a GPU busy.
BLOCK_ON_CPU = 1 << 16
BLOCK_ELSEWHERE = 1 << 24


def blocks(size: int, device: torch.device) -> Iterator[slice]:
    """Consecutive slices that cover range(size)."""
    length = BLOCK_ON_CPU if device.type == "cpu" else BLOCK_ELSEWHERE
    for start in range(0, size, length):
        yield slice(start, min(start + length, size))


def dot(x: Tensor, y: Tensor) -> Tensor:
    """<x, y> of two flat vectors, a float64 scalar on their device."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for block in blocks(x.numel(), x.device):
        total += x[block].double() @ y[block].double()
    return total


def norm(x: Tensor) -> Tensor:
    """|x| of a flat vector, a float64 scalar on its device."""
    return dot(x, x).sqrt()


def orthogonalise(
    v: Tensor, basis: Tensor, known: Tensor | None = None, known_basis: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Takes the rows of `basis` (k, size) out of v, in place: one pass of classical Gram-Schmidt.

    First v -= known @ known_basis, for coefficients that are known beforehand; then v -= found @ basis.
    Returns found, float64 (k,), and the squared norm of what is left, a float64 scalar.
    """
    found = torch.zeros(basis.shape[0], dtype=torch.float64, device=v.device)
    for block in blocks(v.numel(), v.device):
        part = v[block]
        if known is not None and known_basis is not None:
            part.addmv_(known_basis[:, block].to(v.dtype).T, known.to(v.dtype), alpha=-1)
        found += basis[:, block].to(v.dtype) @ part
    left = torch.zeros((), dtype=torch.float64, device=v.device)
    weights = found.to(v.dtype)
    for block in blocks(v.numel(), v.device):
        part = v[block].addmv_(basis[:, block].to(v.dtype).T, weights, alpha=-1)
        exact = part.double()
        left += exact @ exact
    return found, left


def combine(weights: Tensor, basis: Tensor, dtype: torch.dtype) -> Tensor:
    """weights (p, k) @ basis (k, size) -> (p, size) in `dtype`, with float32 or float64 arithmetic."""
    result = torch.empty(weights.shape[0], basis.shape[1], dtype=dtype, device=basis.device)
    arithmetic = torch.promote_types(dtype, torch.float32)
    weights = weights.to(device=basis.device, dtype=arithmetic)
    for block in blocks(basis.shape[1], basis.device):
        result[:, block] = (weights @ basis[:, block].to(arithmetic)).to(dtype)
    return result


def rotate(weights: Tensor, basis: Tensor) -> None:
    """basis[:p] = weights (p, k) @ basis[:k], in place and without a second basis."""
    kept, used = weights.shape
    arithmetic = torch.promote_types(basis.dtype, torch.float32)
    weights = weights.to(device=basis.device, dtype=arithmetic)
    for block in blocks(basis.shape[1], basis.device):
        basis[:kept, block] = (weights @ basis[:used, block].to(arithmetic)).to(basis.dtype)


def gram(first: Tensor, second: Tensor) -> Tensor:
    """<first_i, second_j> for two sets of rows (p, size) and (q, size): float64 (p, q)."""
    result = torch.zeros(first.shape[0], second.shape[0], dtype=torch.float64, device=first.device)
    for block in blocks(first.shape[1], first.device):
        result += first[:, block].double() @ second[:, block].double().T
    return result
