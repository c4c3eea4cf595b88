"""How far the mean loss rises around the parameters: an ascent step, the worst case, the average, group by group.

A step is d = T e. T is the diagonal of `scale`: ones for the plain measures, |theta| for the adaptive ones, which
do not change when parameters are rescaled one by one. A ball bounds e. The parameters themselves are never
written: every loss is a function of a point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from diag.curvature.neighbourhood.losses_at import LossesAt
from diag.linalg.lanczos import eigenpairs
from diag.linalg.operator import LinearOperator
from diag.linalg.reductions import norm
from diag.linalg.student import covering

LOSS_ROUNDINGS = 100  # of the loss: a rise below so many is noise (1e-5 in float32; our choice)
NORMS = ("l2", "linf")


@dataclass(frozen=True)
class Ball:
    """The steps e of at most `radius` in the 2-norm ("l2") or in the largest entry ("linf")."""

    radius: float
    norm: str = "l2"

    def steepest(self, slope: Tensor) -> Tensor:
        """The e of the ball with the largest <slope, e>; 0 where the slope is 0."""
        return self.radius * (slope.sign() if self.norm == "linf" else unit_vector(slope))

    def nearest(self, e: Tensor) -> Tensor:
        """The e of the ball that is nearest to the given one."""
        if self.norm == "linf":
            return e.clamp(-self.radius, self.radius)
        length = float(norm(e))
        return e * (self.radius / length) if length > self.radius else e


class MeanEstimate(NamedTuple):
    """A mean and its standard error (0 for a quantity that has one value only)."""

    mean: float
    standard_error: float


class ByGroup(NamedTuple):
    """m-sharpness: means over so many groups of m examples of each group's own rises."""

    number: int
    one_step: MeanEstimate
    worst_case: MeanEstimate


class Measures(NamedTuple):
    """Every measure with one scaling of the parameters."""

    one_step: float
    worst_case: float
    average: MeanEstimate
    groups: ByGroup
    lambda_max: float
    converged: bool


