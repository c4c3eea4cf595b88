"""An operator with known directions taken out, and Rayleigh-Ritz in a given subspace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diag.linalg.operator import LinearOperator
from diag.linalg.reductions import IN_ONE_PROCESS, Spread, combine, dot, gram, length, orthogonalise


class DeflatedOperator(LinearOperator):
    """P A P with P = I - U^T U, for orthonormal rows U (k, size), of which this process gives its parts.

    Its Lanczos runs start inside the complement, so a start vector's quadrature sees only that.
    """

    def __init__(self, base: LinearOperator, directions: Tensor):
        super().__init__(base.size, base.dtype, base.device)
        self.base, self.spread = base, base.spread
        self.directions = orthonormal(directions, spread=base.spread)

    def project(self, v: Tensor) -> Tensor:
        """P v, in place, for a part; two passes, as the known directions can be nearly all of v."""
        for _ in range(2):
            orthogonalise(v, self.directions, spread=self.spread)
        return v

    def _details(self) -> tuple[Any, ...]:
        return length(self.directions), float(self.directions.sum())

    @property
    def parts(self) -> tuple[LinearOperator, ...]:
        return (self.base,)

    def apply(self, part: Tensor) -> Tensor:
        """This process's part of P A v, from its part of v."""
        self.deadline.check()
        self.num_products += 1
        return self.project(self.base.apply(part))

    def _matvec(self, v: Tensor) -> Tensor:
        return self.spread.whole(self.project(self.base.apply(self.spread.part(v))), self.size)

    def known_part(self) -> tuple[Tensor, float]:
        """The eigenvalues (k,) of U A U^T, float64 on the host, and |U A P|_F^2, which is zero for exact
        eigenvectors; one product for each direction."""
        images = self.base.applies(self.directions)
        values = torch.linalg.eigvalsh(gram(self.directions, images, self.spread))
        for image in images:
            self.project(image)
        return values.cpu(), sum(float(dot(image, image, self.spread)) for image in images)


def orthonormal(rows: Tensor, against: Tensor | None = None, spread: Spread = IN_ONE_PROCESS) -> Tensor:
    """An orthonormal basis (rows) of the span of `rows` (k, size), orthogonal to the rows of `against`.

    By the inverse square root of the float64 Gram matrix (Loewdin: nearest to the rows that were given),
    twice, as matrix products; rows that depend on the others to rounding are dropped.
    """
    for _ in range(2):
        if against is not None:
            rows = rows - combine(gram(rows, against, spread), against, rows.dtype)
        values, columns = torch.linalg.eigh(gram(rows, rows, spread))
        keep = values > values.max() * 100 * torch.finfo(rows.dtype).eps ** 2
        weights = (columns[:, keep] / values[keep].sqrt()).T
        rows = combine(columns @ weights if keep.all() else weights, rows, rows.dtype)
    return rows
