"""The numbers along a path between two networks: losses, errors, brackets and their paired standard errors.

The bracket L(theta_a) - (1-a) L(theta_0) - a L(theta_1) is formed example by example, so that its standard error
is the paired one: most of the spread between examples is common to all points and cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from diag.connectivity.example_scores import Scores


@dataclass(frozen=True)
class Profile:
    """What was measured along a path; k points, all arrays float64 on the CPU.

    alphas (k,), ascending, with 0 and 1. losses, errors (k,): means over the examples (errors are shares of
    wrong answers, NaN where targets are not class numbers). brackets, error_brackets (k,): excess over the
    chord; standard_errors, error_standard_errors (k,): of the brackets, paired over the examples.
    num_examples: how many.
    """

    alphas: Tensor
    losses: Tensor
    errors: Tensor
    brackets: Tensor
    standard_errors: Tensor
    error_brackets: Tensor
    error_standard_errors: Tensor
    num_examples: int

    @property
    def barrier(self) -> float:
        """max_a of the loss bracket (Entezari eq. 1); at least 0, because a = 0 is a point."""
        return float(self.brackets.max())

    @property
    def peak(self) -> int:
        """Which point the maximum is at."""
        return int(self.brackets.argmax())

    @property
    def error_barrier(self) -> float:
        """max_a of the error bracket."""
        return float(self.error_brackets.max())

    @property
    def error_standard_error(self) -> float:
        """The standard error of the error bracket at its maximum; where that is an end, of the largest inside."""
        inside = self.error_brackets.clone()
        inside[0] = inside[-1] = -math.inf
        k = int(inside.argmax()) if len(inside) > 2 and not bool(inside.isnan().any()) else 0
        return float(self.error_standard_errors[k])

    @property
    def mean_baseline_barrier(self) -> float:
        """max_a L(theta_a) - (L(theta_0) + L(theta_1)) / 2 (Git Re-Basin, Definition 2.2)."""
        return float(self.losses.max() - (self.losses[0] + self.losses[-1]) / 2)

    @property
    def instability(self) -> float:
        """max_a error(theta_a) - (error(theta_0) + error(theta_1)) / 2 (Frankle et al. 2020)."""
        return float(self.errors.max() - (self.errors[0] + self.errors[-1]) / 2)


class Points:
    """Scores at ascending alphas; of each point only sums are kept, and all examples only of the two ends."""

    def __init__(self, score: Callable[[float], Scores]) -> None:
        self.score = score
        self.rows: dict[float, tuple[float, ...]] = {}

    @cached_property
    def ends(self) -> list[Scores]:
        """All examples' scores at the two ends."""
        return [self.score(0.0), self.score(1.0)]

    def add(self, alpha: float) -> None:
        """Score the network at `alpha`, once."""
        if alpha in self.rows:
            return
        scores = self.ends[int(alpha)] if alpha in (0.0, 1.0) else self.score(alpha)
        first, last = self.ends
        excess = _bracket(scores.losses, first.losses, last.losses, alpha)
        wrong = _bracket(scores.errors, first.errors, last.errors, alpha)
        paired = scores.per_example
        self.rows[alpha] = (
            float(scores.losses.mean()), float(scores.errors.mean()), float(excess.mean()),
            _standard_error(excess) if paired else math.nan, float(wrong.mean()), _standard_error(wrong),
        )  # fmt: skip

    def around_the_peak(self) -> list[float]:
        """The middles between the highest point so far and its neighbours."""
        alphas = sorted(self.rows)
        k = max(range(len(alphas)), key=lambda i: self.rows[alphas[i]][2])
        neighbours = [alphas[i] for i in (k - 1, k + 1) if 0 <= i < len(alphas)]
        return [(alphas[k] + other) / 2 for other in neighbours]

    def profile(self) -> Profile:
        """All points, in order."""
        alphas = sorted(self.rows)
        columns = torch.tensor([self.rows[a] for a in alphas], dtype=torch.float64).T
        losses, errors, brackets, se, error_brackets, error_se = columns
        return Profile(
            torch.tensor(alphas, dtype=torch.float64), losses, errors, brackets, se, error_brackets, error_se,
            self.ends[0].size,
        )  # fmt: skip


def _bracket(values: Tensor, first: Tensor, last: Tensor, alpha: float) -> Tensor:
    if alpha in (0.0, 1.0):
        return torch.zeros_like(values) * values  # exactly 0, and NaN where there is no value
    # In this order the bracket of three equal numbers is exactly zero.
    return (values - first) - alpha * (last - first)


def _standard_error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
