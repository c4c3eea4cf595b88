"""Symmetric linear operators: matrices known only by their products with a vector.

Hessians of networks are never formed; everything in `diag.linalg` needs products `A v` alone. A subclass
gives `_matvec`; the public `matvec` checks what goes in and comes out and counts the products, which are
what an algorithm costs. Vectors are flat, of shape (size,); several at once are rows of (count, size). Where
processes share the vectors (`spread`), algorithms hold parts of them and call `apply`; `matvec` takes whole ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from diag.errors import InvalidInput, type_of
from diag.linalg.deadline import NEVER, Deadline
from diag.linalg.reductions import IN_ONE_PROCESS, Spread, length

Index = slice | Tensor


def checked_operator(value: Any, name: str) -> LinearOperator:
    """`value`; raises InvalidInput where it is no LinearOperator."""
    if not isinstance(value, LinearOperator):
        raise InvalidInput(
            f"{name} is {type_of(value)}; expected a LinearOperator: wrap a matrix in "
            "diag.linalg.operator.LinearOperator.from_matrix."
        )
    return value


class LinearOperator(ABC):
    """A real symmetric operator on flat vectors.

    Attributes: `size` (length of the vectors), `dtype` and `device` (of the vectors that go in and come
    out), `num_products` (single products done so far; `matvecs` of k rows counts k), `deadline` (asked before each
    product; by default none), `spread` (how processes share the vectors; by default each has all of them).
    """

    deadline: Deadline = NEVER
    spread: Spread = IN_ONE_PROCESS

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device | str):
        if size < 1:
            raise InvalidInput(f"The operator's size is {size}; expected at least 1.")
        self.size = size
        self.dtype = dtype
        self.device = torch.device(device)
        self.num_products = 0

    @abstractmethod
    def _matvec(self, v: Tensor) -> Tensor:
        """A v for one flat vector; must not change `v`, and what it returns is the caller's to change."""

    def _matvecs(self, vectors: Tensor) -> Tensor:
        """A applied to each row; a subclass overrides this where a batch is cheaper than a loop."""
        products = []
        with self.many_products():
            for v in vectors:
                self.deadline.check()
                products.append(self._matvec(v))
        return torch.stack(products)

    @property
    def parts(self) -> tuple[LinearOperator, ...]:
        """The operators that this one is made of."""
        return ()

    @property
    def identity(self) -> tuple[Any, ...]:
        """What tells this operator from others, as far as it is known: plain values, the same in every process."""
        return (repr(self), *self._details(), *(part.identity for part in self.parts))

    def _details(self) -> tuple[Any, ...]:
        """The plain values, besides its kind, size, dtype and device, that its products depend on."""
        return ()

    @contextmanager
    def many_products(self) -> Iterator[None]:
        """A context for many products in a row: what they all need around them is entered once. Nests."""
        with ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(part.many_products())
            yield

    def matvec(self, v: Tensor) -> Tensor:
        """A v.

        Args: v, shape (size,), of this operator's dtype and device. Returns: the same shape and dtype.
        Raises InvalidInput when the shape, dtype or device differ.
        """
        self.check(v, (self.size,))
        self.deadline.check()
        self.num_products += 1
        return self._matvec(v)

    def matvecs(self, vectors: Tensor) -> Tensor:
        """A applied to each row of `vectors`, shape (count, size); returns the same shape."""
        self.check(vectors, (vectors.shape[0] if vectors.ndim else 0, self.size))
        self.deadline.check()
        self.num_products += vectors.shape[0]
        return self._matvecs(vectors)

    @property
    def part_size(self) -> int:
        """Entries of a vector that this process holds."""
        return self.spread.length(self.size)

    def apply(self, part: Tensor) -> Tensor:
        """This process's part of A v, from its part of v."""
        return self.spread.part(self.matvec(self.spread.whole(part, self.size)))

    def applies(self, parts: Tensor) -> Tensor:
        """The same for each row."""
        return self.matvecs(parts) if self.spread.alone else torch.stack([self.apply(part) for part in parts])

    def whole_rows(self, parts: Tensor) -> Tensor:
        """Whole vectors, as rows, from the processes' parts of them."""
        return parts if self.spread.alone else torch.stack([self.spread.whole(p, self.size) for p in parts])

    def check(self, v: Tensor, shape: tuple[int, ...]) -> None:
        """Raises InvalidInput where `v` has another shape, dtype or device."""
        if v.shape != shape or v.dtype != self.dtype or v.device.type != self.device.type:
            raise InvalidInput(
                f"A vector of shape {tuple(v.shape)}, {v.dtype}, on {v.device} was given to an operator that "
                f"takes shape {shape}, {self.dtype}, on {self.device}; convert the vector first."
            )

    # -- new operators from old ones -------------------------------------------------------------

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.matvec(v)

    def __add__(self, other: LinearOperator) -> LinearOperator:
        return SumOperator(self, other)

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        return SumOperator(self, ScaledOperator(other, -1.0))

    def __mul__(self, factor: float) -> LinearOperator:
        return ScaledOperator(self, factor)

    __rmul__ = __mul__

    def __neg__(self) -> LinearOperator:
        return ScaledOperator(self, -1.0)

    def shifted(self, shift: float) -> LinearOperator:
        """A + shift I; what a weight decay of `shift` adds to a Hessian."""
        return ShiftedOperator(self, shift)

    def diagonally_scaled(self, scale: Tensor) -> LinearOperator:
        """diag(scale) A diag(scale), with `scale` of shape (size,)."""
        return DiagonallyScaledOperator(self, scale)

    def block(self, index: Index) -> LinearOperator:
        """A[index, index]: `index` is a slice, an integer tensor of distinct positions, or a boolean mask."""
        return BlockOperator(self, index)

    def to_dense(self) -> Tensor:
        """The matrix, shape (size, size), by `size` products; for tests and toy sizes."""
        return self.matvecs(torch.eye(self.size, dtype=self.dtype, device=self.device)).T.contiguous()

    @staticmethod
    def from_matrix(matrix: Tensor) -> LinearOperator:
        """An operator from a dense symmetric matrix of shape (size, size)."""
        return MatrixOperator(matrix)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(size={self.size}, dtype={self.dtype}, device='{self.device}')"


