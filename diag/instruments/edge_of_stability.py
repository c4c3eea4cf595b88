"""Is training at the edge of stability: is the loss as sharp as the optimizer can bear at its learning rate?

On a quadratic, gradient descent is stable exactly when the learning rate times the largest eigenvalue is at most 2;
momentum and preconditioning move that threshold. Full-batch training drives the largest eigenvalue up to the
threshold and hovers there: the edge of stability. That is not a fault; staying far beyond it is. Small batches add
noise, under which a minimum that is fitted exactly is left at a lower curvature: SGD has thresholds of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Self

import torch

from diag.curvature.carry import carried_eigenpairs
from diag.curvature.stability.optimizer import LinearStability, linear_stability
from diag.curvature.stability.preconditioner import DIVISORS
from diag.curvature.stability.sgd import SgdStability, small_batches, trace_factor
from diag.display import format_number, format_share
from diag.errors import InvalidInput, type_of
from diag.linalg.lanczos import eigenpairs
from diag.linalg.operator import LinearOperator, checked_operator
from diag.linalg.trace import trace_and_norm
from diag.ranges import Count, Seed, Threshold, Tolerance
from diag.registry import PRODUCT, SELF_TEST, instrument
from diag.result import OUR_CHOICE, Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.loop.facts import Loop
from diag.snapshot.optimizer import OptimizerState, described_optimizer

SOURCE = (
    "Cohen et al. 2021, arXiv:2103.00065; Cohen et al. 2022, arXiv:2207.14484 (Adam); Mulayoff, Michaeli 2024, "
    "arXiv:2306.07850 (small batches)"
)

EDGE_BEGINS, EDGE_ENDS = 0.95, 1.15  # of the threshold: where full-batch runs were seen to hover
SGD_SLACK = 0.05  # to either side of SGD's own threshold, as much as the Gauss-Newton matrix may be off; our choice
TAIL = 3  # the last third of a course is judged

PROVES_NOTHING = "A sharpness below the threshold is necessary for stability and does not prove it."


@dataclass(frozen=True, kw_only=True, eq=False)
class EdgeOfStability(Result):
    """The largest eigenvalue that the optimizer sees, beside the largest that it can bear."""

    ratio: float = measured("lambda_max / threshold", remark="NaN where the threshold is not known")
    lambda_max: float = measured(
        "largest eigenvalue of the Hessian as the optimizer sees it: with the weight decay that it adds to the "
        "gradient, preconditioned where it divides its steps"
    )
    residual: float = measured("an eigenvalue lies within this of lambda_max", remark="depends on the rounding")
    threshold: float = measured(
        "largest stable eigenvalue at this learning rate", remark="NaN where it is not known"
    )
    rule: str = measured("the threshold as a formula")
    sharpness: float = measured("largest eigenvalue of the Hessian of the loss itself")
    trace: float = measured("trace of the Hessian of the loss")
    trace_standard_error: float = measured("standard error of the trace")
    trace_ratio: float = measured(
        "learning rate x trace / 2 x (n - B) / (B (n - 1)): above 1 the point is not a linearly stable "
        "minimum of a squared loss under SGD with batches of B",
        remark="0 for full batches; NaN where B is not given or the optimizer is not plain SGD",
    )
    trace_ratio_standard_error: float = measured("standard error of the trace ratio")
    scatter_ratio: float = measured(
        "learning rate over the bound of equation 15 (the examples' curvature along the top eigenvector) on "
        "SGD with batches of B",
        remark="NaN where B is not given, the optimizer not plain SGD or the loss not squared",
    )
    norm_ratio: float = measured("learning rate over the bound of equation 16 (norms of the examples' curvature)")
    norm_ratio_standard_error: float = measured("standard error of the norm ratio", remark="0 from all examples")
    mean_square_ratio: float = measured(
        "learning rate over the exact threshold of mean-square stability", remark="NaN where the data are too many"
    )
    learning_rate: float = measured(
        "learning rate, the largest of the parameter groups", remark="NaN where there is none"
    )
    optimizer_kind: str = measured("class of the optimizer")
    num_products: int = measured("Hessian-vector products spent", remark="depends on the rounding")

    def verdict(self) -> Verdict:
        unmet = self.unmet()
        if unmet is not None:
            return unmet.verdict(SOURCE, PROVES_NOTHING)
        if not math.isnan(self.scatter_ratio):
            return self._under_small_batches()
        begins, ends = self._band()
        slack = self.residual / self.threshold
        if self.ratio - slack > ends:
            return self._judged(
                Level.WARNING,
                f"Linearly unstable: {self._compared()}, beyond the edge at which training hovers.",
                advice="If the loss spikes or diverges, lower the learning rate or warm it up; a burst may pass by "
                "itself.",
                refutation="The next measurements come back to the threshold while the loss goes on falling.",
            )
        if self.ratio + slack > ends:
            return self._judged(Level.UNKNOWN, f"Near the upper end of the edge of stability: {self._compared()}.")
        where = "At the edge of stability, where training hovers"
        if self.ratio < begins:
            where = "Below the edge of stability"
        return self._judged(Level.OK, f"{where}: {self._compared()}.", advice=PROVES_NOTHING)

    def _under_small_batches(self) -> Verdict:
        """Of a squared loss that is fitted, where SGD's own thresholds are theorems."""
        exact = self.mean_square_ratio
        if not math.isnan(exact):
            value, which = exact, "SGD's exact mean-square threshold"
        else:
            lower = {
                "2 / its largest eigenvalue": self.ratio - self.residual / self.threshold,
                "the bound of equation 15": self.scatter_ratio,
                "the bound of equation 16": self.norm_ratio - 2 * self.norm_ratio_standard_error,
            }
            which = max(lower, key=lambda name: -math.inf if math.isnan(lower[name]) else lower[name])
            value = lower[which]
        numbers = f"the learning rate {format_number(self.learning_rate)} is {format_number(value)} of {which}"
        about: dict[str, Any] = {"value": value, "threshold": 1.0, "threshold_source": "exact for a quadratic"}
        if abs(value - 1) <= SGD_SLACK:
            return self._judged(Level.UNKNOWN, f"Near SGD's own edge of stability: {numbers}.", **about)
        if value > 1:
            return self._judged(
                Level.WARNING,
                f"No linearly stable minimum under SGD: {numbers}.",
                advice="If the loss on all the data rises from here, lower the learning rate or enlarge the batch.",
                refutation="SGD at this learning rate and batch size stays here.",
                **about,
            )
        if math.isnan(exact):
            sentence = f"No necessary condition of SGD's linear stability is broken: {numbers}."
            return self._judged(Level.OK, sentence, advice=PROVES_NOTHING, **about)
        return self._judged(Level.OK, f"Linearly stable under SGD, in the mean square: {numbers}.", **about)

    def _compared(self) -> str:
        return (
            f"{_largest(self.lambda_max, self.sharpness, self.optimizer_kind)}, {format_number(self.ratio)} of the "
            f"threshold {format_number(self.threshold)} of {self.optimizer_kind} at learning rate "
            f"{format_number(self.learning_rate)}"
        )

    def _band(self) -> tuple[float, float]:
        return self.setting("edge_begins"), self.setting("edge_ends")

    def _judged(self, level: Level, sentence: str, **more: Any) -> Verdict:
        # That Adam's divisor may be taken as constant is an observation; the rest is linear algebra.
        theorem = self.optimizer_kind == "SGD"
        more.setdefault("confidence", Confidence.THEOREM if theorem else Confidence.STRONG_EMPIRICAL)
        more.setdefault("value", self.ratio)
        more.setdefault("threshold", self._band()[1])
        more.setdefault(
            "threshold_source", f"the threshold is exact for a quadratic; the band around it is {OUR_CHOICE}"
        )
        return Verdict(level, sentence, source=SOURCE, **more)

    @classmethod
    def trend(cls, series: Sequence[tuple[int, Self]]) -> Verdict:
        """The course: where the last third of the measurements lies, and when the edge was first reached."""
        last = series[-1][1]
        judged = [(step, r) for step, r in series if r.unmet() is None]
        if len(judged) < TAIL or last.unmet() is not None or not math.isnan(last.scatter_ratio):
            return last.verdict()
        tail = judged[-max(TAIL, len(judged) // TAIL) :]
        typical = median(r.ratio for _, r in tail)
        begins, ends = last._band()
        over = f"over the last {len(tail)} measurements, steps {tail[0][0]:,} to {tail[-1][0]:,}"
        numbers = f"the median of the largest eigenvalue over its threshold is {format_number(typical)} {over}"
        if typical > ends:
            return last._judged(
                Level.WARNING,
                f"Linearly unstable for long: {numbers}.",
                advice="Lower the learning rate, or find what keeps the loss from leaving the sharp region.",
                refutation="The loss on all the data keeps falling over these steps.",
            )
        if typical < begins:
            return last._judged(Level.OK, f"Below the edge of stability: {numbers}.", advice=PROVES_NOTHING)
        reached = next(step for step, r in judged if r.ratio >= begins)
        return last._judged(
            Level.OK, f"Training is at the edge of stability: {numbers}; it was first reached at step {reached:,}."
        )

    def plot(self, ax: Any = None) -> None:
        """The largest eigenvalue as a bar up to its threshold."""
        ax.barh([self.optimizer_kind], [self.lambda_max], xerr=[self.residual], height=0.4)
        if not math.isnan(self.threshold):
            ax.axvline(self.threshold, color="tab:orange", label="stable up to here")
            ax.legend()
        ax.set(
            xlabel="largest eigenvalue of the Hessian as the optimizer sees it", ylabel="optimizer", ylim=(-1, 1)
        )

    @classmethod
    def plot_trend(cls, ax: Any, series: Sequence[tuple[int, Self]]) -> None:
        """The largest eigenvalue and its threshold over the steps."""
        steps = [step for step, _ in series]
        ax.plot(steps, [r.lambda_max for _, r in series], marker="o", markersize=3, label="largest eigenvalue")
        ax.plot(steps, [r.threshold for _, r in series], color="tab:orange", label="stable up to here")
        ax.set(xlabel="step", ylabel="largest eigenvalue (as the optimizer sees it)")
        ax.legend()


def _largest(seen: float, plain: float, kind: str, threshold: float = math.inf) -> str:
    """Which largest eigenvalue it is, and what it is: that of the Hessian itself has another value."""
    share = _of_threshold(seen, threshold)
    if seen == plain:
        return f"the largest eigenvalue of the Hessian is {format_number(seen)}{share}"
    which = "preconditioned Hessian" if kind in DIVISORS.keys() - {"SGD"} else f"Hessian as {kind} sees it"
    both = f"{format_number(seen)} (of the Hessian: {format_number(plain)})"
    return f"the largest eigenvalue of the {which} is {both}{share}"


def _of_threshold(seen: float, threshold: float) -> str:
    return f", {format_number(seen / threshold)} of the threshold" if math.isfinite(threshold) else ""


def _passes(settings: Mapping[str, Any]) -> float:
    return float(SELF_TEST + PRODUCT * (12 + settings["trace_probes"]))  # a dozen products find the eigenvalue


@instrument(
    source=SOURCE,
    title="Edge of stability",
    passes=_passes,
    why="Above this threshold steps no longer settle along the sharpest direction: the loss oscillates "
    "there. Many trainings hover at it and go on well; far above it they diverge.",
    formula="ratio = lambda_max(D^(-1/2) H D^(-1/2)) / threshold; SGD: D = 1, threshold = 2 / lr",
)
def edge_of_stability(
    hessian: LinearOperator,
    optimizer: OptimizerState,
    loop: Loop | None = None,
    *,
    batch_size: Count | None = None,
    trace_probes: Count = 10,
    tolerance: Tolerance = 1e-3,
    max_products: Count = 200,
    edge_begins: Threshold = EDGE_BEGINS,
    edge_ends: Threshold = EDGE_ENDS,
    seed: Seed = 0,
) -> EdgeOfStability:
    """The largest eigenvalue of the Hessian against the largest at which the optimizer's steps are stable.

    hessian: of the mean loss, a LinearOperator of size P. optimizer: its kind, settings and state, or the torch
    optimizer itself. The table holds SGD (plain, momentum, dampening, Nesterov), Adam, AdamW and RMSprop, whose
    Hessian is preconditioned as D^(-1/2) H D^(-1/2); another optimizer gets numbers and no verdict. Weight decay
    that is added to the gradient shifts the curvature, and learning rates that differ between groups scale it.

    `batch_size` is that of training (None: that of the watched `loop`). Where it covers all the data given, the
    statement is about full-batch steps: below the threshold nothing is proved, at it training hovers, a ratio above
    `edge_ends` is a warning; that band is our choice, uncalibrated. With smaller batches there is a verdict for
    plain SGD on a squared loss that is fitted: two necessary conditions, and on small data the exact threshold. At
    most `max_products` go into the eigenvalue, to `tolerance`, and `trace_probes` into the trace.

    Raises InvalidInput where hessian or optimizer are not of these kinds, or products are not finite. Source: Cohen
    et al. 2021, arXiv:2103.00065, and 2022, arXiv:2207.14484; for small batches Mulayoff and Michaeli 2024, theorem
    1 and equations 15 and 16 (for the trace with examples of rank one).
    """
    state, batch_size = _checked(hessian, optimizer), _of_training(hessian, batch_size, loop)
    stability = linear_stability(hessian, state)
    run: dict[str, Any] = {"largest": 1, "tolerance": tolerance, "max_products": max_products, "seed": seed}
    plain = carried_eigenpairs(hessian, "hessian", **run)
    # Preconditioned, earlier vectors save nothing: the preconditioner turns them.
    seen = plain if stability.operator is hessian else eigenpairs(stability.operator, **run)
    traced = trace_and_norm(hessian, num_probes=trace_probes, deflate=plain, seed=seed)
    lambda_max = float(seen.values[0])
    sgd = small_batches(hessian, stability, state, batch_size, plain, traced, seed)
    found = _largest(lambda_max, float(plain.values[0]), state.kind, stability.threshold)
    batch = _batch(hessian, batch_size, loop)
    return EdgeOfStability(
        ratio=lambda_max / stability.threshold,
        lambda_max=lambda_max,
        residual=float(seen.residuals[0]) + seen.rounding,
        sharpness=float(plain.values[0]),
        trace=traced.trace.value,
        trace_standard_error=traced.trace.standard_error,
        **_of_noise(traced, trace_factor(stability, state, batch_size, getattr(hessian, "num_examples", 1))),
        **_of_steps(stability, state),
        num_products=seen.num_products + traced.num_products + (plain.num_products if plain is not seen else 0),
        preconditions=_preconditions(stability, found, bool(seen.converged[0]), batch, sgd),
        notes=(*stability.notes, *sgd.notes, *_about(hessian)),
        **_of_small_batches(sgd),
    )


def _of_steps(stability: LinearStability, state: OptimizerState) -> dict[str, Any]:
    """The fields that speak of the optimizer's steps."""
    return {
        "threshold": stability.threshold,
        "rule": stability.rule,
        "learning_rate": stability.learning_rate,
        "optimizer_kind": state.kind,
    }


def _of_small_batches(sgd: SgdStability) -> dict[str, Any]:
    """The fields that speak of SGD on small batches."""
    return {
        "scatter_ratio": sgd.scatter,
        "norm_ratio": sgd.norm,
        "norm_ratio_standard_error": sgd.norm_standard_error,
        "mean_square_ratio": sgd.exact,
    }


def _checked(hessian: Any, optimizer: Any) -> OptimizerState:
    checked_operator(hessian, "hessian")
    if isinstance(optimizer, torch.optim.Optimizer):
        optimizer = described_optimizer(optimizer)
    if not isinstance(optimizer, OptimizerState):
        raise InvalidInput(f"optimizer is {type_of(optimizer)}; expected a torch optimizer.")
    return optimizer


def _of_noise(traced: Any, factor: float) -> dict[str, Any]:
    """The trace against what SGD's noise allows."""
    return {
        "trace_ratio": factor * traced.trace.value,
        "trace_ratio_standard_error": factor * traced.trace.standard_error,
    }


def _of_training(hessian: LinearOperator, batch_size: int | None, loop: Loop | None) -> int | None:
    if batch_size is None and loop is not None and loop.full_batch:
        return int(getattr(hessian, "num_examples", 1))
    return batch_size


def _batch(hessian: LinearOperator, batch_size: int | None, loop: Loop | None) -> tuple[bool, str]:
    """Whether a step uses all the data, and what is known of that, in a clause."""
    n = getattr(hessian, "num_examples", 1)
    if batch_size is not None:
        return batch_size >= n, f"training sees {batch_size} of {n:,} examples a step"
    if loop is not None and loop.batches.calls > 2:
        return False, "the batches of training differ from step to step"
    return False, "give batch_size= of training"


def _preconditions(
    stability: LinearStability,
    found: str,
    converged: bool,
    batch: tuple[bool, str],
    own: SgdStability,
) -> tuple[Precondition, ...]:
    whole, of_batch = batch
    both = (
        Precondition("a known threshold", not stability.unknown, f"{stability.unknown}; {found}."),
        Precondition("convergence", converged, f"{found}, and has not converged; give a larger max_products."),
    )
    if not math.isnan(own.scatter):
        return *both, _fitted(own, f"{of_batch}, and {found}")
    why = f"; SGD's own threshold for small batches does not apply: {own.not_squared}" if own.not_squared else ""
    return *both, Precondition(
        "full-batch steps",
        whole,
        f"the threshold is for full-batch steps ({of_batch}), and {found}, which describes and judges "
        f"nothing{why}.",
    )


def _fitted(own: SgdStability, found: str) -> Precondition:
    return Precondition(
        "interpolation",
        own.fitted,
        f"SGD's own threshold is for a loss that is fitted ({found}), and the residuals are "
        f"{format_share(min(own.unexplained, 99.0))} of the outputs' spread and the curvature of the linearised "
        f"network differs by {format_share(min(own.mismatch, 99.0))}, which describes and judges nothing.",
    )


def _about(hessian: LinearOperator) -> tuple[str, ...]:
    """What the self-test of the products said."""
    test = getattr(hessian, "self_test", None)
    return () if test is None else (test.sentence(),)
