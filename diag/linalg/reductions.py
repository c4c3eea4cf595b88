"""Dot products and norms of long float32 vectors that can be trusted, and products with a tall basis.

A float32 reduction on the CPU is off by 1e-5 at a million entries and by 7e-4 at ten million; both are far
above what an eigenvalue to 1e-6 needs. Here short blocks are summed in the vectors' own precision, which is
good to 1e-8 for float32, and the blocks in float64; a block stays in the cache, and nothing is copied. A basis
holds one vector in each row.

Where processes share the vectors, each holds a part, and sums over entries are sums over parts (`Spread`). The
parts are consecutive pieces of equal length (the last may be shorter), so that a basis of k vectors takes k / W of
their size on each of W processes. All make the same calls in the same order; a total is the same on all of them,
bit for bit, so that they take the same decisions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

# Entries handled at once: small enough for the CPU's cache and for a float32 sum, large enough for a GPU, whose
# float32 sums are trees and lose nothing.
BLOCK_ON_CPU = 1 << 15
BLOCK_ELSEWHERE = 1 << 24
# A basis does not fit in the cache anyway: longer rows are read a tenth faster. What is taken out of a vector with
# them is small already, so their rounding, relative to it, is smaller still.
ROWS_ON_CPU = 1 << 17
ELEMENTS_AT_ONCE = 1 << 22  # of a matrix that is read in blocks of rows: 32 MB in float64


class Spread:
    """One process that holds whole vectors. Subclasses say how several share them."""

    @property
    def alone(self) -> bool:
        """Whether parts are whole vectors."""
        return True

    def length(self, size: int) -> int:
        """Entries that this process holds of a vector of `size`."""
        return size

    def part(self, whole: Tensor) -> Tensor:
        """This process's part of a vector (size,) or of rows of them (k, size)."""
        return whole

    def drawn(self, size: int, draw: Callable[[int], Tensor]) -> Tensor:
        """This process's part of a vector that `draw(size)` gives, the same on all of them."""
        return self.part(draw(size))

    def whole(self, part: Tensor, size: int) -> Tensor:
        """The vector of `size` entries from the processes' parts."""
        return part

    def total(self, numbers: Tensor) -> Tensor:
        """The sum over processes of a small float64 tensor."""
        return numbers


class SpreadOver(Spread):
    """rank: this process's number of `world`. total(numbers): their sum over processes. joined(part, size): the
    processes' parts, one after the other."""

    def __init__(
        self,
        rank: int,
        world: int,
        total: Callable[[Tensor], Tensor],
        joined: Callable[[Tensor, int], Tensor],
    ) -> None:
        self._rank, self._world, self._total, self._joined = rank, world, total, joined

    @property
    def alone(self) -> bool:
        """Whether parts are whole vectors."""
        return self._world == 1

    def _slice(self, size: int) -> slice:
        each = -(-size // self._world)
        return slice(min(self._rank * each, size), min((self._rank + 1) * each, size))

    def length(self, size: int) -> int:
        """Entries that this process holds of a vector of `size`."""
        own = self._slice(size)
        return own.stop - own.start

    def part(self, whole: Tensor) -> Tensor:
        """A copy of this process's part, so that the whole can go."""
        return whole[..., self._slice(whole.shape[-1])].clone()

    def whole(self, part: Tensor, size: int) -> Tensor:
        """The vector of `size` entries from the processes' parts."""
        return self._joined(part, size)

    def total(self, numbers: Tensor) -> Tensor:
        """The sum over processes of a small float64 tensor."""
        return self._total(numbers)


IN_ONE_PROCESS = Spread()


def normal(generator: torch.Generator) -> Callable[[int], Tensor]:
    """Draws so many normal numbers, float32 on the host."""
    return lambda size: torch.randn(size, dtype=torch.float32, generator=generator)


def blocks(size: int, device: torch.device, on_cpu: int = BLOCK_ON_CPU) -> Iterator[slice]:
    """Consecutive slices that cover range(size)."""
    length = on_cpu if device.type == "cpu" else BLOCK_ELSEWHERE
    for start in range(0, size, length):
        yield slice(start, min(start + length, size))


def dot(x: Tensor, y: Tensor, spread: Spread = IN_ONE_PROCESS) -> Tensor:
    """<x, y> of two flat vectors, a float64 scalar on their device."""
    return _total([x[block] @ y[block] for block in blocks(x.numel(), x.device)], x.new_zeros(()), spread)


def _total(parts: list[Tensor], nothing: Tensor, spread: Spread) -> Tensor:
    """The float64 sum of scalars, or of vectors of one length, in the order given; `nothing`: that of none."""
    return spread.total(torch.stack(parts or [nothing]).sum(0, dtype=torch.float64))


def norm(x: Tensor, spread: Spread = IN_ONE_PROCESS) -> Tensor:
    """|x| of a flat vector, a float64 scalar on its device."""
    return dot(x, x, spread).sqrt()


def length(tensors: Tensor | Sequence[Tensor]) -> float:
    """The Euclidean norm of a tensor of any shape, or of several together, accumulated in float64."""
    parts = [tensors] if isinstance(tensors, Tensor) else tensors
    norms = [torch.linalg.vector_norm(t.detach(), dtype=torch.float64) for t in parts]
    return float(torch.stack([n.to(norms[0].device) for n in norms]).norm()) if norms else 0.0


def mean_square(tensor: Tensor) -> float:
    """The mean of a tensor's squared entries, accumulated in float64; NaN without an entry."""
    return length(tensor) ** 2 / tensor.numel() if tensor.numel() else math.nan


def orthogonalise(
    v: Tensor,
    basis: Tensor,
    known: Tensor | None = None,
    known_basis: Tensor | None = None,
    spread: Spread = IN_ONE_PROCESS,
) -> tuple[Tensor, Tensor]:
    """Takes the rows of `basis` (k, size) out of v, in place: one pass of classical Gram-Schmidt.

    First v -= known @ known_basis, for coefficients that are known beforehand; then v -= found @ basis.
    Returns found, float64 (k,), and the squared norm of what is left, a float64 scalar.
    """
    if known is not None and known_basis is not None:
        subtract(v, known_basis, known)
    parts = [basis[:, block].to(v.dtype) @ v[block] for block in _blocks_of_rows(v, basis)]
    found = _total(parts, v.new_zeros(len(basis)), spread)
    subtract(v, basis, found)
    return found, dot(v, v, spread)


def subtract(v: Tensor, basis: Tensor, weights: Tensor) -> None:
    """v -= weights @ basis, in place."""
    weights = weights.to(v.dtype)
    for block in _blocks_of_rows(v, basis):
        v[block].addmv_(basis[:, block].to(v.dtype).T, weights, alpha=-1)


def _blocks_of_rows(v: Tensor, basis: Tensor) -> Iterator[slice]:
    """Long blocks, unless each must be copied to another dtype."""
    return blocks(v.numel(), v.device, ROWS_ON_CPU if basis.dtype == v.dtype else BLOCK_ON_CPU)


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


def gram(first: Tensor, second: Tensor, spread: Spread = IN_ONE_PROCESS) -> Tensor:
    """<first_i, second_j> for two sets of rows (p, size) and (q, size): float64 (p, q)."""
    result = torch.zeros(first.shape[0], second.shape[0], dtype=torch.float64, device=first.device)
    for block in blocks(first.shape[1], first.device):
        result += first[:, block].double() @ second[:, block].double().T
    return spread.total(result)
