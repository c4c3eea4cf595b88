"""What must be equal on all ranks, compared after steps 1, 2, 3, 10, 30, 100, ...: one message of checksums a look.

Each rank makes one vector of integers (the bits of floats among them) on its device; nothing waits for it. Rank 0
reads what came and keeps what differs from its own.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from diag.distributed.checksums import CHECKSUM_ENTRIES, checksum_of
from diag.distributed.link import Link, Message
from diag.distributed.placement import Placement, gradient_lies_alike, is_spread, own_part
from diag.snapshot.batch import tensors_in
from diag.snapshot.loop.ranks import Difference, RankFacts, RankSetting, SameRows
from diag.snapshot.objective.loss_spy import input_and_target
from diag.watching.observe.loop.moment import due
from diag.watching.observe.rows import Row

COMPARISON_MESSAGES = "comparison"
COMPARISON_HEAD = 4  # number of the look, examples, checksum of the inputs, of the targets (0: not seen)
GROUPS = 8
SETTINGS = 12  # of a group
TENSORS = 4  # of a batch
PRIME = 1_000_003
LAST_BITS = 1e-5  # of a norm: below it two tensors differ in their last bits


class RankComparison:
    """Compares the ranks. parameters, buffers: those that every rank holds whole, by name."""

    def __init__(
        self,
        link: Link,
        parameters: Mapping[str, nn.Parameter],
        placements: Mapping[str, Placement],
        model: nn.Module,
    ) -> None:
        self._link, self._columns = link, list(parameters)
        self._parameters = {n: p for n, p in parameters.items() if placements[n].replicated}
        self._buffers = {n: b for n, b in model.named_buffers() if b.numel() and not is_spread(b)}
        self._waiting: deque[tuple[int, Tensor, Any]] = deque()
        self._asked: deque[tuple[int, Message]] = deque()
        self._sent = 0
        self._first_buffers: NDArray[numpy.int64] | None = None
        self._found: dict[str, dict[int, Difference]] = {"parameters": {}, "buffers": {}, "gradients": {}}
        self._read_so_far: dict[int, int] = {}
        self._compared = self._equal_rows = 0
        self._names: list[tuple[str, int, float]] = []
        self._settings: dict[tuple[int, str, int], RankSetting] = {}
        self._looks: list[int] = []
        self._examples: list[tuple[int, ...]] = []
        self._equal_gradients = 0

    # This rank's part

    def look(self, step: int, row: Row, optimizers: Sequence[Optimizer], batch: tuple[Any, Any]) -> None:
        """Send what this rank has after `step`; batch: the checksums of its inputs and targets."""
        device = next((own_part(p).device for p in self._parameters.values()), torch.device("cpu"))
        vector = torch.cat([part.to(device, non_blocking=True) for part in self._parts(row, optimizers, batch)])
        host, event = _to_host(vector)
        self._waiting.append((step, host, event))
        self.take_up()

    def _parts(self, row: Row, optimizers: Sequence[Optimizer], batch: tuple[Any, Any]) -> list[Tensor]:
        self._sent += 1
        numbers = [torch.as_tensor(n, dtype=torch.int64).reshape(1) for n in (self._sent, row.examples, *batch)]
        self._names = settings_of(optimizers)
        settings = _padded(self._names).view(torch.int64)
        parameters, buffers = list(self._parameters.values()), list(self._buffers.values())
        sums = [_sum(p) for p in parameters]
        checksums = [checksum_of(t).reshape(1) for t in (*parameters, *buffers)]
        return [*numbers, settings, *checksums, *(s.view(torch.int64) for s in sums), self._gradients(row)]

    def _gradients(self, row: Row) -> Tensor:
        """The norms of the gradients on this rank, by column; NaN where there is none, or it is not known."""
        found = torch.full((len(self._columns),), math.nan, dtype=torch.float64)
        for name, columns, values in row.norms:
            if name == "gradient_norm":
                numbers = torch.as_tensor(values)
                found = found.to(numbers.device)
                found[torch.from_numpy(columns).to(found.device)] = numbers.to(torch.float64)
        for column, name in enumerate(self._columns):
            p = self._parameters.get(name)
            if p is not None and is_spread(p) and not gradient_lies_alike(p):
                found[column] = math.nan  # a sum that no rank has yet
        return found.view(torch.int64)

    def take_up(self) -> bool:
        """Go on with what has come, without waiting; whether something new was found."""
        while self._waiting and (self._waiting[0][2] is None or self._waiting[0][2].query()):
            step, host, _ = self._waiting.popleft()
            self._asked.append((step, self._link.gather(COMPARISON_MESSAGES, host)))
        new = False
        while self._asked and self._asked[0][1].ready():
            step, message = self._asked.popleft()
            table = message.result()
            if table is not None and self._link.rank == 0:
                new |= self._read(step, table.numpy())
        return new

    # What rank 0 makes of it

    def _read(self, step: int, table: NDArray[numpy.int64]) -> bool:
        if (table[:, 0] != table[0, 0]).any():
            self._link.broke("the ranks do not make the same steps")
            return False
        self._looks.append(step)
        self._examples = [*self._examples[-15:], tuple(table[:, 1].tolist())]
        at = COMPARISON_HEAD + GROUPS * SETTINGS
        self._compare_rows(table[:, 2], table[:, 3])
        self._compare_settings(step, table[:, COMPARISON_HEAD:at].view(numpy.float64))
        many, few = len(self._parameters), len(self._buffers)
        bits, static = table[:, at : at + many], table[:, at + many : at + many + few]
        sums = table[:, at + many + few : at + 2 * many + few].view(numpy.float64)
        gradients = table[:, at + 2 * many + few :].view(numpy.float64)
        self._compare_parameters(step, bits, sums)
        self._compare_buffers(step, static)
        self._compare_gradients(step, gradients)
        return True

    def _compare_rows(self, inputs: NDArray[numpy.int64], targets: NDArray[numpy.int64]) -> None:
        if not inputs.all():
            return  # the batch of some rank was not seen
        self._compared += 1
        self._equal_rows += bool((inputs == inputs[0]).all() and (targets == targets[0]).all())
        for rank, read in enumerate(zip(inputs.tolist(), targets.tolist(), strict=True)):
            self._read_so_far[rank] = hash((self._read_so_far.get(rank, 0), read))

    def _compare_settings(self, step: int, values: NDArray[numpy.float64]) -> None:
        differ = (values != values[0]) & ~(numpy.isnan(values) & numpy.isnan(values[0]))
        for rank, place in zip(*numpy.nonzero(differ), strict=True):
            name, group, _ = (
                self._names[place] if place < len(self._names) else ("another number of settings", 0, 0)
            )
            key = (int(rank), name, group)
            since = self._settings[key].since if key in self._settings else step
            self._settings[key] = RankSetting(*key, float(values[rank, place]), float(values[0, place]), since)

    def _compare_parameters(self, step: int, bits: NDArray[Any], sums: NDArray[Any]) -> None:
        names = list(self._parameters)
        for rank in range(1, len(bits)):
            differ = numpy.flatnonzero(bits[rank] != bits[0])
            norms = [float(own_part(self._parameters[names[i]]).float().norm()) for i in differ]
            sizes = [abs(sums[rank, i] - sums[0, i]) / max(n, 1e-30) for i, n in zip(differ, norms, strict=True)]
            self._keep("parameters", rank, step, [names[i] for i in differ], max(sizes, default=math.nan))

    def _compare_buffers(self, step: int, bits: NDArray[Any]) -> None:
        """Those that have not changed since the first look: others (running means) follow each rank's data."""
        if self._first_buffers is None:
            self._first_buffers = bits.copy()
            return
        still, names = (bits == self._first_buffers).all(0), list(self._buffers)
        for rank in range(1, len(bits)):
            differ = numpy.flatnonzero((bits[rank] != bits[0]) & still)
            self._keep("buffers", rank, step, [names[i] for i in differ], math.nan)

    def _compare_gradients(self, step: int, norms: NDArray[Any]) -> None:
        known = numpy.isfinite(norms).all(0) & (norms[0] > 0)
        known &= numpy.array([n in self._parameters for n in self._columns])
        if not known.any():
            return
        apart = numpy.abs(norms - norms[0]) / numpy.where(known, norms[0], 1.0)
        self._equal_gradients += bool((apart[:, known] <= LAST_BITS).all())
        for rank in range(1, len(norms)):
            differ = numpy.flatnonzero(known & (apart[rank] > LAST_BITS))
            size = float(apart[rank][differ].max()) if len(differ) else math.nan
            self._keep("gradients", rank, step, [self._columns[i] for i in differ], size)

    def _keep(self, what: str, rank: int, step: int, names: list[str], size: float) -> None:
        before = self._found[what].get(rank)
        if not names:
            self._found[what].pop(rank, None)
            return
        since, times = (before.since, before.times) if before else (step, 0)
        self._found[what][rank] = Difference(rank, tuple(names), since, times + 1, float(size))

    def _differences(self, what: str) -> tuple[Difference, ...]:
        return tuple(self._found[what][rank] for rank in sorted(self._found[what]))

    def _alike(self) -> list[tuple[int, ...]]:
        """Sets of ranks that have read the same at all looks."""
        found: dict[int, list[int]] = {}
        for rank, read in self._read_so_far.items():
            found.setdefault(read, []).append(rank)
        return [tuple(ranks) for ranks in found.values() if len(ranks) > 1]

    def facts(self) -> RankFacts:
        """What has been found so far."""
        return RankFacts(
            world=self._link.world,
            together=True,
            looks=tuple(self._looks),
            parameters=self._differences("parameters"),
            buffers=self._differences("buffers"),
            gradients=self._differences("gradients"),
            replicated=len(self._parameters),
            equal_gradients=self._equal_gradients,
            rows=tuple(SameRows(ranks, self._compared) for ranks in self._alike()),
            rows_compared=self._compared,
            rows_equal=self._equal_rows,
            examples=tuple(self._examples),
            settings=tuple(self._settings.values()),
        )


