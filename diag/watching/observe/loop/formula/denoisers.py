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
        self._levels: dict[
            int, float | None
        ] = {}  # of arguments of one number a row: that of all rows of all looks

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
        levels = {i: _one_number(t) for i, t in enumerate(inputs) if _is_a_level(t, len(noisy))}
        self._levels = {i: v if self._levels.get(i, v) == v else None for i, v in levels.items()}
        place, value = next(iter(self._levels.items()), (0, None))
        if value is not None and None not in self._levels.values():  # beside a level, a class may be one for all
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


def _is_a_level(t: Tensor, rows: int) -> bool:
    """Whether an argument has one number a row."""
    return t.is_cpu and t.numel() == rows >= FEWEST_ROWS_OF_A_LEVEL and t.ndim > 0 and len(t) == rows


def _one_number(t: Tensor) -> float | None:
    """The number that an argument is for all rows."""
    first = t.reshape(-1)[0]
    return float(first) if bool((t == first).all()) else None


def _related(a: Tensor, b: Tensor) -> bool:
    """Whether the two are correlated, entry by entry, by more than chance gives."""
    x, y = (t.reshape(-1).double() for t in (a, b))
    x, y = x - x.mean(), y - y.mean()
    size = float(x.norm() * y.norm())
    return size > 0 and abs(float(torch.dot(x, y))) / size > STANDARD_ERRORS_OF_NOISE / len(x) ** 0.5
