"""Whether two networks are connected, in words: by the errors on the line between them, or its losses alone."""

from __future__ import annotations

import math

from diag.display import format_number
from diag.instruments.mode_connectivity.fields import MeasuredLine
from diag.result import Confidence, Level, Verdict

ENTEZARI = "Entezari et al. 2022, arXiv:2110.06296"
FRANKLE = "Frankle et al. 2020, arXiv:1912.05671"
RE_BASIN = "Ainsworth et al. 2023, arXiv:2209.04836"
SHOWN_SHIFT = 0.05  # in nats and of the larger loss (our choice), from which on the verdict tells it
ADVICE_PLAIN = (
    'Do not average these weights as they are; measure again with align="weights", or ensemble the outputs instead.'
)
ADVICE_ALIGNED = (
    "Do not average these weights; ensemble the outputs, try wider layers, or start both from a common checkpoint."
)
LOWER_PATH = (
    "Measure on more held-out examples and a finer grid (points=25): if the error barrier falls below the line, "
    "the two are connected."
)


def verdict_on_line(line: MeasuredLine) -> Verdict:
    """Connected, partly connected or separated, by the error on the line; by the loss where there is no error."""
    unmet = line.unmet()
    if unmet is not None:
        return unmet.verdict(FRANKLE)
    if math.isnan(line.error_barrier):
        return _loss_only(line)
    value, error = line.deciding_error_barrier, line.deciding_standard_error
    where = "held-out data" if not math.isnan(line.held_out_error_barrier) else "the data"
    word, level = _word(line, value, error)
    return Verdict(
        level,
        f"The two networks are {word} by the straight line{_alignment(line)}: on {where} the error rises by "
        f"{_points(value)} over the chord{_plus_minus(error)}, and the training loss by "
        f"{format_number(_loss_barrier(line))}{_shifted(line)}.",
        advice="" if level is Level.OK else ADVICE_ALIGNED if line.align else ADVICE_PLAIN,
        source=f"{FRANKLE}; {RE_BASIN}" if line.align else FRANKLE,
        confidence=Confidence.STRONG_EMPIRICAL,
        refutation=LOWER_PATH + _limit(line),
        value=value,
        threshold=line.setting("connected_below"),
        threshold_source="Frankle et al. 2020 (2 %, there over the mean of the ends: the same where the ends "
        "agree)",
    )


def _shifted(line: MeasuredLine) -> str:
    if not line.reset_shift > SHOWN_SHIFT * max(1.0, *line.own_losses):
        return ""
    own, there = ((format_number(x[0]), format_number(x[-1])) for x in (line.own_losses, line.losses))
    return (
        ", all with BatchNorm statistics measured again on the data, by which the losses of the two themselves "
        f"go from {own[0]} and {own[1]} to {there[0]} and {there[1]}"
    )


def _loss_barrier(line: MeasuredLine) -> float:
    return line.aligned_barrier if line.align else line.barrier


def _word(line: MeasuredLine, value: float, error: float) -> tuple[str, Level]:
    connected = line.setting("connected_below")
    separated = line.setting("separated_above")
    if not math.isfinite(value):
        return "of unknown connection (the loss is not finite in between)", Level.UNKNOWN
    word = "connected" if value < connected else "partly connected" if value <= separated else "separated"
    if math.isfinite(error) and abs(value - connected) < 2 * error:
        return f"{word} within the uncertainty", Level.UNKNOWN
    return word, Level.OK if value < connected else Level.WARNING


def _alignment(line: MeasuredLine) -> str:
    if not line.align:
        return ""
    before = line.error_barrier if math.isnan(line.held_out_error_barrier) else line.held_out_error_barrier
    return f" after the units of the second were matched by {line.align} (before: {_points(before)})"


def _limit(line: MeasuredLine) -> str:
    if not line.align:
        return ""
    return " A barrier that remains after matching does not show that the solutions differ."


def _loss_only(line: MeasuredLine) -> Verdict:
    value, error = _loss_barrier(line), line.barrier_standard_error
    flat = math.isfinite(error) and value <= 2 * error
    return Verdict(
        Level.OK if flat else Level.UNKNOWN,
        f"The loss rises by {format_number(value)}{_plus_minus(error, False)} over the chord between the two "
        f"networks{_shifted(line)}: "
        + ("no barrier beyond the noise of the examples." if flat else "no paper gives a line for a loss barrier."),
        source=ENTEZARI,
        confidence=Confidence.STRONG_EMPIRICAL,
        value=value,
    )


def _points(share: float) -> str:
    return f"{format_number(100 * share)} points"


def _plus_minus(error: float, share: bool = True) -> str:
    if not math.isfinite(error):
        return ""
    return f" (standard error {_points(error) if share else format_number(error)})"
