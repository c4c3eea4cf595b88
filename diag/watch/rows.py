"""One optimizer step as a row of the record, and reading its numbers back without waiting for the device.

While a step is observed its numbers are tensors. On the CPU they are read at once. On another device they are
gathered into one vector and copied to pinned memory in the background; the row is written once the copy has
arrived, a step or two later, and in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from diag.quantities.history import History

Columns = NDArray[numpy.intp]
CLIP_EPSILON = 1e-6  # what torch.nn.utils.clip_grad_norm_ adds to the norm that it divides by


@dataclass
class Row:
    """What has been observed of one step; every number may still be a tensor on the device.

    norms: (field, columns, values); applied: norms after clipping where they had to be measured; clips:
    (columns, max_norm, total_norm); unscale: (columns, what the scaler had multiplied them with).
    """

    losses: list[Any] = field(default_factory=list)
    learning_rate: Any = numpy.nan
    norms: list[tuple[str, Columns, Tensor]] = field(default_factory=list)
    applied: list[tuple[Columns, Tensor]] = field(default_factory=list)
    clips: list[tuple[Columns, Any, Any]] = field(default_factory=list)
    unscale: list[tuple[Columns, Any]] = field(default_factory=list)
    skipped: Any = False
    optimizer: Mapping[str, Any] = field(default_factory=dict)

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


class Rows:
    """Finished rows, in order, on their way to `write`."""

    def __init__(self, layers: Mapping[str, int], first_step: int, write: Callable[[History], None]) -> None:
        self._names, self._sizes = tuple(layers), tuple(layers.values())
        self._write, self.step, self._waiting = write, first_step, deque[tuple[int, Row, Readback]]()

    def add(self, row: Row) -> int:
        """Give the row the next step number and write it as soon as its numbers are on the host."""
        self.step += 1
        self._waiting.append((self.step, row, Readback(row.numbers())))
        self.drain()
        return self.step

    def drain(self, wait: bool = False) -> None:
        """Write the rows whose numbers have arrived; with `wait` all of them."""
        while self._waiting and (wait or self._waiting[0][2].ready()):
            step, row, numbers = self._waiting.popleft()
            self._write(self._history(step, row, iter(numbers.values())))

    def _history(self, step: int, row: Row, numbers: Any) -> History:
        loss = [float(next(numbers)) for _ in row.losses]
        rate = float(next(numbers))
        table = {name: numpy.full(len(self._names), numpy.nan) for name in _FIELDS}
        for name, columns, _ in row.norms:
            table[name][columns] = next(numbers)
        gradient, applied, seen = table["gradient_norm"], numpy.ones(len(self._names)), self._seen(row)
        after = [(columns, next(numbers)) for columns, _ in row.applied]
        for columns, limit, _ in row.clips:
            total = next(numbers)
            applied[columns] *= min(1.0, limit / (total + CLIP_EPSILON)) if total == total else total
        for columns, _ in row.unscale:
            gradient[columns] /= next(numbers)
        applied *= gradient
        for columns, values in after:
            applied[columns] = values
        with numpy.errstate(over="ignore"):
            columns32: dict[str, Any] = {name: values.astype(numpy.float32)[None] for name, values in table.items()}
        mean_loss = sum(loss) / len(loss) if loss else numpy.nan
        skipped = bool(next(numbers))
        total = numpy.linalg.norm(applied[seen]) if seen.any() and not skipped else numpy.nan
        return History(
            steps=numpy.array([step]),
            layers=self._names,
            sizes=self._sizes,
            loss=numpy.array([mean_loss]),
            loss_finite=numpy.array([not loss or bool(numpy.isfinite(mean_loss))]),
            learning_rate=numpy.array([rate]),
            gradient_finite=(numpy.isfinite(gradient) | ~seen)[None],
            applied_gradient_norm=numpy.array([total]),
            skipped=numpy.array([skipped]),
            total_steps=step,
            optimizer=row.optimizer,
            **columns32,
        )

    def _seen(self, row: Row) -> NDArray[numpy.bool_]:
        seen = numpy.zeros(len(self._names), bool)
        for name, columns, _ in row.norms:
            if name == "gradient_norm":
                seen[columns] = True
        return seen


_FIELDS = ("gradient_norm", "parameter_norm", "update_norm", "distance")


def _read(number: Any) -> Any:
    if not isinstance(number, Tensor):
        return number
    number = number.detach()
    return number.double().numpy() if number.ndim else number.item()
