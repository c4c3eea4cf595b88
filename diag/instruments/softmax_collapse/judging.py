"""How near the gradients of a softmax are to rounding away, in words."""

from __future__ import annotations

from diag.display import format_number, format_share
from diag.instruments.softmax_collapse.fields import MeasuredMargins
from diag.linalg.softmax_rounding import SIGNIFICAND_BITS, collapse_margin
from diag.result import OUR_CHOICE, Confidence, Level, Verdict

SOURCE = "Prieto, Barsbey, Mediano, Birdal 2025, arXiv:2501.04697"
LOW_PRECISION = ("bfloat16", "float16")
CARRIED_OVER = 0.2  # held-out accuracy this close to that of the examples: what is fitted is learned, too
ROUNDED_AWAY = 1e-3  # relative error of the median gradient from which the loss is seen to feel rounding
CONTROLS = (
    "If training is to go on, use diag.stable_cross_entropy or compute the loss in float64 as a control; weight "
    "decay or label smoothing keep the margins from growing."
)
CONTROL_WITHOUT_EFFECT = (
    "Train on from here with diag.stable_cross_entropy: if the margins and the held-out accuracy go on as they do "
    "now, rounding was not what held them."
)


def verdict_on_margins(result: MeasuredMargins) -> Verdict:
    """Whether gradients have rounded to zero, are near it, or far."""
    unmet = result.unmet()
    if unmet is not None:
        return unmet.verdict(SOURCE)
    count, n = round(result.collapsed * len(result.margins)), len(result.margins)
    if result.collapsed > 0:
        alarm_at = result.setting("alarm_at")
        # A row whose gradient rounds away is right by a wide margin: that nothing more is learned is a loss
        # only where held-out data say that there is more to learn (without them the difference is NaN).
        more_to_learn = result.accuracy - result.held_out_accuracy > CARRIED_OVER
        alarming = result.collapsed >= alarm_at and more_to_learn
        return Verdict(
            Level.ALARM if alarming else Level.DESCRIPTION,
            f"{format_share(result.collapsed)} of the examples ({count:,} of {n:,}) have an exactly zero "
            f"gradient on their true class, by {result.loss}: {_meaning(result)}.",
            advice=CONTROLS,
            source=SOURCE,
            confidence=Confidence.ARITHMETIC,
            refutation=CONTROL_WITHOUT_EFFECT,
            value=result.collapsed,
            threshold=alarm_at if result.collapsed >= alarm_at else 0.0,
            threshold_source=OUR_CHOICE if result.collapsed >= alarm_at else "any example at all",
        )
    return _near(result) or _far(result)


def _meaning(result: MeasuredMargins) -> str:
    if result.dtype in LOW_PRECISION:
        return (
            f"in {result.dtype} this happens at ordinary confidence and is usually harmless at the end of "
            "training, but these examples no longer pull on their own logit"
        )
    edge = format_number(collapse_margin(result.dtype))
    return f"from a margin of about {edge} nats (b ln 2) on, {result.dtype} rounds away what the other classes add"


def _near(result: MeasuredMargins) -> Verdict | None:
    """Collapse is near: by the residual of the gradients' zero sum, or by the median margin."""
    limit = result.setting("near_residual")
    nats = result.setting("near_nats")
    # Rounding alone leaves a residual of about u, so a low precision needs a higher limit.
    limit = max(limit, 4 * 2.0 ** -SIGNIFICAND_BITS[result.dtype])
    if result.zero_sum_residual > limit:
        found = (
            f"the logit gradients miss their zero sum by {format_number(result.zero_sum_residual)} of their size"
        )
        value, threshold = result.zero_sum_residual, limit
    elif result.headroom < nats and result.gradient_error > ROUNDED_AWAY:
        found = f"the median margin is {format_number(result.headroom)} nats below {result.dtype}'s collapse margin"
        value, threshold = result.headroom, nats
    else:
        return None
    return Verdict(
        Level.DESCRIPTION,
        f"No example has collapsed, but collapse is near: {found}.",
        advice=CONTROLS,
        source=SOURCE,
        confidence=Confidence.ARITHMETIC,
        refutation=CONTROL_WITHOUT_EFFECT,
        value=value,
        threshold=threshold,
        threshold_source=OUR_CHOICE,
    )


def _far(result: MeasuredMargins) -> Verdict:
    if result.headroom > 0:
        place = f"the median margin is {format_number(result.headroom)} nats below {result.dtype}'s collapse margin"
    else:
        place = (
            f"the median margin is {format_number(-result.headroom)} nats past log_softmax's collapse margin in "
            f"{result.dtype}, and the gradients of the loss in use are right all the same"
        )
    return Verdict(
        Level.OK,
        f"None of {len(result.margins):,} examples has lost its gradient to rounding, by {result.loss}: {place}.",
        source=SOURCE,
        confidence=Confidence.ARITHMETIC,
        value=result.collapsed,
        threshold=0.0,
    )
