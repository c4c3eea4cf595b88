"""What the numbers that values of actions are compared with are made of: the values of the next states, as the
network itself or a copy of it (a target network) gives them, times a discount, plus rewards.

Nothing of that is in the graph, as it is computed without gradients. But rows with one reward lie on one line over
the values of their next states, and the slope of that line is the discount.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diag.snapshot.batch import tensors_in
from diag.watching.hooks.model_hook import ForwardHook, compiled_wrappers

NEXT_CALLS_KEPT = 4  # of each network, the last ones
NEXT_ROWS_COMPARED = 128
LEAST_ROWS = 5  # with different values, that lie on one line
LEAST_DISCOUNT, WIDTH_OF_SLOPES, ROUNDING_OF_NEXT = 0.05, 1e-3, 1e-5
FEW_VALUES, LEAST_VALUES = 3, 3  # that targets take, and values of next states to one such number

Float64s = NDArray[numpy.float64]
MODEL = -1  # the number of the model itself, among its copies


class NextValues:
    """Follows calls of the model without gradients and calls of its copies, from the moment that values of actions
    are seen in the loss. copies: the copies that are known by now, those that are gone as None."""

    def __init__(self, copies: Callable[[], Sequence[nn.Module | None]]) -> None:
        self._copies = copies
        self._calls: deque[tuple[int, Tensor]] = deque(maxlen=4 * NEXT_CALLS_KEPT)
        self._handles: dict[int, Any] = {}

    def follow(self) -> None:
        """Listen to the copies, but for those that are compiled."""
        for number, copy in enumerate(self._copies()):
            if copy is None or number in self._handles:
                continue
            compiled = getattr(copy, "_compiled_call_impl", None) is not None or compiled_wrappers(copy)
            hook = ForwardHook(copy, _teller(self._calls, number), _teller(self._calls, number), _untold)
            self._handles[number] = None if compiled else copy.register_forward_hook(hook, with_kwargs=True)

    def called(self, outputs: Any) -> None:
        """The model was called without gradients."""
        if self._handles:
            _teller(self._calls, MODEL)((), {}, outputs, None)

    def of(self, shape: tuple[int, ...]) -> list[tuple[int, Tensor]]:
        """The outputs of this shape since the last backward pass, and whose they are."""
        return [(number, t) for number, t in self._calls if tuple(t.shape) == shape]

    def forget(self) -> None:
        """A backward pass is over."""
        self._calls.clear()

    def close(self) -> None:
        """Listen no more."""
        for handle in self._handles.values():
            if handle is not None:
                handle.remove()
        self._handles = {}
        self._calls.clear()


def _teller(calls: deque[tuple[int, Tensor]], number: int) -> Callable[[Any, Any, Any, Any], None]:
    def tell(args: Any, kwargs: Any, outputs: Any, module: Any) -> None:
        found = [t for t in tensors_in(outputs)[:1] if t.ndim == 2 and t.is_cpu and t.is_floating_point()]
        calls.extend((number, t.detach()) for t in found)

    return tell


def _untold(error: Exception) -> None:
    """What could not be kept of a call is not kept."""


def values_of_next(calls: list[tuple[int, Tensor]]) -> list[tuple[int, Float64s]]:
    """What each call gives for the next state of each row: the largest value, or that of the action which another
    call finds the best (double Q-learning); those of copies first."""
    found = list[tuple[int, Float64s]]()
    with torch.no_grad():
        for number, values in sorted(calls, key=lambda call: call[0], reverse=True):
            found.append((number, _numbers(values.amax(1))))
            for _, others in calls:
                if others is not values:
                    found.append((number, _numbers(values.gather(1, others.argmax(1, keepdim=True)))))
    return found


def _numbers(t: Tensor) -> Float64s:
    return numpy.asarray(t.detach().reshape(-1)[:NEXT_ROWS_COMPARED].double().numpy())


def discount_in(targets: Float64s, values: Float64s) -> float:
    """What the values are multiplied by in the targets, where that is the same in many rows: the slope of a line on
    which rows of at least five different values lie. NaN where there is no such line.

    >>> values = numpy.array([0.1, 0.25, 0.3, 0.55, 0.9, 1.2, 1.7, 2.1])
    >>> round(discount_in(-1 + 0.9 * values, values), 6)
    0.9
    """
    pairs = numpy.unique(numpy.stack([values, targets], 1), axis=0)
    if len(pairs) < LEAST_ROWS or not numpy.isfinite(pairs).all():
        return math.nan
    v, y = pairs.T
    if float(numpy.abs(y - v).max()) <= ROUNDING_OF_NEXT * float(numpy.abs(pairs).max()):
        return math.nan  # the values themselves, as in a distillation: no reward is in them
    one, other = numpy.triu_indices(len(v), 1)
    apart = v[one] - v[other]
    scale = float(numpy.abs(pairs).max())
    told = numpy.abs(apart) > WIDTH_OF_SLOPES * scale
    slopes = numpy.sort((y[one] - y[other])[told] / apart[told])
    slopes = slopes[slopes > LEAST_DISCOUNT]
    if not len(slopes):
        return math.nan
    ends = numpy.searchsorted(slopes, slopes * (1 + WIDTH_OF_SLOPES), "right")
    first = int((ends - numpy.arange(len(slopes))).argmax())
    slope = float(numpy.median(slopes[first : ends[first]]))
    return (
        slope
        if _on_one_line(v, y - slope * v, ROUNDING_OF_NEXT * scale * max(1.0, slope)) >= LEAST_ROWS
        else math.nan
    )


def _on_one_line(values: Float64s, rest: Float64s, rounding: float) -> int:
    """Of how many different values the rest is the same number."""
    order = numpy.argsort(rest)
    ends = numpy.searchsorted(rest[order], rest[order] + 4 * rounding, "right")
    return max(len(numpy.unique(values[order[i:end]])) for i, end in enumerate(ends))


def settled_in(targets: Float64s, values: Float64s) -> tuple[float, tuple[float, ...]]:
    """The share of rows whose target is one of a few numbers, each in rows of several different values; and these
    numbers.

    >>> settled_in(numpy.array([-1.0, -1.0, -1.0, 4.5]), numpy.array([3.0, 4.0, 5.0, 5.0]))
    (0.75, (-1.0,))
    """
    numbers, which, counts = numpy.unique(targets, return_inverse=True, return_counts=True)
    most = [int(k) for k in numpy.argsort(-counts)[:FEW_VALUES]]
    kept = [k for k in most if len(numpy.unique(values[which == k])) >= LEAST_VALUES]
    return float(sum(counts[k] for k in kept) / len(targets)), tuple(sorted(float(numbers[k]) for k in kept))
