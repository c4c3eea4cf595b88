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
from diag.curvature.stability.sgd import SgdStability, small_batches, trace_factor
from diag.display import format_number, format_share
from diag.errors import InvalidInput, type_of
from diag.instruments.edge_of_stability.fields import MeasuredEdge
from diag.instruments.edge_of_stability.judging import (
    PROVES_NOTHING,
    SOURCE,
    edge_band,
    judged_edge,
    verdict_on_edge,
    which_largest,
)
from diag.linalg.lanczos import eigenpairs
from diag.linalg.operator import LinearOperator, checked_operator
from diag.linalg.trace import trace_and_norm
from diag.ranges import Count, Seed, Threshold, Tolerance
from diag.registry import PRODUCT, SELF_TEST, instrument
from diag.result import Level, Precondition, Verdict
from diag.snapshot.loop.facts import Loop
from diag.snapshot.optimizer import OptimizerState, described_optimizer

EDGE_BEGINS, EDGE_ENDS = 0.95, 1.15  # of the threshold: where full-batch runs were seen to hover
TAIL = 3  # the last third of a course is judged


@dataclass(frozen=True, kw_only=True, eq=False)
class EdgeOfStability(MeasuredEdge):
    """Is the loss as sharp as the optimizer can bear?"""

    def verdict(self) -> Verdict:
        return verdict_on_edge(self)

    @classmethod
    def trend(cls, series: Sequence[tuple[int, Self]]) -> Verdict:
        """The course: where the last third of the measurements lies, and when the edge was first reached."""
        last = series[-1][1]
        judged = [(step, r) for step, r in series if r.unmet() is None]
        if len(judged) < TAIL or last.unmet() is not None or not math.isnan(last.scatter_ratio):
            return last.verdict()
        tail = judged[-max(TAIL, len(judged) // TAIL) :]
        typical = median(r.ratio for _, r in tail)
        begins, ends = edge_band(last)
        over = f"over the last {len(tail)} measurements, steps {tail[0][0]:,} to {tail[-1][0]:,}"
        numbers = f"the median of the largest eigenvalue over its threshold is {format_number(typical)} {over}"
        if typical > ends:
            return judged_edge(
                last,
                Level.WARNING,
                f"Linearly unstable for long: {numbers}.",
                advice="Lower the learning rate, or find what keeps the loss from leaving the sharp region.",
                refutation="The loss on all the data keeps falling over these steps.",
            )
        if typical < begins:
            return judged_edge(last, Level.OK, f"Below the edge of stability: {numbers}.", advice=PROVES_NOTHING)
        reached = next(step for step, r in judged if r.ratio >= begins)
        return judged_edge(
            last,
            Level.OK,
            f"Training is at the edge of stability: {numbers}; it was first reached at step {reached:,}.",
        )

    def plot(self, ax: Any = None) -> Any:
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
    found = which_largest(lambda_max, float(plain.values[0]), state.kind, stability.threshold)
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