def _sum(parameter: Tensor) -> Tensor:
    local = own_part(parameter)
    real = torch.view_as_real(local.resolve_conj()) if local.is_complex() else local
    return real.sum(dtype=torch.float64).reshape(1)


class BatchSums:
    """Checksums of what a rank trains on in a step that is compared."""

    def __init__(self) -> None:
        self.step = 1
        self.inputs: Any = 0
        self.targets: Any = 0

    @property
    def is_due(self) -> bool:
        """Whether the step under way is compared."""
        return due(self.step)

    def called(self, args: Any, kwargs: Mapping[str, Any]) -> None:
        """The model was called in training."""
        if self.is_due:
            self.inputs = _added(self.inputs, (args, dict(kwargs)))

    def loss_called(self, args: Any, kwargs: Mapping[str, Any]) -> None:
        """A loss was computed."""
        _, targets = input_and_target(args, kwargs)
        if self.is_due and isinstance(targets, Tensor) and not targets.requires_grad:
            self.targets = _added(self.targets, targets)

    def ended(self) -> tuple[Any, Any]:
        """The step is over: its checksums."""
        found, self.inputs, self.targets = (self.inputs, self.targets), 0, 0
        self.step += 1
        return found


def _added(before: Any, batch: Any) -> Any:
    tensors = [batch] if isinstance(batch, Tensor) else tensors_in(batch)
    for t in [t for t in tensors if type(t) is Tensor and t.numel()][:TENSORS]:
        before = before * PRIME + checksum_of(t, CHECKSUM_ENTRIES)
    return before


