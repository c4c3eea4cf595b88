"""Are gradients reset between steps, and not between a backward pass and its step?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diag.errors import counted, named, of_the_steps
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import NO_STEP, SOURCE, TWICE, LoopCheck, LoopFinding, judged, parameters_named
from diag.registry import instrument
from diag.result import Level
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.steps import OptimizerFacts


@dataclass(frozen=True, kw_only=True, eq=False)
class GradientZeroing(LoopCheck):
    """Where gradients were not reset, or were too early."""


@instrument(
    source=SOURCE,
    title="Zeroing of gradients",
    kind="check",
    why="Gradients that are left over from earlier steps are added to the new ones, so that each step goes "
    "where the loss once fell and not where it falls now.",
)
def gradient_zeroing(loop: Loop) -> GradientZeroing:
    """Whether each step uses the gradient of its own backward passes, all of it and nothing else.

    A gradient that is the same tensor at the same version when a backward pass begins as it was after the step
    before was not reset, so backward() adds to it. One that is reset between backward() and step() is lost. Both
    are seen on a few parameters of each optimizer.

    Raises nothing of its own.
    """
    findings = [f for o in loop.training for f in _findings(o)]
    about = {} if loop.training else {"preconditions": (NO_STEP,)}
    return judged(GradientZeroing, loop.step, findings, _fine(loop), **about)


def _fine(loop: Loop) -> str:
    """A single step may be meant, as one more pass that is accumulated."""
    for o in loop.training:
        if times := o.unzeroed.times + o.partly_zeroed.times + o.zeroed_before.times:
            steps = of_the_steps(times, o.looked, o.steps)
            return f"Gradients were reset before steps, but for {steps}, which may be meant."
    looked = max((o.looked for o in loop.training), default=0)
    return f"Gradients were reset before {of_the_steps(looked, looked, loop.step)}."


def _findings(o: OptimizerFacts) -> Iterator[LoopFinding]:
    if o.unzeroed.longest >= TWICE:
        yield _not_zeroed(o)
    elif o.partly_zeroed.longest >= TWICE:
        yield _partly(o)
    if o.zeroed_before.longest >= TWICE:
        yield _zeroed_before(o)
    if o.stale_gradients and not o.unzeroed:
        yield _stale(o)


def _not_zeroed(o: OptimizerFacts) -> LoopFinding:
    times = o.unzeroed.times
    if times >= o.steps - 1:
        often = f"at every one of the {counted(times, 'step')} after the first"
    else:
        often = f"at {of_the_steps(times, o.looked, o.steps)}"
    return LoopFinding(
        Level.ALARM,
        Cause.GRADIENTS_NOT_ZEROED,
        f"The gradients are not zeroed between steps: {often}, "
        "backward() added to the gradients of the step before.",
        "Call optimizer.zero_grad() once in each step, before backward() or after step().",
        "A gradient that is zero or None when backward() begins.",
        step=o.unzeroed.first,
    )


def _partly(o: OptimizerFacts) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.GRADIENTS_NOT_ZEROED,
        f"Some gradients are not zeroed between steps: backward() added to those of {named(o.not_zeroed)} from the "
        f"step before, at {of_the_steps(o.partly_zeroed.times, o.looked, o.steps)}, while others were zeroed.",
        "Zero all gradients of the optimizer: optimizer.zero_grad(), not a part of the model's.",
        "A gradient that is zero or None when backward() begins.",
        step=o.partly_zeroed.first,
        layers=o.not_zeroed,
    )


def _zeroed_before(o: OptimizerFacts) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.GRADIENTS_ZEROED_BEFORE_STEP,
        "The gradients are zeroed between backward() and optimizer.step(): "
        f"{of_the_steps(o.zeroed_before.times, o.looked, o.steps)} had nothing to use, so the weights do not "
        "learn.",
        "Move optimizer.zero_grad() before backward(), or after optimizer.step().",
        "A gradient that is not zero when optimizer.step() is called.",
        step=o.zeroed_before.first,
    )


def _stale(o: OptimizerFacts) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.STALE_GRADIENT,
        f"{parameters_named(o.stale_gradients)} {'step' if len(o.stale_gradients) > 1 else 'steps'} on a gradient "
        "that is left over from an earlier step, while other gradients are zeroed and computed again.",
        "Zero all gradients of the optimizer: optimizer.zero_grad(), not a part of the model's parameters.",
        "A backward pass in each step that reaches these parameters.",
        layers=o.stale_gradients,
    )
