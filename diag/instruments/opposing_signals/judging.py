"""What two groups of opposing examples mean, and what not. Source: Rosenfeld and Risteski, arXiv:2311.04163.

Opposite gradients alone show nothing. A verdict rests on how much of all movement two groups carry, against chance
and random steps, and on whether they trade places from step to step. The thresholds are our choice, uncalibrated.
"""

from __future__ import annotations

import math

from diag.display import format_number, format_share
from diag.instruments.opposing_signals.fields import MeasuredSignals
from diag.result import OUR_CHOICE, Confidence, Level, Verdict

SOURCE = "Rosenfeld, Risteski, ICLR 2024, arXiv:2311.04163"
DIRECTIONS = 5
SWAP, PERSIST, ANTIPHASE, CURVATURE_SHARE, SPIKE = 0.6, 0.2, -0.7, 0.4, 1.1


def of_a_kick(result: MeasuredSignals) -> Verdict:
    """Groups at the two ends of a kick along a sharp direction: do they carry far more than chance explains?"""
    if not result.outsized or result.same_side:
        return _judged(
            result,
            Level.OK,
            f"No two groups of {result.k} stand out along the {DIRECTIONS} sharpest directions: the best carry "
            f"{_carried(result)}, which excludes only large groups with very large features.",
        )
    return _judged(
        result,
        Level.WARNING,
        f"{2 * result.k} of {result.num_examples:,} examples, in two groups that move opposite ways, dominate a "
        f"sharp direction: they carry {_carried(result)}.",
        "Look at the two groups side by side for a feature that they share and labels that disagree; "
        "mode='replay' shows whether they trade places.",
    )


def of_steps(result: MeasuredSignals) -> Verdict:
    """Groups over consecutive steps: do they trade places, and dominate the movement?"""
    oscillates = (
        result.swap >= result.setting("swap_limit") and result.persist <= PERSIST and result.antiphase <= ANTIPHASE
    )
    if result.persist > -ANTIPHASE and result.swap <= PERSIST:
        return _judged(
            result,
            Level.OK,
            f"The same examples stay at each end (persist {format_number(result.persist)}, swap "
            f"{format_number(result.swap)}): they are the hardest and the easiest, not opposing.",
        )
    if not oscillates:
        return _judged(
            result,
            Level.OK,
            f"The ends neither trade places nor stay (swap {format_number(result.swap)}, persist "
            f"{format_number(result.persist)}, antiphase {format_number(result.antiphase)}): no period-two "
            f"oscillation; the groups carry {_carried(result)}.",
        )
    pattern = f"swap {format_number(result.swap)}, antiphase {format_number(result.antiphase)}"
    if not result.outsized or result.same_side:
        return _judged(
            result,
            Level.OK,
            f"Losses oscillate with period two along a sharp direction ({pattern}) and no two groups dominate: "
            f"the ends carry {_carried(result)}; this is the ordinary edge of stability.",
            confidence=Confidence.STRONG_EMPIRICAL,
        )
    spikes = result.mode == "online" and result.spike >= SPIKE and _labels_differ(result)
    found = f" while the mean loss jumps by a factor of {format_number(result.spike)}" if spikes else ""
    return _judged(
        result,
        Level.WARNING,
        f"Two groups of {result.k} examples dominate the steps and trade places ({pattern}){found}: "
        f"they carry {_carried(result)}.",
        "Look at the two groups: clip the gradient, use Adam or lower the learning rate, or repair the labels "
        "or the feature that they share.",
    )


def _carried(result: MeasuredSignals) -> str:
    chance = f"{format_share(result.chance_share)} by number"
    if not math.isnan(result.null_share):
        chance += f", {format_share(result.null_share)} after random steps"
    curvature = (
        ""
        if math.isnan(result.curvature_share)
        else (f" and {format_share(result.curvature_share)} of the curvature")
    )
    return f"{format_share(result.share)} of the loss's movement ({chance}){curvature}"


def _judged(
    result: MeasuredSignals,
    level: Level,
    sentence: str,
    advice: str = "",
    confidence: Confidence = Confidence.WEAK_EMPIRICAL,
) -> Verdict:
    return Verdict(
        level,
        sentence,
        advice=advice,
        source=SOURCE,
        confidence=confidence,
        refutation="Take the named rows out and measure again: the direction should lose its curvature. Late in "
        "training with cross-entropy a few plain hard examples can do the same."
        if level == Level.WARNING
        else "",
        value=result.share,
        threshold=result.limit,
        threshold_source=OUR_CHOICE,
    )


def _labels_differ(result: MeasuredSignals) -> bool:
    return bool(result.labels_a) and _commonest(result.labels_a) != _commonest(result.labels_b)


def _commonest(labels: tuple[int, ...]) -> int:
    return max(set(labels), key=labels.count)