class MatrixOperator(LinearOperator):
    """A dense symmetric matrix as an operator."""

    def __init__(self, matrix: Tensor):
        _check_symmetric(matrix)
        super().__init__(matrix.shape[0], matrix.dtype, matrix.device)
        self.matrix = matrix

    def _details(self) -> tuple[Any, ...]:
        return length(self.matrix), float(self.matrix.sum())

    def _matvec(self, v: Tensor) -> Tensor:
        return self.matrix @ v

    def _matvecs(self, vectors: Tensor) -> Tensor:
        return vectors @ self.matrix.T


class FunctionOperator(LinearOperator):
    """A symmetric product given as a function; its symmetry is the caller's promise."""

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        super().__init__(size, dtype, device)
        self.function = function

    def _matvec(self, v: Tensor) -> Tensor:
        product = self.function(v)
        self.check(product, (self.size,))
        return product


class SumOperator(LinearOperator):
    """A + B."""

    def __init__(self, first: LinearOperator, second: LinearOperator):
        if (first.size, first.dtype, first.device) != (second.size, second.dtype, second.device):
            raise InvalidInput(
                f"{first!r} and {second!r} cannot be added; give operators of one size, dtype and device."
            )
        super().__init__(first.size, first.dtype, first.device)
        self.first, self.second = first, second
        self.spread = second.spread if first.spread.alone else first.spread

    @property
    def parts(self) -> tuple[LinearOperator, ...]:
        return self.first, self.second

    def _matvec(self, v: Tensor) -> Tensor:
        return self.first.matvec(v) + self.second.matvec(v)

    def _matvecs(self, vectors: Tensor) -> Tensor:
        return self.first.matvecs(vectors) + self.second.matvecs(vectors)


class _Derived(LinearOperator):
    """An operator of the same size, dtype and device as the one it is made from."""

    def __init__(self, base: LinearOperator):
        super().__init__(base.size, base.dtype, base.device)
        self.base, self.spread = base, base.spread

    @property
    def parts(self) -> tuple[LinearOperator, ...]:
        return (self.base,)