class Surroundings:
    """Rises of the mean loss of `losses_at` over its value at the centre, for steps T e."""

    def __init__(self, losses_at: LossesAt, scale: Tensor, ball: Ball) -> None:
        self.losses_at, self.scale, self.ball = losses_at, scale, ball

    @cached_property
    def base(self) -> float:
        """The mean loss at the centre."""
        return float(self._at_center[0].mean())

    @property
    def gradient(self) -> Tensor:
        """Its gradient (P,)."""
        return self._at_center[1]

    @cached_property
    def _at_center(self) -> tuple[Tensor, Tensor]:
        return self.losses_at.step(self.losses_at.center)

    def scaled(self, scale: Tensor) -> Surroundings:
        """The same with another T."""
        other = Surroundings(self.losses_at, scale, self.ball)
        other.__dict__["_at_center"] = self._at_center
        return other

    @property
    def rounding(self) -> float:
        """What rises must exceed to be more than rounding."""
        return LOSS_ROUNDINGS * torch.finfo(self.losses_at.center.dtype).eps * abs(self.base)

    def rise(self, e: Tensor) -> float:
        """L(theta + T e) - L(theta)."""
        return float(self.losses_at(self.losses_at.center + self.scale * e).mean()) - self.base

    @cached_property
    def ascent(self) -> Tensor:
        """SAM's step: the e of the ball along which the loss is steepest, rho T g / |T g| in the 2-norm."""
        return self.ball.steepest(self.scale * self.gradient)

    def worst_case(self, starts: Sequence[Tensor], steps: int) -> tuple[float, Tensor]:
        """The largest rise found in the ball, and its e: the best of `starts`, or up the hill from there.

        The climb is projected gradient ascent whose steps shrink from half the radius to nothing.
        """
        best, e = max(((self.rise(e), e) for e in starts), key=lambda found: found[0])
        here = e
        for k in range(steps + 1):
            losses, gradient = self.losses_at.step(self.losses_at.center + self.scale * here)
            rise = float(losses.mean()) - self.base
            best, e = (rise, here) if rise > best else (best, e)
            uphill = self.ball.steepest(self.scale * gradient)
            here = self.ball.nearest(here + uphill * (1 - k / steps) / 2)
        return best, e

    def measures(
        self, curvature: LinearOperator, sigma: float, m: int, steps: int, draws: int, tolerance: float, seed: int
    ) -> Measures:
        """All of them; curvature: T H T with the loss's Hessian H."""
        pairs = eigenpairs(curvature, largest=1, tolerance=tolerance, seed=seed)
        assert pairs.vectors is not None
        sharpest = self.ball.steepest(curvature.whole_rows(pairs.vectors[:1])[0].to(self.scale))
        one_step = self.rise(self.ascent)
        worst_case, worst = self.worst_case([self.ascent, sharpest, -sharpest], steps)
        if m < self.losses_at.num_examples:
            groups = by_group(self, m, worst, steps, seed)
        else:
            groups = ByGroup(1, MeanEstimate(one_step, 0.0), MeanEstimate(worst_case, 0.0))
        average = self.average(sigma, draws, seed)
        found, converged = float(pairs.values[0]), bool(pairs.converged[0])
        return Measures(one_step, worst_case, average, groups, found, converged)

    def slope(self) -> float:
        """The exponent with which the rise along the ascent step grows from half the radius to all of it."""
        whole, half = self.rise(self.ascent), self.rise(self.ascent / 2)
        return math.log2(whole / half) if abs(half) > self.rounding and whole * half > 0 else math.nan

    def average(self, sigma: float, draws: int, seed: int) -> MeanEstimate:
        """The mean rise over e ~ N(0, sigma^2) and its standard error.

        Draws come in pairs +-e, so that the part of first order in the gradient cancels.
        """
        generator = torch.Generator().manual_seed(seed)
        rises = []
        for _ in range(draws // 2):
            e = sigma * torch.randn(len(self.scale), generator=generator, dtype=torch.float32).to(self.scale)
            rises.append((self.rise(e) + self.rise(-e)) / 2)
        return weighted_mean(rises, [1] * len(rises))


def by_group(whole: Surroundings, m: int, worst: Tensor, steps: int, seed: int) -> ByGroup:
    """The mean over disjoint random groups of m examples, each with its own ascent step and worst case.

    worst: the worst step of all the data together, which every group tries too. So the mean of the groups' worst
    cases is never below the worst case of the whole, as the mean of maxima is not below the maximum of the mean.
    A last group that is smaller counts by its size. Where ranks share the data, each has groups of its own
    examples.
    """

    def measured() -> Tensor:
        rows = []
        for losses_at in whole.losses_at.groups(m, seed):
            group = Surroundings(losses_at, whole.scale, whole.ball)
            climbed = group.worst_case([group.ascent, worst], steps)[0]
            rows.append([losses_at.num_examples, group.rise(group.ascent), climbed])
        return torch.tensor(rows, dtype=torch.float64)

    sizes, one_step, worst_case = whole.losses_at.all_rows(measured).T.tolist()
    return ByGroup(len(sizes), weighted_mean(one_step, sizes), weighted_mean(worst_case, sizes))


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> MeanEstimate:
    """The weighted mean of independent values and its standard error (widened for few: see `student`)."""
    x, w = torch.tensor(values, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)
    mean = float((w * x).sum() / w.sum())
    if len(values) < 2:
        return MeanEstimate(mean, 0.0)
    spread = (w * (x - mean)).square().sum() * len(values) / (len(values) - 1)
    return MeanEstimate(mean, covering(float(spread.sqrt() / w.sum()), len(values)))


def unit_vector(v: Tensor) -> Tensor:
    """v / |v|; 0 where v is 0."""
    length = norm(v)
    return v / length.to(v.dtype) if float(length) else v
