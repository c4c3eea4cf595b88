"""What consecutive steps were taken on: whether the same examples, in any order, and what was descended.

Only in full-batch training are the changes of the losses from step to step free of batch noise. Nothing is kept of
the examples but one number for each step, the sum over its examples of a random projection squared, which their
order leaves alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diag.snapshot.batch import tensors_in
from diag.snapshot.preserve import exact_arithmetic

RELATIVE = 1e-5  # two different batches of 60,000 examples differ by about 1e-2, another order by roundings
EXAMPLES_KEPT = 256

Pairs = Sequence[tuple[Any, Any]]  # tensors or floats, of one number


class StepExamples:
    """Follows the inputs and the losses of training while `looking`."""

    def __init__(self) -> None:
        self.looking = False
        self._now: list[tuple[int, Tensor]] = []
        self._steps: deque[list[tuple[int, Tensor]]] = deque(maxlen=EXAMPLES_KEPT)
        self._losses: deque[Pairs] = deque(maxlen=EXAMPLES_KEPT)
        self._directions: dict[tuple[int, torch.device], Tensor] = {}

    def look(self, needed: bool) -> None:
        """Start looking, or stop and forget."""
        if needed != self.looking:
            self.looking = needed
            self._now = []
            self._steps.clear()
            self._losses.clear()

    def forward_called(self, args: Any, kwargs: Any) -> None:
        """The model was called in training."""
        if self.looking:
            self._now.append(self._number(tensors_in((args, kwargs))))

    def stepped(self, losses: Pairs, skipped: Any) -> None:
        """An optimizer step ended; `losses`: of each micro-batch the loss, and what backward() was called on."""
        if self.looking:
            now, self._now = self._now, []
            if not bool(skipped):
                self._steps.append(now)
                self._losses.append(losses)

    def same(self, count: int) -> bool | None:
        """Whether the last `count` steps used the same examples; None where fewer have been looked at."""
        if len(self._steps) < count:
            return None
        last = [_distinct(step) for step in list(self._steps)[-count:]]
        sizes = {sum(n for n, _ in step) for step in last}
        if len(sizes) > 1 or 0 in sizes:
            return False
        numbers = torch.tensor([sum(number for _, number in step) for step in last], dtype=torch.float64)
        return bool((numbers - numbers[0]).abs().max() <= RELATIVE * numbers[0].abs())

    @property
    def per_step(self) -> int:
        """Examples in the last step that was looked at."""
        return sum(n for n, _ in _distinct(self._steps[-1])) if self._steps else 0

    def losses(self, count: int) -> Tensor:
        """(count, 2) float64: of each of the last steps the mean loss, and the sum that was descended; NaN where
        they were not seen."""
        found = torch.full((count, 2), torch.nan, dtype=torch.float64)
        for row, pairs in zip(found, list(self._losses)[-count:], strict=False):
            if pairs:
                row[0] = sum(float(loss) for loss, _ in pairs) / len(pairs)
                row[1] = sum(float(descended) for _, descended in pairs)
        return found

    def _number(self, tensors: list[Tensor]) -> tuple[int, Tensor]:
        rows = next((t.shape[0] for t in tensors if t.ndim), 0)
        total = torch.zeros((), dtype=torch.float64)
        with torch.no_grad(), exact_arithmetic():
            for t in (t for t in tensors if t.ndim and t.shape[0] == rows and rows and not t.is_complex()):
                flat = t.detach().reshape(rows, -1).float()
                total = total.to(t.device) + (flat @ self._direction(flat)).double().square().sum()
        return rows, total

    def _direction(self, flat: Tensor) -> Tensor:
        key = (flat.shape[1], flat.device)
        if key not in self._directions:
            generator = torch.Generator().manual_seed(0)
            self._directions[key] = (
                torch.rand(key[0], generator=generator, dtype=torch.float32).add(0.5).to(flat.device)
            )
        return self._directions[key]


def _distinct(step: Sequence[tuple[int, Tensor]]) -> list[tuple[int, float]]:
    """The calls of a step, each batch once: an optimizer with a closure comes back to it as often as it likes."""
    found: list[tuple[int, float]] = []
    for n, number in ((n, float(number)) for n, number in step):
        if not any(n == m and abs(number - known) <= RELATIVE * abs(known) for m, known in found):
            found.append((n, number))
    return found
