"""One optimizer step as a row of the record, and reading its numbers back without waiting for the device.

While a step is observed its numbers are tensors. On the CPU they are read at once. On another device they are
gathered into one vector and copied to pinned memory in the background; the row is written once the copy has
arrived, a step or two later, and in order. Where several processes train, the numbers are then put together over
the ranks (`Sharing`), and the row is written once the answer has come.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

Columns = NDArray[numpy.intp]
FLOAT32_SQUARED = 1e76  # below it no norm is beyond float32
CLIP_EPSILON = 1e-6  # what torch.nn.utils.clip_grad_norm_ adds to the norm that it divides by


@dataclass
class Row:
    """What has been observed of one step; every number may still be a tensor on the device.

    norms: (field, columns, values); applied: norms after clipping where they had to be measured; clips:
    (columns, max_norm, total_norm); unscale: (columns, what the scaler had multiplied them with). examples: how
    many this process trained on; partial: other ranks' parts of some gradients are not in the norms.
    """

    losses: list[Any] = field(default_factory=list)
    learning_rate: Any = numpy.nan
    norms: list[tuple[str, Columns, Any]] = field(default_factory=list)
    applied: list[tuple[Columns, Any]] = field(default_factory=list)
    clips: list[tuple[Columns, Any, Any]] = field(default_factory=list)
    unscale: list[tuple[Columns, Any]] = field(default_factory=list)
    skipped: Any = False
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    examples: int = 0
    partial: bool = False

    def numbers(self) -> list[Any]:
        """Every number of the row, in a fixed order."""
        return [
            *self.losses,
            self.learning_rate,
            *(values for _, _, values in self.norms),
            *(values for _, values in self.applied),
            *(total for _, _, total in self.clips),
            *(scale for _, scale in self.unscale),
            self.skipped,
        ]

    def take(self, numbers: Iterator[Any]) -> None:
        """Put plain values in the places of the row's numbers, in their order."""
        self.losses = [next(numbers) for _ in self.losses]
        self.learning_rate = next(numbers)
        self.norms = [(name, columns, next(numbers)) for name, columns, _ in self.norms]
        self.applied = [(columns, next(numbers)) for columns, _ in self.applied]
        self.clips = [(columns, limit, next(numbers)) for columns, limit, _ in self.clips]
        self.unscale = [(columns, next(numbers)) for columns, _ in self.unscale]
        self.skipped = next(numbers)


class FromRanks(Protocol):
    """What the ranks make of a row together, on its way."""

    def ready(self) -> bool:
        """Whether taking it would not wait."""


class Sharing(Protocol):
    """Puts a row's numbers together over the ranks, in the order of the rows."""

    def ask(self, row: Row) -> FromRanks:
        """Tell the other ranks of this row of plain numbers."""

    def merge(self, row: Row, answer: FromRanks) -> None:
        """Replace the row's numbers by what the ranks have in common; waits for the answer."""


class Readback:
    """Numbers on their way from the devices to the host."""

    def __init__(self, numbers: list[Any]) -> None:
        self._numbers = numbers
        away = [i for i, n in enumerate(numbers) if isinstance(n, Tensor) and n.device.type != "cpu"]
        self._away, self._event, self._host = away, None, None
        if away:
            device = numbers[away[0]].device
            wide = torch.float32 if device.type == "mps" else torch.float64
            flat = [numbers[i].detach().reshape(-1).to(device, wide, non_blocking=True) for i in away]
            self._sizes = [len(f) for f in flat]
            gathered = torch.cat(flat)
            self._host = torch.empty(gathered.shape, dtype=gathered.dtype, pin_memory=device.type == "cuda")
            self._host.copy_(gathered, non_blocking=device.type == "cuda")
            if device.type == "cuda":
                self._event = torch.cuda.Event()
                self._event.record(torch.cuda.current_stream(device))

    def ready(self) -> bool:
        """Whether `values` would not wait."""
        return self._event is None or self._event.query()

    def values(self) -> list[Any]:
        """The numbers as floats and float64 arrays; waits for the device where it must."""
        if self._event is not None:
            self._event.synchronize()
        result = [_read(n) if i not in self._away else None for i, n in enumerate(self._numbers)]
        if self._host is not None:
            for i, part in zip(self._away, self._host.split(self._sizes), strict=True):
                result[i] = part.numpy() if self._numbers[i].ndim else float(part)
        return result


