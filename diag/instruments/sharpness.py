"""How much the loss rises around the parameters, by the measures in use: for comparisons, never as a score.

Sharpness is not invariant: rescaling two layers of a ReLU network changes it at equal function, and across
well-trained models it correlates with the learning rate more than with generalisation. What may be done with it
is to compare runs of one architecture at equal training loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Annotated, Any, Self

import torch
from torch import Tensor

from diag.curvature.neighbourhood.divergence_at import DivergenceAt
from diag.curvature.neighbourhood.losses_at import LossesAt
from diag.curvature.neighbourhood.surroundings import NORMS, Ball, Measures, Surroundings
from diag.curvature.operators import CurvatureOperator
from diag.display import format_number, format_share
from diag.errors import InvalidInput
from diag.linalg.operator import LinearOperator
from diag.linalg.reductions import dot
from diag.linalg.reductions import norm as length
from diag.ranges import Count, Positive, Seed, Tolerance, Within
from diag.registry import GRADIENT, PRODUCT, SELF_TEST, instrument
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured

SOURCE = "Foret et al. 2021, arXiv:2010.01412; Andriushchenko et al. 2023, arXiv:2302.07011"

RADIUS = 0.05
GROUP = 128  # examples in a group of m-sharpness, as in the evaluations of Andriushchenko et al.
EQUAL_LOSSES = 0.05  # relative: runs may be compared within it (our choice)

SHARPNESS_IS_NO_SCORE = (
    "Compare it with runs of the same architecture at the same training loss and radius only: it changes with the "
    "parametrisation, and neither flat nor sharp says how well a network generalises."
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Sharpness(Result):
    """Rises of the mean loss within a radius: one step, worst case, average; plain and adaptive; by groups of m."""

    loss: float = measured("mean loss at the parameters")
    gradient_norm: float = measured("length of its gradient")
    one_step: float = measured("L(theta + rho g / |g|) - L(theta): SAM's ascent step")
    worst_case: float = measured("largest rise found within |d| <= rho: a lower bound of the maximum")
    average: float = measured("mean rise over d ~ N(0, sigma^2)")
    average_standard_error: float = measured("standard error of that mean")
    m: int = measured("examples in a group, each group having its own loss", default=0)
    num_groups: int = measured(
        "random groups", remark="with one the measures by group are those of the whole", default=0
    )
    m_one_step: float = measured("mean over the groups of the rise along each one's own SAM step", default=nan)
    m_one_step_standard_error: float = measured("standard error of that mean over groups", default=nan)
    m_worst_case: float = measured("mean over the groups of each one's own worst case", default=nan)
    m_worst_case_standard_error: float = measured("standard error of that mean over groups", default=nan)
    adaptive_one_step: float = measured("SAM's step with every parameter scaled by its size (ASAM)")
    adaptive_worst_case: float = measured("largest rise found within |d / |theta|| <= rho")
    adaptive_average: float = measured("mean rise over d ~ N(0, sigma^2 |theta|^2)")
    adaptive_average_standard_error: float = measured("standard error of that mean")
    adaptive_m_one_step: float = measured("the adaptive one step by groups", default=nan)
    adaptive_m_one_step_standard_error: float = measured("standard error of that mean over groups", default=nan)
    adaptive_m_worst_case: float = measured("the adaptive worst case by groups", default=nan)
    adaptive_m_worst_case_standard_error: float = measured("standard error of that mean over groups", default=nan)
    lambda_max: float = measured("largest eigenvalue of the Hessian H")
    adaptive_lambda_max: float = measured("largest eigenvalue of T H T, T = diag |theta|")
    function_space: float = measured(
        "mean KL divergence of the outputs' distribution at theta from that at theta + d, for SAM's step d",
        remark="NaN without logits, or below the rounding of the outputs",
        unit="nats",
    )
    function_space_quadratic: float = measured(
        "1/2 d^T F d for the same d, with the Fisher F: that divergence to second order",
        remark="NaN without a Fisher",
        unit="nats",
        default=nan,
    )
    quadratic_ratio: float = measured(
        "average rise at sigma over that at sigma / 2: 4 where the loss is quadratic", remark="NaN below rounding"
    )
    slope: float = measured(
        "log2 of SAM's rise at rho over that at rho / 2: 1 where the gradient rules, 2 at a minimum",
        remark="NaN below rounding",
    )
    rho: float = measured("the radius")
    sigma: float = measured("standard deviation of the draws, in units of |theta| for the adaptive form")
    norm: str = measured("the norm that bounds a step: l2, or linf for its largest entry", default="l2")
    num_draws: int = measured("random directions behind the averages")

    def verdict(self) -> Verdict:
        unmet = self.unmet()
        if unmet is not None:
            return unmet.verdict(SOURCE)
        own = f" ({format_number(self.m_worst_case)} for groups of m = {self.m:,} examples, each in its own)"
        sentence = (
            f"The loss of {format_number(self.loss)} rises by at least {format_number(self.worst_case)} in the "
            f"worst direction within rho = {format_number(self.rho)}{own if self.num_groups > 1 else ''}, and by "
            f"{format_number(self.average, 2)} ± {format_number(self.average_standard_error, 2)} on average over "
            f"draws of sigma = {format_number(self.sigma)} (adaptive: {format_number(self.adaptive_worst_case)}, "
            f"{format_number(self.adaptive_average, 2)}); this describes and judges nothing."
        )
        return Verdict(
            Level.OK, sentence, advice=SHARPNESS_IS_NO_SCORE, source=SOURCE, confidence=Confidence.CONTESTED
        )

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
            advice=SHARPNESS_IS_NO_SCORE,
            source=SOURCE,
            confidence=Confidence.CONTESTED,
        )

    def compared_with(self, other: Self) -> Verdict:
        """This network beside another of the same architecture: the only judgement that is supported.

        Not applicable unless radius, sigma and norm are the same and the losses equal within 5 % (our choice).
        """
        unmet = self.unmet() or other.unmet()
        if unmet is not None:
            return Verdict(
                Level.NOT_APPLICABLE, f"No comparison: {unmet.detail}", advice=SHARPNESS_IS_NO_SCORE, source=SOURCE
            )
        pair = f"{format_number(self.loss)} and {format_number(other.loss)}"
        if (self.rho, self.sigma, self.norm) != (other.rho, other.sigma, other.norm):
            sentence = "No comparison: the radii, sigmas or norms differ; measure with equal ones."
            return Verdict(Level.NOT_APPLICABLE, sentence, advice="", source=SOURCE)
        if abs(self.loss - other.loss) > EQUAL_LOSSES * max(abs(self.loss), abs(other.loss)):
            sentence = f"No comparison: the losses {pair} differ by more than {format_share(EQUAL_LOSSES)}."
            return Verdict(Level.NOT_APPLICABLE, sentence, advice="Compare at equal training loss.", source=SOURCE)
        gap = self.adaptive_average - other.adaptive_average
        error = math.hypot(self.adaptive_average_standard_error, other.adaptive_average_standard_error)
        found = "do not differ by more than chance" if abs(gap) <= 2 * error else "differ"
        return Verdict(
            Level.UNKNOWN if abs(gap) <= 2 * error else Level.OK,
            f"At losses of {pair} the adaptive average rises {found}: {format_number(self.adaptive_average)} "
            f"against {format_number(other.adaptive_average)}, a difference of {format_number(gap)} ± "
            f"{format_number(error, 2)}.",
            advice=SHARPNESS_IS_NO_SCORE,
            source=SOURCE,
            confidence=Confidence.CONTESTED,
            value=gap,
            threshold=2 * error,
        )

    def plot(self, ax: Any = None) -> Any:
        """The rises, plain and adaptive, side by side."""
        names = ["one step", "worst case", "average"]
        plain = [self.one_step, self.worst_case, self.average]
        adaptive = [self.adaptive_one_step, self.adaptive_worst_case, self.adaptive_average]
        errors = ([0, 0, self.average_standard_error], [0, 0, self.adaptive_average_standard_error])
        if self.num_groups > 1:
            names += [f"one step,\nm = {self.m:,}", f"worst case,\nm = {self.m:,}"]
            plain += [self.m_one_step, self.m_worst_case]
            adaptive += [self.adaptive_m_one_step, self.adaptive_m_worst_case]
            errors[0].extend([self.m_one_step_standard_error, self.m_worst_case_standard_error])
            errors[1].extend([self.adaptive_m_one_step_standard_error, self.adaptive_m_worst_case_standard_error])
        places = range(len(names))
        ax.bar([p - 0.2 for p in places], plain, 0.4, yerr=errors[0], label="plain")
        ax.bar([p + 0.2 for p in places], adaptive, 0.4, yerr=errors[1], label="adaptive")
        ax.set_xticks(list(places), names)
        if min(*plain, *adaptive) > 0:
            ax.set_yscale("log")
        ax.set(xlabel="measure", ylabel="rise of the loss")
        ax.legend()


def _passes(settings: Mapping[str, Any]) -> float:
    climbs = 2 * GRADIENT * (settings["steps"] + 2)  # of all the data, and of its groups
    return float(SELF_TEST + 2 * (8 * PRODUCT + climbs + 1.4 * settings["num_draws"]))


@instrument(
    source=SOURCE,
    title="Sharpness",
    passes=_passes,
    why="It tells how far the weights can be disturbed, by noise, rounding or averaging, before the loss rises.",
    formula="max_{|e| <= rho} L(w + e) - L(w), SAM: e = rho g / |g|; average: E L(w + e) - L(w), e normal",
)
def sharpness(
    losses_at: LossesAt,
    hessian: LinearOperator,
    fisher: LinearOperator | None = None,
    divergence_at: DivergenceAt | None = None,
    *,
    rho: Positive = RADIUS,
    sigma: Positive | None = None,
    norm: str = "l2",
    m: Count = GROUP,
    steps: Count = 20,
    num_draws: Annotated[int, Within(4)] = 100,
    tolerance: Tolerance = 1e-2,
    seed: Seed = 0,
) -> Sharpness:
    """The rise of the loss within a radius `rho`: SAM's one step, the worst case, the average, plain and adaptive.

    losses_at: the losses (n,) as a function of the flat parameters (P,), with their gradient; hessian and fisher:
    LinearOperators of size P; divergence_at: the mean KL divergence of the outputs as a function of the parameters.
    The worst case is searched by `steps` projected gradient steps from the best of SAM's step and the sharpest
    direction, so it is a lower bound; `norm` says what rho bounds: the length of a step ("l2") or its largest
    entry ("linf"). The averages are over `num_draws` normal directions of standard deviation `sigma` (None:
    rho / sqrt(P), a draw's expected squared length then being rho^2; for linf rho / sqrt(3), that of a uniform
    draw). The adaptive forms scale every parameter by its size, which makes them invariant to rescaling parameters
    one by one. m-sharpness is the mean over random groups of `m` examples of what each group's own loss rises by
    in its own direction; it grows as m falls, and with m = n it is that of the whole. Where ranks share the data,
    each forms groups of its own examples. Rises are in the loss's
    unit. There is no threshold: nothing supports one.

    There is no verdict where the rises are below the rounding of the losses. Raises InvalidInput where a radius or
    a count is not positive, or the norm is not known. Sources: Foret et al. 2021, arXiv:2010.01412 (SAM,
    m-sharpness); Kwon et al. 2021, arXiv:2102.11600 (ASAM); Andriushchenko et al. 2023, arXiv:2302.07011 (what may
    be concluded).
    """
    _check(norm)
    center = losses_at.center
    sigma = rho / math.sqrt(len(center) if norm == "l2" else 3) if sigma is None else sigma
    around = Surroundings(losses_at, torch.ones_like(center), Ball(rho, norm))
    plain = around.measures(hessian, sigma, m, steps, num_draws, tolerance, seed)
    scaled = hessian.diagonally_scaled(center.abs()) if bool(center.any()) else hessian
    adaptive = around.scaled(center.abs()).measures(scaled, sigma, m, steps, num_draws, tolerance, seed)
    return Sharpness(
        loss=around.base,
        gradient_norm=float(length(around.gradient)),
        m=min(m, losses_at.num_examples),
        num_groups=plain.groups.number,
        function_space=_divergence(divergence_at, around.ascent),
        function_space_quadratic=_half_square(fisher, around.ascent),
        quadratic_ratio=_quadratic_ratio(around, sigma, max(4, num_draws // 5), seed),
        slope=around.slope(),
        rho=rho,
        sigma=sigma,
        norm=norm,
        num_draws=num_draws,
        preconditions=_preconditions(plain, adaptive, around.rounding),
        notes=(hessian.self_test.sentence(),) if isinstance(hessian, CurvatureOperator) else (),
        **_rises(plain),
        **{f"adaptive_{name}": rise for name, rise in _rises(adaptive).items()},
    )


def _quadratic_ratio(around: Surroundings, sigma: float, draws: int, seed: int) -> float:
    """The average rise over that at half the deviation: 4 where the loss is quadratic."""
    whole, half = (around.average(sigma * part, draws, seed).mean for part in (1.0, 0.5))
    return whole / half if abs(half) > around.rounding else math.nan


def _rises(found: Measures) -> dict[str, Any]:
    """The fields that the plain and the adaptive forms have in common."""
    return {
        "one_step": found.one_step,
        "worst_case": found.worst_case,
        "average": found.average.mean,
        "average_standard_error": found.average.standard_error,
        "m_one_step": found.groups.one_step.mean,
        "m_one_step_standard_error": found.groups.one_step.standard_error,
        "m_worst_case": found.groups.worst_case.mean,
        "m_worst_case_standard_error": found.groups.worst_case.standard_error,
        "lambda_max": found.lambda_max,
    }


def _preconditions(plain: Measures, adaptive: Measures, rounding: float) -> tuple[Precondition, ...]:
    return (
        Precondition(
            "rises above rounding",
            abs(plain.worst_case) > rounding,
            f"the largest rise found, {format_number(plain.worst_case)}, must be above the rounding of the "
            f"losses, {format_number(rounding, 2)}; give a larger rho.",
        ),
        Precondition(
            "converged",
            plain.converged and adaptive.converged,
            "the sharpest direction has not converged; give a larger tolerance.",
        ),
    )


def _check(norm: str) -> None:
    if norm not in NORMS:
        raise InvalidInput(f"norm is {norm!r}; expected one of {', '.join(NORMS)}.")


def _divergence(divergence_at: DivergenceAt | None, d: Tensor) -> float:
    if divergence_at is None:
        return nan
    found = divergence_at(divergence_at.center + d)
    return nan if 0 < found < divergence_at.rounding else found


def _half_square(fisher: LinearOperator | None, d: Tensor) -> float:
    if fisher is None:
        return nan
    d = d.to(fisher.dtype)
    return float(dot(d, fisher.matvec(d))) / 2
