"""Statistics of the outputs of a model's nonlinearities and layers on the data, in one forward pass.

Functions are watched and not modules, so that `F.relu(x)` in a forward method counts as `nn.ReLU()` does; each call
is named after the module that it was made in. Sums are kept for each unit, so that memory does not grow with the
data: a unit is a channel of an image (axis 1 of four axes or more), else an entry of the last axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diag.errors import MissingQuantity
from diag.snapshot.batch import Batch, tensors_in
from diag.snapshot.forward import heard
from diag.snapshot.inside.blocks import example_blocks, number_true
from diag.snapshot.inside.layers import floating
from diag.snapshot.inside.listener import NamingListener, unheard
from diag.snapshot.objective.comparison import output_tensor
from diag.snapshot.snapshot import Snapshot

# Where a function's derivative is at most about 1 % of its largest, as the absolute value of what comes out.
FLAT_ABOVE = {"tanh": 0.995, "sigmoid": 0.0025, "hardtanh": 1.0, "softsign": 0.9}
NONLINEARITIES: dict[Any, str] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), "relu"),
    **dict.fromkeys((F.relu6, F.hardtanh), "hardtanh"),
    **dict.fromkeys((torch.tanh, Tensor.tanh, Tensor.tanh_, F.tanh), "tanh"),
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid, Tensor.sigmoid_, F.sigmoid), "sigmoid"),
    **dict.fromkeys(
        (F.gelu, F.silu, F.elu, F.selu, F.celu, F.softplus, F.mish, F.leaky_relu, F.hardswish), "smooth"
    ),
}
LAYER_FUNCTIONS: dict[Any, str] = {
    F.linear: "linear",
    **dict.fromkeys(
        (F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d, F.conv_transpose2d), "convolution"
    ),
}
MODEL_OUTPUT = "output"
MOST_OUTPUTS = 8


@dataclass(frozen=True)
class Activation:
    """One call of a function in the forward pass, over all examples; its entries grouped into `units`.

    name: the module that made the call; "output" is what the model returns. function: "relu", "tanh", "sigmoid",
    "smooth", "hardtanh", "linear", "convolution" or "output". mean, std, largest: of all entries (largest in
    absolute value). zero: share of entries that are exactly zero. dead: share of units that are zero on every
    example. constant: share of units that take one and the same value on every example and position. spread: how
    much of the entries' size depends on the example: root mean square over units of the standard deviation over
    examples and positions, over the root mean square of all entries. flat: share of entries where the function is
    flat, 0 for functions that have no flat ends. gain: root mean square of the entries over that of the function's
    input (NaN for the output). non_finite: entries that are infinite or not a number. given_finite: the function's
    input held none such.
    """

    name: str
    function: str
    units: int
    mean: float
    std: float
    largest: float
    zero: float
    dead: float
    constant: float
    spread: float
    flat: float
    gain: float
    non_finite: int
    given_finite: bool = True

    @property
    def size(self) -> float:
        """The root mean square of all entries."""
        return (self.mean**2 + self.std**2) ** 0.5


class _Sums:
    """Sums over the batches of one call's outputs: for each unit, and in all."""

    def __init__(self, function: str, units: int, device: torch.device) -> None:
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.function, self.units, self.count = function, units, 0
        self.total = torch.zeros(units, dtype=wide, device=device)
        self.squares, self.low = torch.zeros_like(self.total), torch.full_like(self.total, torch.inf)
        self.high = torch.full_like(self.total, -torch.inf)
        self.zeros = self.flat = 0.0
        self.bad = self.taken = 0
        self.taken_squares = 0.0
        self.given_finite = True

    def add(self, values: Tensor, before: Tensor | None) -> None:
        """Take in one output, and what it was made of."""
        if before is not None and before.is_floating_point():
            self.taken += before.numel()
            self.taken_squares += sum(self._squares(part) for part in example_blocks(before.detach()))
        for part in example_blocks(values.detach()):
            self._add(part)

    def _squares(self, part: Tensor) -> float:
        squares = part.to(self.total.dtype).square()
        if math.isfinite(total := float(squares.sum())):
            return total
        self.given_finite &= bool(torch.isfinite(part).all())
        return float(squares.nansum())

    def _add(self, part: Tensor) -> None:
        axes = (0, *range(2, part.ndim)) if part.ndim >= 4 else tuple(range(part.ndim - 1))
        wide = part.to(self.total.dtype)
        squares = wide.square().sum(axes)
        if not bool(torch.isfinite(squares).all()):
            finite = torch.isfinite(part)
            self.bad += number_true(~finite)
            part, wide = torch.where(finite, part, 0.0), torch.where(finite, wide, 0.0)
            squares = wide.square().sum(axes)
        self.count += part.numel() // self.units
        self.zeros += number_true(part == 0)
        if self.function in FLAT_ABOVE:
            self.flat += number_true(_is_flat(self.function, wide))
        self.total += wide.sum(axes)
        self.squares += squares
        self.low = torch.minimum(self.low, part.amin(axes))
        self.high = torch.maximum(self.high, part.amax(axes))

    def statistics(self, name: str) -> Activation:
        entries = self.count * self.units
        mean, square = float(self.total.sum()) / entries, float(self.squares.sum()) / entries
        within = (self.squares / self.count - (self.total / self.count).square()).clamp_min(0)
        return Activation(
            name=name,
            function=self.function,
            units=self.units,
            mean=mean,
            std=max(square - mean**2, 0.0) ** 0.5,
            largest=float(torch.maximum(self.low.abs(), self.high.abs()).max()),
            zero=self.zeros / entries,
            dead=float(((self.low == 0) & (self.high == 0)).sum()) / self.units,
            constant=float((self.low == self.high).sum()) / self.units,
            spread=(float(within.mean()) / square) ** 0.5 if square > 0 else 0.0,
            flat=self.flat / entries,
            gain=(square / (self.taken_squares / self.taken)) ** 0.5 if self.taken_squares else float("nan"),
            non_finite=self.bad,
            given_finite=self.given_finite,
        )


