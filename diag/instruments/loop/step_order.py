"""Does each optimizer step follow a backward pass of its own?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diag.errors import counted, named, of_the_steps
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import (
    NO_STEP,
    SOURCE,
    THRICE,
    TWICE,
    LoopCheck,
    LoopFinding,
    judged,
)
from diag.registry import instrument
from diag.result import Level
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.steps import OptimizerFacts

BACKWARDS_WITHOUT_STEP = 5  # backward passes without any step


@dataclass(frozen=True, kw_only=True, eq=False)
class StepOrder(LoopCheck):
    """Steps that come at the wrong moment, more than once, or not at all."""


@instrument(
    source=SOURCE,
    title="Order of the steps",
    kind="check",
    why="A step that is taken before, without or twice after its backward pass moves the weights by the "
    "wrong gradient.",
)
def step_order(loop: Loop) -> StepOrder:
    """Whether every step comes after the backward pass that it should use, and once.

    Read from the order of the calls: the model, backward(), zero_grad() and step(), and from the gradient's
    version, which tells whether a backward pass has touched it since the step before.

    Raises nothing of its own.
    """
    findings = [f for o in loop.training for f in _findings(o, loop)]
    findings += [*_missing(loop), *_never_backward(loop)]
    about = {} if loop.training or findings else {"preconditions": (NO_STEP,)}
    return judged(StepOrder, loop.step, findings, _fine(loop), **about)


def _fine(loop: Loop) -> str:
    """What happens a time or two may be meant, as at the end of an accumulation."""
    for o in loop.training:
        if times := sum(t.times for t in (o.before_backward, o.late, o.repeated, o.doubled, o.empty)):
            steps = of_the_steps(times, o.looked, o.steps)
            return f"Steps followed a backward pass of their own, but for {steps}, which may be meant."
    looked = max((o.looked for o in loop.training), default=0)
    return f"A backward pass of its own came before {of_the_steps(looked, looked, loop.step)}."


def _findings(o: OptimizerFacts, loop: Loop) -> Iterator[LoopFinding]:
    if o.before_backward.longest >= TWICE and loop.backwards:  # else nothing calls it at all
        yield _before_backward(o, "the gradients had been zeroed and backward() was still to come")
    elif o.late.longest >= TWICE:
        yield _one_late(o)
    if o.repeated.longest >= TWICE or o.repeated.times >= THRICE:
        yield _repeated(o)
    if o.doubled.longest >= TWICE or o.doubled.times >= THRICE:
        yield _doubled(o)


def _before_backward(o: OptimizerFacts, how: str) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.STEP_BEFORE_BACKWARD,
        f"optimizer.step() is called before backward(): at "
        f"{of_the_steps(o.before_backward.times, o.looked, o.steps)} "
        f"{how}.",
        "Order the calls: zero_grad(), loss.backward(), optimizer.step().",
        "A backward pass between the call of the model and the step.",
        step=o.before_backward.first,
    )


def _one_late(o: OptimizerFacts) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.STEP_BEFORE_BACKWARD,
        "optimizer.step() is called between the call of the model and backward(), so each step uses the gradient "
        "of the batch before.",
        "Order the calls: zero_grad(), loss.backward(), optimizer.step().",
        "A backward pass between the call of the model and the step.",
        step=o.late.first,
    )


def _repeated(o: OptimizerFacts) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.STEP_REPEATED,
        "optimizer.step() is called again on the same gradient: "
        f"{of_the_steps(o.repeated.times, o.looked, o.steps)} had no backward pass since the step before.",
        "Call optimizer.step() once for each backward pass (or set of accumulated ones).",
        "A backward pass between the two steps.",
        step=o.repeated.first,
    )


def _doubled(o: OptimizerFacts) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.PARAMETER_IN_TWO_OPTIMIZERS,
        "Two optimizers step the same parameters on the same gradient: of those of "
        f"{o.kind}, {of_the_steps(o.doubled.times, o.looked, o.steps)} followed another optimizer's without a "
        "backward pass in between.",
        "Give each parameter to one optimizer.",
        "Two optimizers that share no parameter.",
        step=o.doubled.first,
    )


def _idle(o: OptimizerFacts) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.STEP_MISSING,
        f"{o.kind}, which holds {named(o.unused)}, never steps: their gradient was zeroed without having been used "
        f"at {counted(o.idle.times, 'step')} that were looked at, while another optimizer steps.",
        "Call the step() of each optimizer, with parentheses, after backward().",
        "A step of this optimizer.",
        step=1,
        layers=o.unused,
    )


def _never_backward(loop: Loop) -> Iterator[LoopFinding]:
    """Steps of an optimizer of which no parameter ever has a gradient, in a loop without a backward pass."""
    held = {name for o in loop.training for name in o.held}
    missing = [p.missing for p in loop.parameters if p.name in held and p.trainable]
    steps = sum(o.steps for o in loop.training)
    called = loop.backwards > 0 or any(letter in pattern.letters for pattern in loop.order for letter in "Bb")
    if called or not loop.calls or steps < THRICE or not missing or min(missing) < TWICE:
        return
    yield LoopFinding(
        Level.ALARM,
        Cause.GRADIENT_ABSENT,
        f"backward() is never called: the optimizer has stepped {counted(steps, 'time')}, the model was called "
        f"{counted(loop.calls, 'time')}, and no parameter has a gradient.",
        "Call loss.backward() before the step; in a closure before it returns the loss.",
        "A parameter with a gradient.",
        step=1,
    )


def _missing(loop: Loop) -> Iterator[LoopFinding]:
    yield from (_idle(o) for o in loop.optimizers if o.unused and o.idle)
    if not any(o.steps for o in loop.optimizers) and loop.zeroed_without_step >= BACKWARDS_WITHOUT_STEP:
        yield LoopFinding(
            Level.ALARM,
            Cause.STEP_MISSING,
            f"No optimizer has stepped: {loop.unstepped:,} backward passes were made and their "
            "gradients zeroed again.",
            "Call optimizer.step() after backward(), with parentheses.",
            "An optimizer step.",
        )
