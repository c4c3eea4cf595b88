"""Do targets stand in the rows of their inputs? Rows of inputs beside the targets that a loss compares with what
the model made of them.

Kept are the first rows of a few calls, and where a DataLoader shows it their places in the data set. Targets that
were moved by a row, turned round or exchanged in a part of the rows fit other rows than their own.
"""

from __future__ import annotations

import math
import zlib
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from diag.snapshot.autograd_graph import nodes_before
from diag.snapshot.batch import tensors_in
from diag.snapshot.loop.paired import PairedFacts
from diag.snapshot.objective.loss_spy import input_and_target
from diag.watching.observe.loop.answers.features import (
    readable,
    row_features,
    target_numbers,
    told_apart,
)
from diag.watching.observe.loop.answers.scored import FEWEST_OF_A_BATCH, PairedRows, paired_facts
from diag.watching.observe.loop.data.targets import shift_of
from diag.watching.observe.loop.moment import Moment, due

ROWS_KEPT = 2048  # of each loss
CALLS_KEPT, LOSSES_FOLLOWED, CALLS_OPEN = 64, 6, 4
TENSORS_COMPARED, INPUTS_OF_A_CALL = 3, 8
NODES_TO_CALL = 64
EARLY = (30, 130)  # steps
LAST_LOOKS = 4  # whose answers are compared with the targets
MUCH_LATER = 4  # times the step of the facts, from which on what has been added since is told, too
SIZES_TOLD = (64, 256, 1024, 2048)  # rows that are news
WEIGHTED = "none"


@dataclass
class _Call:
    """One call of the model: the numbers of the graph's nodes that made its outputs, its inputs' rows as they are
    compared, and the places of the rows in the data set."""

    nodes: frozenset[int]
    inputs: list[Tensor]
    places: Any


@dataclass
class _Loss:
    """What is kept of one loss: looks, and how well its last outputs said the targets."""

    function: str
    number: int
    looks: list[PairedRows] = field(default_factory=list)
    rows: int = 0
    told_apart: deque[float] = field(default_factory=lambda: deque(maxlen=LAST_LOOKS))
    early: list[float] = field(default_factory=list)  # the same of looks before the data is known by heart
    seen: int = 0
    marks: set[bytes] = field(default_factory=set)  # of the rows that are kept
    first_output: float = math.nan
    facts: PairedFacts | None = None
    told: tuple[int, int] = 0, 0  # rows and step of the facts