def settings_of(optimizers: Sequence[Optimizer]) -> list[tuple[str, int, float]]:
    """The hyperparameters that are numbers, by name and number of the group, of the first groups."""
    found = []
    for number, group in enumerate([g for o in optimizers for g in o.param_groups][:GROUPS]):
        plain = {name: value for name, value in group.items() if name != "params"}
        plain |= {f"{k}[{i}]": v for k, t in group.items() if isinstance(t, tuple) for i, v in enumerate(t)}
        numbers = [(name, number, value) for name, v in sorted(plain.items()) if not math.isnan(value := _float(v))]
        found += numbers[:SETTINGS]
    return found


def _padded(settings: Sequence[tuple[str, int, float]]) -> Tensor:
    """Their values in a vector of one length on all ranks; NaN where there is none."""
    values = torch.full((GROUPS * SETTINGS,), math.nan, dtype=torch.float64)
    values[: len(settings)] = torch.tensor([value for _, _, value in settings], dtype=torch.float64)
    return values


def _float(value: Any) -> float:
    if isinstance(value, Tensor) and not value.is_cpu:
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _to_host(vector: Tensor) -> tuple[Tensor, Any]:
    """The vector on the host, and the event after which it is there (None: it is)."""
    if vector.is_cpu:
        return vector, None
    if vector.device.type != "cuda":
        return vector.cpu(), None
    host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
    host.copy_(vector, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(vector.device))
    return host, event