class RowQueue:
    """Finished rows, in order, on their way to `write`, as one-row tables of the given dtype."""

    def __init__(self, dtype: numpy.dtype[Any], first_step: int, write: Callable[[Any, Row], None]) -> None:
        self._write, self.step = write, first_step
        self._waiting: deque[tuple[int, Row, Readback]] = deque()
        self._asked: deque[tuple[int, Row, FromRanks]] = deque()
        self.sharing: Sharing | None = None
        self._table, empty = _unobserved(dtype), _unobserved(dtype)
        # Every row is written from the one table, through views of its bytes and of its columns.
        self._bytes, self._empty = self._table.view(numpy.uint8), empty.view(numpy.uint8)
        self._fields = {n: f[0] if (f := self._table[n]).ndim > 1 else f for n in dtype.names or ()}

    def add(self, row: Row) -> int:
        """Give the row the next step number and write it as soon as its numbers are on the host."""
        self.step += 1
        alone = self.sharing is None and not self._waiting
        if alone and self._finish_usual(self.step, row):
            return self.step
        numbers = row.numbers()
        if alone and (here := _read_at_once(numbers)) is not None:
            self._finish(self.step, row, iter(here))
        else:
            self._waiting.append((self.step, row, Readback(numbers)))
            self.drain()
        return self.step

    def drain(self, wait: bool = False) -> None:
        """Write the rows whose numbers have arrived; with `wait` all of them."""
        while self._waiting and (wait or self._waiting[0][2].ready()):
            step, row, numbers = self._waiting.popleft()
            if self.sharing is None:
                self._finish(step, row, iter(numbers.values()))
            else:
                row.take(iter(numbers.values()))
                self._asked.append((step, row, self.sharing.ask(row)))
        while self._asked and (wait or self._asked[0][2].ready()):
            step, row, answer = self._asked.popleft()
            if self.sharing is not None:
                self.sharing.merge(row, answer)
            self._finish(step, row, iter(row.numbers()))

    def _finish_usual(self, step: int, row: Row) -> bool:
        """Write what nearly every step on the host is, a loss and gradient norms, all finite; False for any
        other."""
        if len(row.losses) != 1 or len(row.norms) > 1 or row.partial:
            return False
        if row.applied or row.clips or row.unscale:
            return False
        loss, values, columns, square = row.losses[0], None, None, 0.0
        at_hand = type(loss) is float or (isinstance(loss, Tensor) and loss.is_cpu)
        if not at_hand or row.skipped is not False:
            return False
        if row.norms:
            name, columns, values = row.norms[0]
            if name != "gradient_norm" or not isinstance(values, numpy.ndarray):
                return False
            with numpy.errstate(over="ignore"):
                square = float(values.dot(values))
        number = loss if type(loss) is float else loss.item()
        if type(row.learning_rate) is not float or not math.isfinite(number) or not square < FLOAT32_SQUARED:
            return False
        fields = self._fields
        self._bytes[:] = self._empty
        fields["steps"][0] = fields["total_steps"][0] = step
        fields["learning_rate"][0], fields["loss"][0] = row.learning_rate, number
        if values is not None:
            fields["gradient_norm"][columns] = values
            fields["applied_gradient_norm"][0] = math.sqrt(square)
        self._write(self._table, row)
        return True

    def _finish(self, step: int, row: Row, numbers: Iterator[Any]) -> None:
        fields = self._fields
        self._bytes[:] = self._empty
        fields["steps"][0] = fields["total_steps"][0] = step
        losses = [next(numbers) for _ in row.losses]
        fields["learning_rate"][0] = next(numbers)
        if losses:
            loss = sum(losses) / len(losses)
            fields["loss"][0], fields["loss_finite"][0] = loss, math.isfinite(loss)
        gradients = []
        for name, columns, _ in row.norms:
            if name == "gradient_norm":
                gradients.append((columns, next(numbers)))
            else:
                self._put(name, columns, next(numbers))
        applied = self._applied(row, gradients, numbers)
        skipped = fields["skipped"][0] = bool(next(numbers))
        for columns, values in gradients:
            self._put("gradient_norm", columns, values)
            fields["gradient_finite"][columns] = numpy.isfinite(values)
        if gradients and not (skipped or row.partial):
            with numpy.errstate(over="ignore"):  # as above
                fields["applied_gradient_norm"][0] = math.sqrt(sum(float(v @ v) for v in applied))
        self._write(self._table, row)

    def _put(self, name: str, columns: Columns, values: Any) -> None:
        with numpy.errstate(over="ignore"):  # a norm that float32 cannot hold is recorded as infinite
            self._fields[name][columns] = values

    def _applied(self, row: Row, gradients: list[tuple[Columns, Any]], numbers: Iterator[Any]) -> list[Any]:
        """The gradient norms after clipping; those before are divided by a scaler's scale in place."""
        after = [(columns, next(numbers)) for columns, _ in row.applied]
        limits = [(columns, limit, next(numbers)) for columns, limit, _ in row.clips]
        scales = [(columns, next(numbers)) for columns, _ in row.unscale]
        if not (after or limits or scales):
            return [values for _, values in gradients]
        width = len(self._fields["gradient_norm"])
        gradient, factor = numpy.zeros(width), numpy.ones(width)
        for columns, values in gradients:
            gradient[columns] = values
        for columns, limit, total in limits:
            factor[columns] *= min(1.0, limit / (total + CLIP_EPSILON)) if total == total else total
        for columns, scale in scales:
            gradient[columns] /= scale
        gradients[:] = [(columns, gradient[columns]) for columns, _ in gradients]
        with numpy.errstate(invalid="ignore"):  # an infinite one is clipped to 0 times infinity
            applied = gradient * factor
        for columns, values in after:
            applied[columns] = values
        return [applied]


def _unobserved(dtype: numpy.dtype[Any]) -> NDArray[Any]:
    """One row in which nothing was observed: NaN, and True for what is finite as far as anybody knows."""
    table = numpy.zeros(1, dtype)
    for name in dtype.names or ():
        if table[name].dtype.kind == "f":
            table[name] = numpy.nan
        elif name.endswith("_finite"):
            table[name] = True
    return table


def _read_at_once(numbers: list[Any]) -> list[Any] | None:
    """Plain values where nothing is on a device, else None."""
    found = []
    for number in numbers:
        if isinstance(number, Tensor):
            if not number.is_cpu:
                return None
            number = _read(number)
        found.append(number)
    return found


def _read(number: Any) -> Any:
    if not isinstance(number, Tensor):
        return number
    return number.detach().numpy() if number.ndim else number.item()
