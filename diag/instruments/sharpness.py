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

from diag.display import format_number, format_share
from diag.errors import InvalidInput
from diag.linalg.lanczos import Eigenpairs, eigenpairs
from diag.linalg.operator import LinearOperator
from diag.linalg.reductions import dot, norm
from diag.quantities.curvature import CurvatureOperator
from diag.quantities.losses_at import LossesAt
from diag.registry import instrument
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured

SOURCE = "Foret et al. 2021, arXiv:2010.01412; Andriushchenko et al. 2023, arXiv:2302.07011"

RADIUS = 0.05
ROUNDINGS = 100  # of the loss: a rise below so many is no measurement (1e-5 in float32; our choice)
EQUAL_LOSSES = 0.05  # relative: runs may be compared within it (our choice)

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
    average: float = measured("mean rise over d ~ N(0, sigma^2)")
    average_standard_error: float = measured("standard error of that mean")
    adaptive_one_step: float = measured("SAM's step with every parameter scaled by its size (ASAM)")
    adaptive_worst_case: float = measured("largest rise found within |d / |theta|| <= rho")
    adaptive_average: float = measured("mean rise over d ~ N(0, sigma^2 |theta|^2)")
    adaptive_average_standard_error: float = measured("standard error of that mean")
    lambda_max: float = measured("largest eigenvalue of the Hessian H")
    adaptive_lambda_max: float = measured("largest eigenvalue of T H T, T = diag |theta|")
    function_space: float = measured(
        "1/2 d^T F d for SAM's step d, with the Fisher F: to second order the mean KL divergence of the outputs; "
        "NaN without a Fisher"
    )
    quadratic_ratio: float = measured(
        "average rise at sigma over that at sigma / 2: 4 where the loss is quadratic; NaN below rounding"
    )
    slope: float = measured(
        "log2 of SAM's rise at rho over that at rho / 2: 1 where the gradient rules, 2 at a minimum; NaN below "
        "rounding"
    )
    rho: float = measured("the radius")
    sigma: float = measured("standard deviation of the draws, in units of |theta| for the adaptive form")
    num_draws: int = measured("random directions behind the averages")

    def verdict(self) -> Verdict:
        unmet = self.unmet()
        if unmet is not None:
            return Verdict(Level.NOT_APPLICABLE, f"No verdict: {unmet.detail}", source=SOURCE)
        sentence = (
            f"The loss of {format_number(self.loss)} rises by at least {format_number(self.worst_case)} in the "
            f"worst direction within rho = {format_number(self.rho)}, and by {format_number(self.average, 2)} ± "
            f"{format_number(self.average_standard_error, 2)} on average over draws of sigma = "
            f"{format_number(self.sigma)} (adaptive: {format_number(self.adaptive_worst_case)} and "
            f"{format_number(self.adaptive_average, 2)}); this describes and judges nothing."
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

    def compared_with(self, other: Self) -> Verdict:
        """This network beside another of the same architecture: the only judgement that is supported.

        Not applicable unless radius and sigma are the same and the losses equal within 5 % (our choice).
        """
        unmet = self.unmet() or other.unmet()
        if unmet is not None:
            return Verdict(Level.NOT_APPLICABLE, f"No comparison: {unmet.detail}", NOT_A_SCORE, SOURCE)
        pair = f"{format_number(self.loss)} and {format_number(other.loss)}"
        if (self.rho, self.sigma) != (other.rho, other.sigma):
            return Verdict(
                Level.NOT_APPLICABLE,
                "No comparison: the radii or sigmas differ; measure with equal ones.",
                "",
                SOURCE,
            )
        if abs(self.loss - other.loss) > EQUAL_LOSSES * max(abs(self.loss), abs(other.loss)):
            sentence = f"No comparison: the losses {pair} differ by more than {format_share(EQUAL_LOSSES)}."
            return Verdict(Level.NOT_APPLICABLE, sentence, "Compare at equal training loss.", SOURCE)
        gap = self.adaptive_average - other.adaptive_average
        error = math.hypot(self.adaptive_average_standard_error, other.adaptive_average_standard_error)
        told = "are not told apart" if abs(gap) <= 2 * error else "differ"
        return Verdict(
            Level.UNKNOWN if abs(gap) <= 2 * error else Level.OK,
            f"At losses of {pair} the adaptive average rises {told}: {format_number(self.adaptive_average)} "
            f"against {format_number(other.adaptive_average)}, a difference of {format_number(gap)} ± "
            f"{format_number(error, 2)}.",
            NOT_A_SCORE,
            SOURCE,
            Confidence.CONTESTED,
            value=gap,
            threshold=2 * error,
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
        if min(*plain, *adaptive) > 0:
            ax.set_yscale("log")
        ax.set(xlabel="measure", ylabel="rise of the loss")
        ax.legend()


@instrument(source=SOURCE, title="Sharpness")
def sharpness(
    losses_at: LossesAt,
    hessian: LinearOperator,
    fisher: LinearOperator | None = None,
    *,
    rho: float = RADIUS,
    sigma: float | None = None,
    steps: int = 20,
    num_draws: int = 100,
    tolerance: float = 1e-2,
    seed: int = 0,
) -> Sharpness:
    """The rise of the loss within a radius `rho`: SAM's one step, the worst case, the average, plain and adaptive.

    losses_at: the losses (n,) as a function of the flat parameters (P,), with their gradient; hessian and fisher:
    LinearOperators of size P. The worst case is searched by `steps` projected gradient steps from SAM's step and
    from the sharpest direction, so it is a lower bound; the averages are over `num_draws` normal directions of
    standard deviation `sigma` (None: rho / sqrt(P), so that a draw's expected squared length is rho^2). The
    adaptive forms scale every parameter by its size, which makes them invariant to rescaling parameters one by one.
    Rises are in the loss's unit, over all the data at once (m-sharpness with m = n). There is no threshold:
    nothing supports one.

    There is no verdict where the rises are below the rounding of the losses. Raises InvalidInput where a radius or
    a count is not positive. Sources: Foret et al. 2021, arXiv:2010.01412 (SAM); Kwon et al. 2021,
    arXiv:2102.11600 (ASAM); Andriushchenko et al. 2023, arXiv:2302.07011 (what may be concluded).
    """
    if not rho > 0 or steps < 1 or num_draws < 4 or not (sigma is None or sigma > 0):
        raise InvalidInput(
            f"rho={rho}, sigma={sigma}, steps={steps} and num_draws={num_draws} were given; give positive radii, "
            "at least 1 step and at least 4 draws."
        )
    center = losses_at.center
    sigma = rho / math.sqrt(len(center)) if sigma is None else sigma
    losses, gradient = losses_at.step(center)
    size, ones = center.abs(), torch.ones_like(center)
    around = _Surroundings(losses_at, float(losses.mean()), rho, sigma)
    pairs = eigenpairs(hessian, largest=1, tolerance=tolerance, seed=seed)
    scaled = hessian.diagonally_scaled(size) if bool(size.any()) else hessian
    adaptive_pairs = eigenpairs(scaled, largest=1, tolerance=tolerance, seed=seed)
    plain = around.measures(ones, gradient, pairs, steps, num_draws, seed)
    adaptive = around.measures(size, gradient, adaptive_pairs, steps, num_draws, seed)
    few = max(4, num_draws // 5)
    whole, half = (around.average(ones * part, few, seed)[0] for part in (1.0, 0.5))
    return Sharpness(
        loss=around.base,
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
        quadratic_ratio=whole / half if around.resolves(half) else math.nan,
        slope=around.slope(gradient),
        rho=rho,
        sigma=sigma,
        num_draws=num_draws,
        preconditions=(
            Precondition(
                "rises above rounding",
                around.resolves(plain.worst_case),
                f"the largest rise found, {format_number(plain.worst_case)}, is to be above the rounding of the "
                f"losses, {format_number(around.rounding, 2)}; give a larger rho.",
            ),
            Precondition(
                "converged",
                bool(pairs.converged[0] and adaptive_pairs.converged[0]),
                "the sharpest direction has not converged; give a larger tolerance.",
            ),
        ),
        notes=(hessian.self_test.sentence(),) if isinstance(hessian, CurvatureOperator) else (),
    )


class _Rises(NamedTuple):
    one_step: float
    worst_case: float
    average: float
    average_standard_error: float


class _Surroundings:
    """Rises of the mean loss over `base` near the parameters, in coordinates e = d / scale.

    The parameters themselves are never written: every loss is a function of a point.
    """

    def __init__(self, losses_at: LossesAt, base: float, rho: float, sigma: float):
        self.losses_at, self.base, self.rho, self.sigma = losses_at, base, rho, sigma
        self.center: Tensor = losses_at.center
        self.rounding = ROUNDINGS * torch.finfo(self.center.dtype).eps * abs(base)

    def measures(
        self, scale: Tensor, gradient: Tensor, pairs: Eigenpairs, steps: int, draws: int, seed: int
    ) -> _Rises:
        """The rises with every parameter scaled by `scale`."""
        ascent = _unit(gradient * scale) * self.rho
        assert pairs.vectors is not None
        sharpest = pairs.vectors[0].to(scale) * self.rho
        starts = [ascent, sharpest, -sharpest]
        rises = [self.rise(e * scale) for e in starts]
        climbed = self.climb(starts[max(range(3), key=rises.__getitem__)], scale, steps)
        average, error = self.average(scale, draws, seed)
        return _Rises(rises[0], max(*rises, climbed), average, error)

    def rise(self, d: Tensor) -> float:
        return float(self.losses_at(self.center + d).mean()) - self.base

    def resolves(self, rise: float) -> bool:
        """Whether a rise is more than the rounding of the losses."""
        return abs(rise) > self.rounding

    def slope(self, gradient: Tensor) -> float:
        """The exponent with which SAM's rise grows from rho / 2 to rho."""
        ascent = _unit(gradient) * self.rho
        whole, half = self.rise(ascent), self.rise(ascent / 2)
        return math.log2(whole / half) if self.resolves(half) and whole * half > 0 else math.nan

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
        """Mean rise over d ~ N(0, sigma^2 scale^2) and its standard error; directions come in pairs +-d, so that
        the gradient's first-order part cancels."""
        generator = torch.Generator().manual_seed(seed)
        rises = []
        for _ in range(draws // 2):
            d = torch.randn(len(self.center), generator=generator).to(self.center) * scale * self.sigma
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
