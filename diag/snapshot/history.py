"""The step-by-step record of a training run: one row an optimizer step, one column a parameter tensor.

A watched run writes it. For a model without one, `history` measures a single row from the snapshot.
"""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy
from numpy.typing import NDArray

from diag.errors import MissingQuantity
from diag.linalg.reductions import length
from diag.snapshot import parameters
from diag.snapshot.snapshot import Snapshot
from diag.snapshot.state.unmade import refuse_unmade

CELLS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class History:
    """T recorded steps of L parameter tensors; NaN marks what was not observed at a step.

    steps (T,) int64: the number of the optimizer step, from 1; strictly increasing.
    layers, sizes: the L parameter names in `named_parameters()` order, and their numbers of elements.
    loss (T,): what the step descended: the sum over its micro-batches of what backward() was called on, unscaled,
        or what the user gave for each. `loss_finite` (T,) bool is False where the loss was seen and was infinite or
        not a number; True where it was not observed.
    learning_rate (T,): of the first parameter group.
    gradient_norm (T, L): 2-norms before clipping, true (unscaled) values; inf or NaN entries of a gradient
        give a norm that is not finite. `gradient_finite` (T, L) bool tells these from what was not observed.
    applied_gradient_norm (T,): norm of the whole gradient as the optimizer used it, after clipping.
    parameter_norm, update_norm, distance (T, L): of the parameters after the step, of the step itself, and
        from the parameters at the start.
    skipped (T,) bool: the GradScaler left the step out.
    total_steps: how many steps there were in all, `steps` being those that were recorded.
    optimizer: kind, lr and the like as plain data. notes: what could not be observed, and why.
    """

    steps: NDArray[numpy.int64]
    layers: tuple[str, ...]
    sizes: tuple[int, ...]
    loss: NDArray[numpy.float64]
    loss_finite: NDArray[numpy.bool_]
    learning_rate: NDArray[numpy.float64]
    gradient_norm: NDArray[numpy.float32]
    gradient_finite: NDArray[numpy.bool_]
    applied_gradient_norm: NDArray[numpy.float64]
    parameter_norm: NDArray[numpy.float32]
    update_norm: NDArray[numpy.float32]
    distance: NDArray[numpy.float32]
    skipped: NDArray[numpy.bool_]
    total_steps: int
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.steps)

    def rows(self, index: Any) -> History:
        """The same record restricted to some rows (a slice, an index array or a mask)."""
        series = {
            f.name: getattr(self, f.name)[index]
            for f in dataclasses.fields(self)
            if isinstance(getattr(self, f.name), numpy.ndarray)
        }
        return dataclasses.replace(self, **series)


def parts(history: History) -> Iterator[History]:
    """The record in consecutive parts of about `CELLS` numbers a column (one at least, which may have no row), so
    that a long record of many layers never lies in memory as a whole."""
    step = max(1, CELLS // max(1, len(history.layers)))
    if len(history) <= step:
        yield history
        unmap(history.gradient_norm)
        return
    for at in range(0, len(history), step):
        yield history.rows(slice(at, at + step))
        unmap(history.gradient_norm)


def unmap(array: Any) -> None:
    """Give back the memory that the read parts of a memory-mapped file take; they can be read again at any time."""
    while isinstance(array, numpy.ndarray):
        array = array.base
    if isinstance(array, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        array.madvise(mmap.MADV_DONTNEED)


def by_rows(history: History, function: Callable[[History], Any]) -> NDArray[Any]:
    """`function`, which gives one value a row, of the whole record, computed part by part."""
    return numpy.concatenate([function(part) for part in parts(history)])


def taken(history: History, rows: NDArray[numpy.int64]) -> History:
    """A copy of these rows (in order) of the record, read part by part."""
    kept, at = [], 0
    for part in parts(history):
        kept.append(part.rows(rows[(rows >= at) & (rows < at + len(part))] - at))
        at += len(part)
    names = [name for name, a in vars(history).items() if isinstance(a, numpy.ndarray)]
    series: dict[str, Any] = {name: numpy.concatenate([getattr(k, name) for k in kept]) for name in names}
    return dataclasses.replace(history, **series)


def thinned_record(history: History, cells: int) -> History:
    """The record itself, or evenly spaced rows of it that have at most about `cells` numbers a column."""
    stride = 1 + len(history) * len(history.layers) // cells
    return history if stride == 1 else taken(history, numpy.arange(0, len(history), stride))


def empty_history(layers: Mapping[str, int], length: int = 0) -> History:
    """A history of `length` rows in which nothing was observed; `layers` maps names to sizes."""
    line, table = numpy.full(length, numpy.nan), numpy.full((length, len(layers)), numpy.nan, numpy.float32)
    return History(
        steps=numpy.arange(1, length + 1),
        layers=tuple(layers),
        sizes=tuple(layers.values()),
        loss=line.copy(),
        loss_finite=numpy.ones(length, bool),
        learning_rate=line.copy(),
        gradient_norm=table.copy(),
        gradient_finite=numpy.ones(table.shape, bool),
        applied_gradient_norm=line.copy(),
        parameter_norm=table.copy(),
        update_norm=table.copy(),
        distance=table.copy(),
        skipped=numpy.zeros(length, bool),
        total_steps=length,
    )


def history(snapshot: Snapshot) -> History:
    """The record of the watched run that the snapshot belongs to, else one row measured here and now.

    The single row has the loss and the norms of the full-data gradient and of the parameters; the update and
    the distance come from `previous=` where it is given.
    """
    if snapshot.history is not None:
        known: History = snapshot.history
        return known
    refuse_unmade(snapshot.model)
    values, gradient = snapshot.quantity("params"), snapshot.quantity("gradient")
    row = empty_history({name: p.numel() for name, p in values.items()}, 1)
    norms = numpy.array([[length(g) for g in gradient.values()]], numpy.float32)
    sizes = numpy.array([[length(p) for p in values.values()]], numpy.float32)
    loss = parameters.loss_at(snapshot)(values)
    total = numpy.linalg.norm(norms.astype(float), axis=1)
    return dataclasses.replace(
        row,
        loss=numpy.array([loss]),
        loss_finite=numpy.isfinite(numpy.array([loss])),
        gradient_norm=norms,
        gradient_finite=numpy.isfinite(norms),
        applied_gradient_norm=total,
        parameter_norm=sizes,
        total_steps=0,
    )


def loss_record(snapshot: Snapshot) -> NoReturn:
    """The losses at consecutive steps, which one moment does not have.

    Raises MissingQuantity: a watched run gives the record, or the user does.
    """
    raise MissingQuantity(
        "a snapshot is one moment, and this is a record of several steps; measure inside diag.watch, or pass "
        "loss_record=."
    )
