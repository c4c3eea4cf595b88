"""Where a measured sharpness lies, beside what the optimizer, or SGD on small batches, can bear."""

from __future__ import annotations

import math
from typing import Any

from diag.curvature.stability.preconditioner import DIVISORS
from diag.display import format_number
from diag.instruments.edge_of_stability.fields import MeasuredEdge
from diag.result import OUR_CHOICE, Confidence, Level, Verdict

SOURCE = (
    "Cohen et al. 2021, arXiv:2103.00065; Cohen et al. 2022, arXiv:2207.14484 (Adam); Mulayoff, Michaeli 2024, "
    "arXiv:2306.07850 (small batches)"
)
SGD_SLACK = 0.05  # to either side of SGD's own threshold, as much as the Gauss-Newton matrix may be off; our choice
PROVES_NOTHING = "A sharpness below the threshold is necessary for stability and does not prove it."


def verdict_on_edge(edge: MeasuredEdge) -> Verdict:
    """Where the sharpness of one moment lies; under small batches by the thresholds of SGD."""
    unmet = edge.unmet()
    if unmet is not None:
        return unmet.verdict(SOURCE, PROVES_NOTHING)
    if not math.isnan(edge.scatter_ratio):
        return _under_small_batches(edge)
    begins, ends = edge_band(edge)
    slack = edge.residual / edge.threshold
    if edge.ratio - slack > ends:
        return judged_edge(
            edge,
            Level.WARNING,
            f"Linearly unstable: {_compared(edge)}, beyond the edge at which training hovers.",
            advice="If the loss spikes or diverges, lower the learning rate or warm it up; a burst may pass by "
            "itself.",
            refutation="The next measurements come back to the threshold while the loss goes on falling.",
        )
    if edge.ratio + slack > ends:
        return judged_edge(edge, Level.UNKNOWN, f"Near the upper end of the edge of stability: {_compared(edge)}.")
    where = "At the edge of stability, where training hovers"
    if edge.ratio < begins:
        where = "Below the edge of stability"
    return judged_edge(edge, Level.OK, f"{where}: {_compared(edge)}.", advice=PROVES_NOTHING)


def _under_small_batches(edge: MeasuredEdge) -> Verdict:
    """Of a squared loss that is fitted, where SGD's own thresholds are theorems."""
    exact = edge.mean_square_ratio
    if not math.isnan(exact):
        value, which = exact, "SGD's exact mean-square threshold"
    else:
        lower = {
            "2 / the largest eigenvalue of the Hessian": edge.ratio - edge.residual / edge.threshold,
            "the bound by the examples' curvature along the sharpest direction (equation 15)": edge.scatter_ratio,
            "the bound by the norms of the examples' curvature (equation 16)": edge.norm_ratio
            - 2 * edge.norm_ratio_standard_error,
        }
        which = max(lower, key=lambda name: -math.inf if math.isnan(lower[name]) else lower[name])
        value = lower[which]
    numbers = f"the learning rate {format_number(edge.learning_rate)} is {format_number(value)} of {which}"
    about: dict[str, Any] = {"value": value, "threshold": 1.0, "threshold_source": "exact for a quadratic"}
    if abs(value - 1) <= SGD_SLACK:
        return judged_edge(edge, Level.UNKNOWN, f"Near SGD's own edge of stability: {numbers}.", **about)
    if value > 1:
        return judged_edge(
            edge,
            Level.WARNING,
            f"No linearly stable minimum under SGD: {numbers}.",
            advice="If the loss on all the data rises from here, lower the learning rate or enlarge the batch.",
            refutation="SGD at this learning rate and batch size stays here.",
            **about,
        )
    if math.isnan(exact):
        sentence = f"No necessary condition of SGD's linear stability is broken: {numbers}."
        return judged_edge(edge, Level.OK, sentence, advice=PROVES_NOTHING, **about)
    return judged_edge(edge, Level.OK, f"Linearly stable under SGD, in the mean square: {numbers}.", **about)


def _compared(edge: MeasuredEdge) -> str:
    return (
        f"{which_largest(edge.lambda_max, edge.sharpness, edge.optimizer_kind)}, {format_number(edge.ratio)} of "
        f"the threshold {format_number(edge.threshold)} of {edge.optimizer_kind} at learning rate "
        f"{format_number(edge.learning_rate)}"
    )


def edge_band(edge: MeasuredEdge) -> tuple[float, float]:
    """The shares of the threshold between which training counts as hovering at the edge."""
    return edge.setting("edge_begins"), edge.setting("edge_ends")


def judged_edge(edge: MeasuredEdge, level: Level, sentence: str, **more: Any) -> Verdict:
    """A verdict with the ratio, its limit and their source, unless `more` says otherwise."""
    # That Adam's divisor may be taken as constant is an observation; the rest is linear algebra.
    theorem = edge.optimizer_kind == "SGD"
    more.setdefault("confidence", Confidence.THEOREM if theorem else Confidence.STRONG_EMPIRICAL)
    more.setdefault("value", edge.ratio)
    more.setdefault("threshold", edge_band(edge)[1])
    more.setdefault(
        "threshold_source", f"the threshold is exact for a quadratic; the band around it is {OUR_CHOICE}"
    )
    return Verdict(level, sentence, source=SOURCE, **more)


def which_largest(seen: float, plain: float, kind: str, threshold: float = math.inf) -> str:
    """Which largest eigenvalue it is, and what it is: that of the Hessian itself has another value."""
    share = _of_threshold(seen, threshold)
    if seen == plain:
        return f"the largest eigenvalue of the Hessian is {format_number(seen)}{share}"
    which = "preconditioned Hessian" if kind in DIVISORS.keys() - {"SGD"} else f"Hessian as {kind} sees it"
    both = f"{format_number(seen)} (of the Hessian: {format_number(plain)})"
    return f"the largest eigenvalue of the {which} is {both}{share}"


def _of_threshold(seen: float, threshold: float) -> str:
    return f", {format_number(seen / threshold)} of the threshold" if math.isfinite(threshold) else ""