class ScaledOperator(_Derived):
    """factor * A."""

    def __init__(self, base: LinearOperator, factor: float):
        super().__init__(base)
        self.factor = float(factor)

    def _details(self) -> tuple[Any, ...]:
        return (self.factor,)

    def _matvec(self, v: Tensor) -> Tensor:
        return self.base.matvec(v) * self.factor

    def _matvecs(self, vectors: Tensor) -> Tensor:
        return self.base.matvecs(vectors) * self.factor


class ShiftedOperator(_Derived):
    """A + shift I."""

    def __init__(self, base: LinearOperator, shift: float):
        super().__init__(base)
        self.shift = float(shift)

    def _details(self) -> tuple[Any, ...]:
        return (self.shift,)

    def _matvec(self, v: Tensor) -> Tensor:
        return torch.add(self.base.matvec(v), v, alpha=self.shift)

    def _matvecs(self, vectors: Tensor) -> Tensor:
        return torch.add(self.base.matvecs(vectors), vectors, alpha=self.shift)


class DiagonallyScaledOperator(_Derived):
    """diag(scale) A diag(scale)."""

    def __init__(self, base: LinearOperator, scale: Tensor):
        super().__init__(base)
        self.scale = scale.detach().to(dtype=base.dtype, device=base.device)
        self.check(self.scale, (self.size,))

    def _details(self) -> tuple[Any, ...]:
        return (length(self.scale),)

    def _matvec(self, v: Tensor) -> Tensor:
        return self.base.matvec(v * self.scale) * self.scale

    def _matvecs(self, vectors: Tensor) -> Tensor:
        return self.base.matvecs(vectors * self.scale) * self.scale


class BlockOperator(LinearOperator):
    """A[index, index]: zeros outside the block go in, and only the block comes out."""

    def __init__(self, base: LinearOperator, index: Index):
        self.index = _as_index(index, base)
        super().__init__(len(torch.empty(base.size, device="meta")[self.index]), base.dtype, base.device)
        self.base = base

    @property
    def parts(self) -> tuple[LinearOperator, ...]:
        return (self.base,)

    def _details(self) -> tuple[Any, ...]:
        return (str(self.index) if isinstance(self.index, slice) else (len(self.index), int(self.index.sum())),)

    def _matvec(self, v: Tensor) -> Tensor:
        return self._matvecs(v[None])[0]

    def _matvecs(self, vectors: Tensor) -> Tensor:
        padded = vectors.new_zeros(len(vectors), self.base.size)
        padded[:, self.index] = vectors
        if len(vectors) == 1:  # a subclass's single product may be cheaper than its batch of one
            return self.base.matvec(padded[0])[None, self.index]
        return self.base.matvecs(padded)[:, self.index]


def _check_symmetric(matrix: Tensor) -> None:
    """Raises InvalidInput unless the matrix is square, floating point and symmetric to rounding."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.is_floating_point():
        raise InvalidInput(
            f"The matrix has shape {tuple(matrix.shape)} and dtype {matrix.dtype}; expected a square "
            f"floating-point one."
        )
    asymmetry = (matrix - matrix.T).abs().max().item()
    if not asymmetry <= 1e3 * torch.finfo(matrix.dtype).eps * matrix.abs().max().item():
        raise InvalidInput(
            f"The matrix is not symmetric (largest |A - A^T| is {asymmetry:.3g}); give (A + A^T) / 2 if that "
            "is what you mean."
        )


def _as_index(index: Index, base: LinearOperator) -> Index:
    if isinstance(index, slice):
        return index
    positions = index.to(base.device)
    if positions.dtype == torch.bool:
        if positions.shape != (base.size,):
            raise InvalidInput(
                f"A mask of shape {tuple(positions.shape)} was given for a block of an operator of size "
                f"{base.size}; give one entry for each position."
            )
        positions = positions.nonzero().flatten()
    if positions.unique().numel() != positions.numel():
        raise InvalidInput("The positions of a block repeat; give each position once.")
    return positions