class Pairing:
    """Follows the model's calls and the losses of them."""

    def __init__(self, moment: Moment) -> None:
        self._moment = moment
        self._losses: dict[tuple[str, int], _Loss] = {}
        self._calls: deque[_Call] = deque(maxlen=CALLS_OPEN)
        self._since: dict[str, int] = {}
        self._inside: list[tuple[str, Any, Tensor]] = []  # losses of a call that has not ended, if they are of it

    def training_call(self, args: Any, kwargs: Mapping[str, Any], outputs: Any, places: Any) -> None:
        """The model was called in training, with these rows of a data set if that is known."""
        inside, self._inside = self._inside, []
        nodes = frozenset(t.grad_fn._sequence_nr() for t in tensors_in(outputs) if t.grad_fn is not None)
        inputs = [t for t in tensors_in((args, dict(kwargs))) if t.is_cpu]
        self._calls.append(_Call(nodes, inputs[:INPUTS_OF_A_CALL], places))
        for name, prediction, target in inside:  # the model returned its loss
            if any(t.numel() == 1 and t.grad_fn is not None for t in tensors_in(outputs)):
                self._add(name, prediction, target, self._calls[-1])

    def backward_done(self) -> None:
        """A backward pass has ended: no batch is kept past it, and calls of losses are counted from one."""
        self._since, self._inside = {}, []
        self._calls.clear()

    def loss_called(self, name: str, args: Any, kwargs: Mapping[str, Any]) -> None:
        """A loss function of torch returned a value that has a graph."""
        prediction, target = input_and_target(args, kwargs)
        plain = isinstance(prediction, Tensor) and isinstance(target, Tensor) and not target.requires_grad
        if plain and kwargs.get("reduction", "mean") != WEIGHTED and target.is_cpu and target.ndim:
            self.compared(name, prediction, target)

    def compared(self, name: str, prediction: Tensor, target: Tensor, node: Any = None) -> None:
        """A loss compares `prediction`, which `node` of the graph made, with targets that have no graph."""
        call = self._call_of(prediction.grad_fn if node is None else node)
        if call is not None:
            self._add(name, prediction, target, call)
        elif len(self._inside) < LOSSES_FOLLOWED:
            self._inside.append((name, prediction.detach(), target))

    def _call_of(self, node: Any) -> _Call | None:
        if node is None:
            return None
        known = {n: call for call in self._calls for n in call.nodes}
        found = (known.get(n._sequence_nr()) for n in nodes_before([node], NODES_TO_CALL))
        return next((call for call in found if call is not None), None)

    def _add(self, name: str, prediction: Tensor, target: Tensor, call: _Call) -> None:
        number = self._since[name] = self._since.get(name, 0) + 1
        key = name, number
        if key not in self._losses and len(self._losses) >= LOSSES_FOLLOWED:
            return
        loss = self._losses.setdefault(key, _Loss(name, number))
        loss.seen += 1
        more = loss.rows < ROWS_KEPT and len(loss.looks) < CALLS_KEPT
        if not more and not due(loss.seen) and loss.seen % Moment.EVERY:
            return
        rows = next((len(t) for t in call.inputs if t.ndim), 0)
        targets = target_numbers(target, rows) if rows >= FEWEST_OF_A_BATCH else None
        if targets is None:
            return
        score = told_apart(prediction, targets)
        if score == score:
            loss.told_apart.append(score)
            if EARLY[0] <= self._moment.step <= EARLY[1]:
                loss.early.append(score)
        if loss.first_output != loss.first_output and targets.is_floating_point():
            loss.first_output = float(prediction.detach().double().square().mean().sqrt())
        if more:
            self._keep(loss, targets, target, call)

    def _keep(self, loss: _Loss, targets: Tensor, target: Tensor, call: _Call) -> None:
        inputs = [t for t in call.inputs if readable(t, len(targets)) and not _gives(t, target, targets)]
        inputs = inputs[:TENSORS_COMPARED]
        if not inputs:
            return
        features = [row_features(t) for t in inputs]
        places = call.places
        known = torch.as_tensor(places).clone() if len(places) == len(targets) else None
        whole = tuple(not t.is_floating_point() for t in inputs)
        rows = torch.cat([*features, targets.float()], 1).numpy()
        marks = {row.tobytes() for row in rows}
        if 2 * len(marks & loss.marks) > len(targets) or len(marks) < FEWEST_OF_A_BATCH:
            return  # the data has been gone through: rows that come again say nothing new
        loss.marks |= marks
        loss.looks.append(PairedRows(features, whole, targets, known))
        before, loss.rows = loss.rows, loss.rows + len(targets)
        for size in SIZES_TOLD:
            if before < size <= loss.rows:
                self._moment.news(("paired", loss.function, loss.number, size), "paired")

    def facts(self) -> tuple[PairedFacts, ...]:
        """Each loss as plain data."""
        step = self._moment.step
        return tuple(_told(loss, self._kinds(loss), step) for loss in self._losses.values() if loss.looks)

    def _kinds(self, loss: _Loss) -> int:
        """A number that losses share whose targets are the same in another order: two mixed halves of a batch."""
        first = loss.looks[0].targets.double()
        return zlib.crc32(first.flatten().sort().values.numpy().tobytes())


def _gives(t: Tensor, target: Tensor, targets: Tensor) -> bool:
    """Whether the input holds the targets: themselves, or as the tokens that come next."""
    if t.numel() == target.numel() and torch.equal(t.reshape(-1).double(), target.reshape(-1).double()):
        return True
    whole = not t.is_floating_point() and not targets.is_floating_point() and t.ndim == targets.ndim == 2
    return whole and t.shape[1] > 1 and shift_of(t.long(), targets, -1) is not None


def _told(loss: _Loss, kinds: int, step: int) -> PairedFacts:
    rows, then = loss.told
    grown = any(rows < size <= loss.rows for size in SIZES_TOLD)
    late = loss.rows > rows and step >= MUCH_LATER * then
    if loss.facts is None or grown or late:  # they take some ten milliseconds
        loss.facts = paired_facts(loss.function, loss.number, loss.looks, loss.facts)
        loss.told = loss.rows, step
    return replace(
        loss.facts,
        told_apart=_mean(loss.told_apart),
        early=_mean(loss.early),
        kinds=kinds,
        first_output=loss.first_output,
    )


def _mean(scores: Collection[float]) -> float:
    return sum(scores) / len(scores) if scores else math.nan
