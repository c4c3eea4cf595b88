"""Networks that are asked for the noise that was put into their input: is it in there, and at more than one level?

The target of an error between numbers is standard normal noise of the input's size. What was added to the input is
correlated with it, entry by entry; what was drawn once more is not, and nothing can be learned of it. Another
argument that is one number for all rows of all calls is a level (a time) that is never drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from diag.snapshot.loop.arithmetic import Odd
from diag.watching.observe.loop.formula.chains import OddFound
from diag.watching.observe.loop.formula.noise import STANDARD_ERRORS_OF_NOISE, is_standard_noise

FEWEST_TO_CORRELATE, FEWEST_ROWS_OF_A_LEVEL, ARGUMENTS_LOOKED_AT = 2048, 8, 8


class Denoisers:
    """Follows the inputs and the targets of one backward pass."""

    def __init__(self) -> None:
        self._inputs: list[Tensor] = []
        self._found: list[OddFound] = []
        self._level: dict[int, float] | None = None  # arguments that were one number at all looks

    def training_call(self, tensors: list[Tensor]) -> None:
        """The model was called in training, and the pass that follows is to be read."""
        self._inputs = [t.detach() for t in tensors[:ARGUMENTS_LOOKED_AT]]

    def loss_called(self, prediction: Any, target: Any) -> None:
        """An error between numbers is to be descended."""
        inputs, self._inputs = self._inputs, []
        there = isinstance(prediction, Tensor) and isinstance(target, Tensor) and inputs
        if (
            not there
            or target.requires_grad
            or prediction.shape != target.shape
            or target.numel() < FEWEST_TO_CORRELATE
        ):
            return
        noisy = next((t for t in inputs if t.shape == target.shape and t.is_floating_point()), None)
        if noisy is None or not noisy.is_cpu or not is_standard_noise(target):
            return
        levels = {i: v for i, t in enumerate(inputs) if (v := _one_number(t, len(noisy))) is not None}
        before = levels if self._level is None else self._level
        self._level = {i: v for i, v in levels.items() if before.get(i) == v}
        if self._level:
            place, value = next(iter(self._level.items()))
            self._found.append(OddFound(Odd.ONE_LEVEL, {"argument": float(place), "value": value}))
        elif not _related(noisy, target) and not _related(prediction.detach(), target):
            self._found.append(OddFound(Odd.NOISE_UNRELATED, {"numbers": float(target.numel())}))

    def found(self) -> Iterator[OddFound]:
        """What the last pass showed; forgets it."""
        found, self._found, self._inputs = self._found, [], []
        yield from found

    def forget(self) -> None:
        """The pass that begins is not read."""
        self._inputs, self._found = [], []


def _one_number(t: Tensor, rows: int) -> float | None:
    """The number that an argument of one number a row is for all rows."""
    if not t.is_cpu or t.numel() != rows or rows < FEWEST_ROWS_OF_A_LEVEL or t.ndim < 1 or len(t) != rows:
        return None
    first = t.reshape(-1)[0]
    return float(first) if bool((t == first).all()) else None


def _related(a: Tensor, b: Tensor) -> bool:
    """Whether the two are correlated, entry by entry, by more than chance gives."""
    x, y = (t.reshape(-1).double() for t in (a, b))
    x, y = x - x.mean(), y - y.mean()
    size = float(x.norm() * y.norm())
    return size > 0 and abs(float(torch.dot(x, y))) / size > STANDARD_ERRORS_OF_NOISE / len(x) ** 0.5
