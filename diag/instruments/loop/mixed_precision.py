"""Is the gradient scaler used as it must be?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diag.errors import of_the_steps
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import SOURCE, LoopCheck, LoopFinding, judged
from diag.registry import instrument
from diag.result import Level, Precondition
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.steps import OptimizerFacts, ScalingFacts

CALLS_LOOKED_AT_LEAST = 3
USUAL_SCALE, SLOW_BACKOFF = 65_536, 0.9
FOREVER = 17  # steps left out in a row: the scale, 65,536 at first, has fallen below one


@dataclass(frozen=True, kw_only=True, eq=False)
class MixedPrecision(LoopCheck):
    """A gradient scaler that is bypassed, idle or stuck."""


@instrument(
    source=SOURCE,
    title="Mixed precision",
    kind="check",
    why="Gradients that still carry the loss scale are thousands of times too large, and clipping them then "
    "cuts everything to nearly nothing.",
)
def mixed_precision(loop: Loop) -> MixedPrecision:
    """Whether scaled gradients are unscaled before they are clipped and stepped on, and autocast runs where they
    are.

    Autocast is taken to be on where the model is called under it, where its parameters are of half precision, or
    where a tensor of half precision is kept in the graph of the outputs.

    Raises nothing of its own.
    """
    s = loop.scaling
    used = Precondition("a GradScaler", s.scaled_losses > 0, "no GradScaler was used.")
    fine = f"Gradients of {s.scaled_losses:,} scaled losses were unscaled before every clip and step."
    return judged(MixedPrecision, loop.step, list(_findings(loop, s)), fine, preconditions=(used,))


def _findings(loop: Loop, s: ScalingFacts) -> Iterator[LoopFinding]:
    for o in loop.training:
        if o.scaled:
            yield _still_scaled(o)
    if s.clipped_scaled and s.scale != 1:
        yield _clipped(s, loop)
    if s.skipped.running >= FOREVER:
        scale = s.scale or 0.0
        yield _too_large(s, scale) if scale > USUAL_SCALE else _forever(s)
    if (
        s.scaled_losses >= CALLS_LOOKED_AT_LEAST
        and s.looked >= CALLS_LOOKED_AT_LEAST
        and not s.autocast
        and not s.half_parameters
    ):
        yield _off(s)


def _still_scaled(o: OptimizerFacts) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.GRADIENTS_STILL_SCALED,
        "The optimizer steps on gradients that still carry the loss scale: "
        f"{of_the_steps(o.scaled.times, o.looked, o.steps)} by optimizer.step() after "
        "scaler.scale(loss).backward().",
        "Call scaler.step(optimizer) instead of optimizer.step(), then scaler.update().",
        "A scale of one.",
        step=o.scaled.first,
    )


def _clipped(s: ScalingFacts, loop: Loop) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.CLIPPING_BEFORE_UNSCALING,
        "Gradients are clipped while they still carry the loss scale, at "
        f"{of_the_steps(s.clipped_scaled.times, loop.looked, loop.step)}: the threshold acts on values too "
        f"large by that factor.",
        "Call scaler.unscale_(optimizer) before clip_grad_norm_.",
        "A scale of one.",
        step=s.clipped_scaled.first,
    )


def _too_large(s: ScalingFacts, scale: float) -> LoopFinding:
    """No ordinary scale was ever tried."""
    slow = 1 > (s.backoff or 0) > SLOW_BACKOFF
    return LoopFinding(
        Level.ALARM,
        Cause.SCALER_SKIPS_FOREVER,
        f"The GradScaler has left out the last {s.skipped.running:,} steps in a row, and its scale is still "
        f"{scale:.2g}, where {USUAL_SCALE:,} is usual: at such a scale gradients overflow"
        + (f", and each step that is left out brings it down to {s.backoff:g} of itself only." if slow else "."),
        "Leave init_scale at 2**16 and backoff_factor at 0.5.",
        "Gradients that are not finite at a scale of one.",
        step=s.skipped.since,
    )


def _forever(s: ScalingFacts) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.SCALER_SKIPS_FOREVER,
        f"The GradScaler has left out the last {s.skipped.running:,} steps in a row: it finds a gradient that is "
        "not finite each time.",
        "Find the first module whose gradient or output is NaN or infinite; compute that part in float32. Leave "
        "the scale that the scaler begins with as it is.",
        "A step that is taken.",
        step=s.skipped.since,
        explained_by=(Cause.INPUTS_NOT_NORMALIZED, Cause.TARGETS_NOT_NORMALIZED, Cause.DATA_NOT_FINITE),
    )


def _off(s: ScalingFacts) -> LoopFinding:
    return LoopFinding(
        Level.WARNING,
        Cause.AUTOCAST_OFF,
        f"A GradScaler scales the loss, and the model does not run under autocast: {s.looked:,} calls of it used "
        "no half precision.",
        "Call the model inside torch.autocast(device_type, dtype), or leave out the scaler.",
        "A tensor of half precision in the forward pass.",
        step=1,
    )
