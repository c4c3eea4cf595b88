"""What a loss between numbers is asked for in evaluation, beside what it is asked for in training.

Only calls on a whole output of the network as it is, the same one in both: where outputs are changed first (a scale
that is undone, an exponential) the targets may be of another scale, and rightly so. What is on a device is not
read.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from diag.snapshot.batch import tensors_in
from diag.snapshot.loop.evaluated import AskedInEvaluation
from diag.snapshot.objective.loss_spy import input_and_target
from diag.watching.observe.loop.data.targets import OF_NUMBERS
from diag.watching.observe.loop.modes import is_dense
from diag.watching.observe.loop.moment import Moment, due

NUMBERS_OF_CALL, TARGET_CALLS_KEPT, CALLS_OF_EVALUATION, OUTPUTS_FOLLOWED = 512, 8, 8, 8
FEWEST_NUMBERS_ASKED = 64
LARGEST_OUTPUT, NUMBERS_BESIDE = 1 << 20, 16  # numbers of an output, and those that are looked at again
LARGEST_WHOLE = 1 << 24  # beyond, float32 holds whole numbers alone
QUARTILES = (0.25, 0.5, 0.75)

# The memory, which is not kept from being freed but not told as another's either; where in it; how many numbers.
_Where = tuple[StorageWeakRef, int, int]


class EvaluatedTargets:
    """Follows the outputs of the model and the losses between numbers that are called on them."""

    def __init__(self, moment: Moment) -> None:
        self._moment = moment
        self._outputs: dict[_Where, tuple[int, Tensor]] = {}  # which output it is; some numbers, as they were
        self._calls = self._evaluations = self._others = 0
        self._function, self._place = "", -1
        self._asked: deque[Tensor] = deque(maxlen=TARGET_CALLS_KEPT)
        self._evaluated: list[Tensor] = []

    def training_call(self, outputs: Any) -> None:
        """The model was called in training."""
        self._follow(outputs if self._is_read(self._calls + 1) else None)

    def quiet_call(self, outputs: Any) -> None:
        """The model was called without gradients."""
        self._follow(outputs if self._asked and self._evaluations < CALLS_OF_EVALUATION else None)

    def _is_read(self, call: int) -> bool:
        """Whether this call of a loss between numbers is read; none is where other losses come first."""
        return self._others < TARGET_CALLS_KEPT and (call <= TARGET_CALLS_KEPT or due(call))

    def _follow(self, outputs: Any) -> None:
        tensors = enumerate(tensors_in(outputs)[:OUTPUTS_FOLLOWED])
        small = ((p, t) for p, t in tensors if t.is_cpu and is_dense(t) and t.numel() <= LARGEST_OUTPUT)
        self._outputs = {_where(t): (p, _some(t)) for p, t in small}

    def loss_called(self, function: str, args: Any, kwargs: Mapping[str, Any]) -> None:
        """A loss function was called in training."""
        if function not in OF_NUMBERS:
            self._others += not self._calls
            return
        self._calls += 1
        if not self._is_read(self._calls):
            return
        found = self._compared(args, kwargs)
        if found is not None and (not self._asked or (function, found[0]) == (self._function, self._place)):
            self._function, self._place = function, found[0]
            self._asked.append(found[1])

    def evaluated(self, function: str, args: Any, kwargs: Mapping[str, Any]) -> None:
        """A loss function was called without gradients."""
        if function not in OF_NUMBERS or not self._asked or self._evaluations >= CALLS_OF_EVALUATION:
            return
        found = self._compared(args, kwargs)
        if found is not None and found[0] == self._place:
            self._evaluations += 1
            self._evaluated.append(found[1])
            self._moment.news(("evaluated targets", self._evaluations), "asked_in_evaluation")

    def _compared(self, args: Any, kwargs: Mapping[str, Any]) -> tuple[int, Tensor] | None:
        """Which of the network's outputs is compared as it is, and some of the numbers that it is compared with."""
        values, targets = input_and_target(args, kwargs)
        tensors = isinstance(values, Tensor) and isinstance(targets, Tensor)
        if not tensors or not (values.is_cpu and targets.is_cpu and is_dense(values) and is_dense(targets)):
            return None
        found = self._outputs.get(_where(values))
        if found is None or not torch.equal(_some(values), found[1]):
            return None
        plain = targets.is_floating_point() and values.numel() == targets.numel() > 0
        if not plain or _where(targets) in self._outputs:
            return None
        flat = targets.detach().reshape(-1)
        return found[0], flat[:: -(-len(flat) // NUMBERS_OF_CALL)].double()

    def facts(self) -> AskedInEvaluation:
        """As plain data."""
        if not self._evaluated:
            return AskedInEvaluation(self._function)
        own, other = torch.cat(list(self._asked)), torch.cat(self._evaluated)
        own, other = own[own.isfinite()], other[other.isfinite()]
        if min(len(own), len(other)) < FEWEST_NUMBERS_ASKED:
            return AskedInEvaluation(self._function, len(own), len(other))
        at = torch.tensor(QUARTILES, dtype=torch.float64)
        return AskedInEvaluation(
            self._function,
            len(own),
            len(other),
            tuple(torch.quantile(own, at).tolist()),
            tuple(torch.quantile(other, at).tolist()),
            distinct=len(own.unique()),
            whole=_whole(own),
            evaluated_whole=_whole(other),
        )


def _where(t: Tensor) -> _Where:
    return StorageWeakRef(t.untyped_storage()), int(t.storage_offset()), t.numel()


def _some(t: Tensor) -> Tensor:
    """A few of its numbers, by which a change in place is told."""
    flat = t.detach().reshape(-1)
    return flat[:: 1 + len(flat) // NUMBERS_BESIDE].clone()


def _whole(numbers: Tensor) -> float:
    """The share of whole numbers; NaN where the format has no others."""
    if float(numbers.abs().max()) >= LARGEST_WHOLE:
        return math.nan
    return float((numbers == numbers.round()).double().mean())
