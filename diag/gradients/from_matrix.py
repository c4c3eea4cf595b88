"""Per-example gradients that are already there: a matrix that the user gives, or several put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diag.errors import InvalidInput, type_of
from diag.gradients.methods import GIVEN_AS_NUMBERS
from diag.gradients.per_example import Consumer, Coverage, PerExampleGradients
from diag.gradients.rules.blocks import Block, Dense


class MatrixGradients(PerExampleGradients):
    """Per-example gradients that are already there as a matrix (n, P), in one layer or in named slices.

    `layers` maps a name to its number of columns, in order. Raises InvalidInput where the shapes disagree.
    """

    def __init__(self, matrix: Tensor, layers: Mapping[str, int] | None = None) -> None:
        matrix = torch.as_tensor(matrix)
        if matrix.ndim != 2 or not matrix.is_floating_point():
            raise InvalidInput(
                f"The per-example gradients have the shape {tuple(matrix.shape)} and dtype {matrix.dtype}; "
                "expected a floating-point matrix with one row per example."
            )
        sizes = dict(layers or {"all": matrix.shape[1]})
        if sum(sizes.values()) != matrix.shape[1]:
            raise InvalidInput(
                f"The layers have {sum(sizes.values())} columns together and the matrix has {matrix.shape[1]}; "
                "give each layer's number of columns."
            )
        super().__init__({f"{name}.gradient": (size,) for name, size in sizes.items()}, matrix.shape[0])
        self._matrix, self._sizes = matrix, sizes

    def select(self, rows: Sequence[int]) -> PerExampleGradients:
        return MatrixGradients(self._matrix[list(rows)], self._sizes)

    @property
    def coverage(self) -> Coverage:
        return Coverage(1.0, 1.0, dict.fromkeys(self.shapes, GIVEN_AS_NUMBERS))

    def stream(self, consume: Consumer) -> None:
        for name, columns in self.columns.items():
            consume(slice(0, self.num_examples), name, Dense(self._matrix[:, columns]))


class StackedGradients(PerExampleGradients):
    """Several gradients of the same parameters one below the other: of tasks, losses or data sets.

    Raises InvalidInput where their parameters differ.
    """

    def __init__(self, parts: Sequence[PerExampleGradients]) -> None:
        if not parts or any(part.shapes != parts[0].shapes for part in parts):
            raise InvalidInput(
                "The gradients to be put together are not of the same parameters; give at least one, and for each "
                "the same model."
            )
        super().__init__(parts[0].shapes, sum(part.num_examples for part in parts))
        self._parts = list(parts)
        self.num_batches = sum(part.num_batches for part in parts)

    @property
    def coverage(self) -> Coverage:
        return self._parts[0].coverage

    @property
    def examples(self) -> Tensor:
        """Which example of its own part each gradient is of: losses on the same data share theirs."""
        return torch.cat([part.examples for part in self._parts])

    def stream(self, consume: Consumer) -> None:
        start = 0
        for part in self._parts:
            part.stream(partial(_shifted, consume, start))
            start += part.num_examples


def _shifted(consume: Consumer, start: int, rows: slice, name: str, block: Block) -> None:
    consume(slice(rows.start + start, rows.stop + start), name, block)


def as_gradients(value: Any) -> PerExampleGradients:
    """Per-example gradients as they are, or around a matrix (m, P) that the user gives."""
    if isinstance(value, PerExampleGradients):
        return value
    if isinstance(value, Tensor) or hasattr(value, "__array__"):
        return MatrixGradients(torch.as_tensor(value))
    raise InvalidInput(
        f"per_example_gradients is {type_of(value)}; expected PerExampleGradients or a matrix (m, P)."
    )
