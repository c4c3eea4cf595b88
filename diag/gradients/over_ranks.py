"""Per-example gradients of data that are split over the ranks of torch.distributed.

Each rank computes those of its own examples. What is one number an example is gathered; sums over groups of
examples are added up over ranks, and inner products of groups are those of the sums. No gradient of a single
example leaves its rank, so inner products of two examples are unavailable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diag.distributed.together import Together
from diag.errors import Unsupported
from diag.gradients.engine import ModelGradients
from diag.gradients.per_example import Consumer, Coverage, PerExampleGradients, as_groups
from diag.linalg.deadline import free_memory
from diag.snapshot.parameters import layer_of

NOT_OF_SINGLE_EXAMPLES = (
    "Gradients of single examples stay on the rank that has them, so what compares two examples of different ranks "
    "cannot be had; measure it in one process on all the data, without ranks=."
)
SUMS_TOO_LARGE = (
    "The summed gradients of {} groups of examples take {:.2g} GB on every rank, more than half of what is free "
    "({:.2g} GB); measure a model of fewer parameters, or free memory."
)
FREE_SHARE_OF_SUMS = 0.5
COPIES_OF_SUMS = 3  # a rank's own, the message and what comes back


class GradientsOfRanks(PerExampleGradients):
    """The gradients of all ranks' examples, those of rank 0 first.

    own: of this rank's examples. scale: what these count against the mean loss of all (see `scale_of`). Every rank
    asks the same in the same order.
    """

    def __init__(self, own: ModelGradients, together: Together, scale: float) -> None:
        sizes = together.totals(torch.arange(together.world).eq(together.rank) * own.num_examples)
        super().__init__(own.shapes, int(sizes.sum()))
        self._own, self._together, self._scale = own, together, scale
        self._first = int(sizes[: together.rank].sum())
        self._squares: dict[str, Tensor] = {}

    @property
    def coverage(self) -> Coverage:
        return self._own.coverage

    def losses(self) -> Tensor:
        """(n,): each example's share of the loss."""
        return self._together.rows(lambda: self._own.losses() * self._scale, "losses")

    def squared_norms_by_layer(self) -> dict[str, Tensor]:
        """Per layer, (n,) float64: ||g_i||^2 over that layer's parameters. Computed once."""
        if not self._squares:
            self._squares = self._by_layer(self._own.squared_norms_by_layer, self._scale**2, "gradient norms")
        return self._squares

    def project_by_layer(self, directions: Tensor) -> dict[str, Tensor]:
        """Per layer, (n, m) float64: the layer's part of <g_i, v_j>."""
        return self._by_layer(lambda: self._own.project_by_layer(directions), self._scale, "projections")

    def _by_layer(self, compute: Callable[[], dict[str, Tensor]], scale: float, what: str) -> dict[str, Tensor]:
        table = self._together.rows(lambda: torch.stack(list(compute().values()), 1) * scale, what)
        return dict(zip(self.layers, table.unbind(1), strict=True))

    def group_sums(self, groups: Sequence[Tensor]) -> Tensor:
        """(number of groups, P) float64: the sum of g_i over each group, of examples of all ranks."""
        self._refuse_many(len(groups))
        last = self._first + self._own.num_examples
        mine = [torch.tensor([i - self._first for i in g if self._first <= i < last]) for g in as_groups(groups)]
        like = torch.zeros(len(mine), self.num_parameters, dtype=torch.float64)
        return self._together.sum(lambda: self._own.group_sums([g.long() for g in mine]) * self._scale, like)

    def group_gram_by_layer(self, groups: Sequence[Tensor]) -> dict[str, Tensor]:
        """Per layer, (G, G) float64: inner products of the groups' summed gradients."""
        sums = self.group_sums(groups)
        grams = {layer: torch.zeros(len(sums), len(sums), dtype=torch.float64) for layer in self.layers}
        for name, columns in self.columns.items():
            part = sums[:, columns]
            grams[layer_of(name)] += part @ part.T
        return grams

    def _refuse_many(self, groups: int) -> None:
        size = COPIES_OF_SUMS * groups * self.num_parameters * 8
        free = self._together.least(free_memory(torch.device("cpu")))
        if size > FREE_SHARE_OF_SUMS * free:
            raise Unsupported(SUMS_TOO_LARGE.format(groups, size / 1e9, free / 1e9))

    def stream(self, consume: Consumer) -> None:
        raise Unsupported(NOT_OF_SINGLE_EXAMPLES)

    def select(self, rows: Sequence[int]) -> PerExampleGradients:
        raise Unsupported(NOT_OF_SINGLE_EXAMPLES)

    def with_permuted_targets(self, seed: int = 0) -> PerExampleGradients:
        """Refused: a permutation over ranks would send targets from one to another."""
        raise Unsupported(
            "Targets are not permuted over ranks, of which each has a share of the data; leave out contrast=True, "
            "or measure in one process."
        )
