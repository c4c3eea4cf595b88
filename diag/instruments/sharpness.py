"""How much the loss rises around the parameters, by the measures in use: for comparisons, never as a score.

Sharpness is not invariant: rescaling two layers of a ReLU network changes it at equal function, and across
well-trained models it correlates with the learning rate more than with generalisation. What may be done with it
is to compare runs of one architecture at equal training loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from diag.display import format_number
from diag.errors import InvalidInput
from diag.linalg.lanczos import Eigenpairs, eigenpairs
from diag.linalg.operator import LinearOperator
from diag.linalg.reductions import dot, norm
from diag.registry import instrument
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured

SOURCE = "Foret et al. 2021, arXiv:2010.01412; Andriushchenko et al. 2023, arXiv:2302.07011"

RADIUS = 0.05
SMALLEST_RELATIVE_RISE = 1e-5  # of the loss: below it a float32 difference of losses is rounding

NOT_A_SCORE = (
    "Compare it with runs of the same architecture at the same training loss and radius only: it changes with the "
    "parametrisation, and neither flat nor sharp says how well a network generalises."
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Sharpness(Result):
    """Rises of the mean loss within a radius: one step, worst case, average; plain and adaptive."""

    loss: float = measured("mean loss at the parameters")
    gradient_norm: float = measured("length of its gradient")
    one_step: float = measured("L(theta + rho g / |g|) - L(theta): SAM's ascent step")
    worst_case: float = measured("largest rise found within |d| <= rho: a lower bound of the maximum")
    average: float = measured("mean rise over d ~ N(0, rho^2)")
    average_standard_error: float = measured("standard error of that mean")
    adaptive_one_step: float = measured("SAM's step with every parameter scaled by its size (ASAM)")
    adaptive_worst_case: float = measured("largest rise found within |d / |theta|| <= rho")
    adaptive_average: float = measured("mean rise over d ~ N(0, rho^2 |theta|^2)")
    adaptive_average_standard_error: float = measured("standard error of that mean")
    lambda_max: float = measured("largest eigenvalue of the Hessian H")
    adaptive_lambda_max: float = measured("largest eigenvalue of T H T, T = diag |theta|")
    function_space: float = measured(
        "1/2 d^T F d for SAM's step d, with the Fisher F: to second order the mean KL divergence of the outputs; "
        "NaN without a Fisher"
    )
    quadratic_ratio: float = measured("average rise at rho over that at rho / 2: 4 where the loss is quadratic")
    rho: float = measured("the radius")
    num_draws: int = measured("random directions behind the averages")

    def verdict(self) -> Verdict:
        unmet = self.unmet()
        if unmet is not None:
            return Verdict(Level.NOT_APPLICABLE, f"No verdict: {unmet.detail}", source=SOURCE)
        sentence = (
            f"Within rho = {format_number(self.rho)} the loss of {format_number(self.loss)} rises by at least "
            f"{format_number(self.worst_case)} in the worst direction and by {format_number(self.average, 2)} +- "
            f"{format_number(self.average_standard_error, 2)} on average (adaptive: "
            f"{format_number(self.adaptive_worst_case)} and {format_number(self.adaptive_average, 2)})."
        )
        return Verdict(Level.OK, sentence, NOT_A_SCORE, SOURCE, Confidence.CONTESTED)

    @classmethod
    def trend(cls, series: Sequence[tuple[int, Self]]) -> Verdict:
        """The first and the last, side by side; no judgement."""
        (first_step, first), (last_step, last) = series[0], series[-1]
        if len(series) < 2 or last.unmet() is not None:
            return last.verdict()
        return Verdict(
            Level.OK,
            f"From step {first_step:,} to {last_step:,} the worst rise within rho = {format_number(last.rho)} went "
            f"from {format_number(first.worst_case)} to {format_number(last.worst_case)} while the loss went from "
            f"{format_number(first.loss)} to {format_number(last.loss)}.",
            NOT_A_SCORE,
            SOURCE,
            Confidence.CONTESTED,
        )

    def plot(self, ax: Any) -> None:
        """The rises, plain and adaptive, side by side."""
        names = ("one step", "worst case", "average")
        plain = (self.one_step, self.worst_case, self.average)
        adaptive = (self.adaptive_one_step, self.adaptive_worst_case, self.adaptive_average)
        errors = ([0, 0, self.average_standard_error], [0, 0, self.adaptive_average_standard_error])
        places = range(len(names))
        ax.bar([p - 0.2 for p in places], plain, 0.4, yerr=errors[0], label="plain")
        ax.bar([p + 0.2 for p in places], adaptive, 0.4, yerr=errors[1], label="adaptive")
        ax.set_xticks(list(places), names)
        ax.set(xlabel="measure", ylabel="rise of the loss")
        ax.legend(fontsize=7, frameon=False)


@instrument(source=SOURCE, title="Sharpness")
def sharpness(
    losses_at: Any,
    hessian: Any,
    fisher: Any = None,
    *,
    rho: float = RADIUS,
    steps: int = 20,
    num_draws: int = 100,
    tolerance: float = 1e-2,
    seed: int = 0,
) -> Sharpness:
    """The rise of the loss within a radius `rho`: SAM's one step, the worst case, the average, plain and adaptive.

    losses_at: the losses (n,) as a function of the flat parameters (P,), with their gradient; hessian and fisher:
    LinearOperators of size P. The worst case is searched by `steps` projected gradient steps from SAM's step and
    from the sharpest direction, so it is a lower bound; the averages are over `num_draws` normal directions. The
    adaptive forms scale every parameter by its size, which makes them invariant to rescaling parameters one by
    one. Rises are in the loss's unit. There is no threshold: nothing supports one.

    There is no verdict where the rises are below the rounding of the losses. Raises InvalidInput where rho or
    a count is not positive. Sources: Foret et al. 2021, arXiv:2010.01412 (SAM); Kwon et al. 2021,
    arXiv:2102.11600 (ASAM); Andriushchenko et al. 2023, arXiv:2302.07011 (what may be concluded).
    """
    if not rho > 0 or steps < 1 or num_draws < 2:
        raise InvalidInput(
            f"rho={rho}, steps={steps} and num_draws={num_draws} were given; give a positive rho, at least 1 step "
            "and at least 2 draws."
        )
    center = losses_at.center
    losses, gradient = losses_at.step(center)
    base = float(losses.mean())
    size = center.abs()
    ball = _Ball(losses_at, base, rho)
    pairs = eigenpairs(hessian, largest=1, tolerance=tolerance, seed=seed)
    scaled = hessian.diagonally_scaled(size) if bool(size.any()) else hessian
    adaptive_pairs = eigenpairs(scaled, largest=1, tolerance=tolerance, seed=seed)
    plain = ball.measures(torch.ones_like(center), gradient, pairs, steps, num_draws, seed)
    adaptive = ball.measures(size, gradient, adaptive_pairs, steps, num_draws, seed)
    half, _ = _Ball(losses_at, base, rho / 2).average(torch.ones_like(center), max(2, num_draws // 5), seed)
    few, _ = ball.average(torch.ones_like(center), max(2, num_draws // 5), seed)
    rounding = SMALLEST_RELATIVE_RISE if center.dtype == torch.float32 else 1e-12
    resolved = plain.worst_case > rounding * abs(base)
    return Sharpness(
        loss=base,
        gradient_norm=float(norm(gradient)),
        one_step=plain.one_step,
        worst_case=plain.worst_case,
        average=plain.average,
        average_standard_error=plain.average_standard_error,
        adaptive_one_step=adaptive.one_step,
        adaptive_worst_case=adaptive.worst_case,
        adaptive_average=adaptive.average,
        adaptive_average_standard_error=adaptive.average_standard_error,
        lambda_max=float(pairs.values[0]),
        adaptive_lambda_max=float(adaptive_pairs.values[0]),
        function_space=_function_space(fisher, gradient, rho),
        quadratic_ratio=few / half if half else math.nan,
        rho=rho,
        num_draws=num_draws,
        preconditions=(
            Precondition(
                "rises above rounding",
                resolved,
                f"the largest rise found, {format_number(plain.worst_case)}, is "
                f"{'above' if resolved else 'not above'} the rounding of the losses"
                f"{'.' if resolved else '; give a larger rho.'}",
            ),
        ),
    )


class _Rises(NamedTuple):
    one_step: float
    worst_case: float
    average: float
    average_standard_error: float


class _Ball:
    """Rises of the mean loss over `base` within radius rho, in coordinates e = d / scale."""

    def __init__(self, losses_at: Any, base: float, rho: float):
        self.losses_at, self.base, self.rho = losses_at, base, rho
        self.center: Tensor = losses_at.center

    def measures(
        self, scale: Tensor, gradient: Tensor, pairs: Eigenpairs, steps: int, draws: int, seed: int
    ) -> _Rises:
        """The rises with every parameter scaled by `scale`."""
        ascent = _unit(gradient * scale) * self.rho
        one_step = self.rise(ascent * scale)
        assert pairs.vectors is not None
        sharpest = pairs.vectors[0] * self.rho
        starts = [ascent, sharpest, -sharpest]
        rises = [one_step, self.rise(sharpest * scale), self.rise(-sharpest * scale)]
        best = max(range(3), key=rises.__getitem__)
        climbed = self.climb(starts[best], scale, steps)
        average, error = self.average(scale, draws, seed)
        return _Rises(one_step, max(*rises, climbed), average, error)

    def rise(self, d: Tensor) -> float:
        return float(self.losses_at(self.center + d).mean()) - self.base

    def climb(self, e: Tensor, scale: Tensor, steps: int) -> float:
        """The largest rise along projected gradient ascent from e, with steps of rho / 2 that shrink."""
        best = -math.inf
        for k in range(steps):
            losses, gradient = self.losses_at.step(self.center + e * scale)
            best = max(best, float(losses.mean()) - self.base)
            e = e + self.rho / 2 * (1 - k / steps) * _unit(gradient * scale)
            length = float(norm(e))
            if length > self.rho:
                e = e * (self.rho / length)
        return max(best, self.rise(e * scale))

    def average(self, scale: Tensor, draws: int, seed: int) -> tuple[float, float]:
        """Mean rise over d ~ N(0, rho^2 scale^2) and its standard error; directions come in pairs +-d, so that
        the gradient's first-order part cancels."""
        generator = torch.Generator().manual_seed(seed)
        rises = []
        for _ in range(max(draws // 2, 2)):
            d = torch.randn(len(self.center), generator=generator).to(self.center) * scale * self.rho
            rises.append((self.rise(d) + self.rise(-d)) / 2)
        values = torch.tensor(rises, dtype=torch.float64)
        return float(values.mean()), float(values.std() / math.sqrt(len(rises)))


def _unit(v: Tensor) -> Tensor:
    length = norm(v)
    return v / length.to(v.dtype) if float(length) else v


def _function_space(fisher: LinearOperator | None, gradient: Tensor, rho: float) -> float:
    if fisher is None:
        return math.nan
    d = _unit(gradient).to(fisher.dtype) * rho
    return float(dot(d, fisher.matvec(d))) / 2