def activations(snapshot: Snapshot) -> tuple[Activation, ...]:
    """Statistics of the outputs of nonlinearities and layers on the data, in the order in which they are called.

    The model is in evaluation mode. Raises MissingQuantity for a model whose calls differ from batch to batch.
    """
    sums = heard(snapshot, "activations", ActivationListener).sums
    if not sums:
        raise MissingQuantity(
            "the model calls no layer and no nonlinearity of torch.nn.functional that is known here."
        )
    return tuple(s.statistics(name) for (name, _, _), s in sums.items())


class ActivationListener(NamingListener):
    """Sums up what the functions in the two tables give, by module, function and number of the call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.sums: dict[tuple[str, str, int], _Sums] = {}
        self._mode = _Listening(self.sums, self.inside, 0)

    def during(self, batch: Batch) -> _Listening:
        """What intercepts the functions."""
        self._mode = _Listening(self.sums, self.inside, batch.size)
        return self._mode

    def called(self, batch: Batch, outputs: Any) -> None:
        """The outputs are one more entry each."""
        for tensor in _outputs(outputs):
            if tensor.ndim > 1 or self.sums:  # a row of numbers alone may be anything
                with unheard(tensor):
                    self._mode.add(MODEL_OUTPUT, MODEL_OUTPUT, floating(tensor))


class _Listening(TorchFunctionMode):
    """Intercepts every function that is called, and sums up the outputs of those in the two tables."""

    def __init__(self, sums: dict[tuple[str, str, int], _Sums], inside: Callable[[], str], rows: int) -> None:
        super().__init__()
        self._sums, self._inside, self._rows = sums, inside, rows
        self._calls: dict[tuple[str, str], int] = {}
        self._nested = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = NONLINEARITIES.get(func) or LAYER_FUNCTIONS.get(func)
        if kind is None or self._nested:
            return func(*args, **(kwargs or {}))
        self._nested = True  # where one of these calls another, the user made one call
        try:
            value = func(*args, **(kwargs or {}))
        finally:
            self._nested = False
        if isinstance(value, Tensor):
            before = next((a for a in args if isinstance(a, Tensor)), None)
            with unheard(value, before):
                self.add(self._inside(), kind, value, before)
        return value

    def add(self, name: str, kind: str, values: Tensor, before: Tensor | None = None) -> None:
        """Take in one output; the same place called again in this batch is another entry."""
        if values.ndim == 1 and len(values) == self._rows > 1:  # one number for each example is a column
            values = values[:, None]
        if not values.is_floating_point() or values.numel() == 0 or values.ndim < 2:
            return
        number = self._calls[name, kind] = self._calls.get((name, kind), -1) + 1
        if (name, kind, number) not in self._sums:
            self._sums[name, kind, number] = _Sums(kind, _units_of(values), values.device)
        known = self._sums[name, kind, number]
        if known.units == _units_of(values):  # sequences of another length put time where units are
            known.add(values, before)


def _outputs(outputs: Any) -> list[Tensor]:
    """The logits, where the model names them, or all that it returns; one number for each example is a column."""
    if not isinstance(outputs, (tuple, list)):
        try:
            return [output_tensor(outputs)]
        except MissingQuantity:
            pass
    several = [t for t in tensors_in(outputs) if t.ndim][:MOST_OUTPUTS]
    return [t[:, None] if t.ndim == 1 else t for t in several]


def _units_of(values: Tensor) -> int:
    return values.shape[1] if values.ndim >= 4 else values.shape[-1]


def _is_flat(function: str, entries: Tensor) -> Tensor:
    limit = FLAT_ABOVE[function]
    if function == "sigmoid":
        return (entries < limit) | (entries > 1 - limit)
    return entries.abs() >= limit
