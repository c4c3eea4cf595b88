"""Are the gradients of several micro-batches put together as was meant?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from diag.errors import counted, of_the_steps
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import NO_STEP, SOURCE, THRICE, LoopCheck, LoopFinding, judged
from diag.registry import instrument
from diag.result import Level
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.steps import OptimizerFacts, Pattern

PARTS_OF_A_BATCH = 4  # at least
REPEATED_EVENTS = re.compile(r"(?:\(([A-Za-z]+)\)|([A-Za-z]))(\d+)")


@dataclass(frozen=True, kw_only=True, eq=False)
class GradientAccumulation(LoopCheck):
    """Gradients of micro-batches that are summed or lost."""


@instrument(
    source=SOURCE,
    title="Accumulation of gradients",
    kind="check",
    why="Accumulated gradients that are not averaged act as a learning rate several times larger; those "
    "that are lost make the batch smaller than intended.",
)
def gradient_accumulation(loop: Loop) -> GradientAccumulation:
    """Whether the backward passes of a step make up its gradient, as their mean.

    Reported are steps that follow several batches of a DataLoader, each with its own call of the model and its own
    backward pass from the undivided mean loss, and gradients that are zeroed before any step uses them. Several
    backward passes from one batch (the terms of a loss, a real and a generated half) add up as they should.

    Raises nothing of its own.
    """
    about = {} if loop.training else {"preconditions": (NO_STEP,)}
    passes = max((o.passes for o in loop.training), default=0)
    fine = f"{counted(passes, 'backward pass')} a step." if passes < 2 else f"{passes:,} backward passes a step."
    findings = list(_findings(loop)) if loop.training else []
    return judged(GradientAccumulation, loop.step, findings, fine, **about)


def _findings(loop: Loop) -> Iterator[LoopFinding]:
    for o in loop.training:
        if o.lost.longest >= THRICE or (o.lost.times >= THRICE and 2 * o.lost.times > o.steps):
            yield _lost(o)
    summed = [p for p in loop.order if micro_batches(p) > 1]
    steps = sum(p.count for p in summed)
    total = sum(p.count for p in loop.order if "S" in p.letters)
    means = [f for f in loop.losses if f.calls >= THRICE]
    undivided = bool(means) and all(f.root and f.factor == 1 and f.reduction == "mean" for f in means)
    undivided |= loop.roots.looked >= THRICE and loop.roots.undivided == loop.roots.looked
    # Gradients that are never zeroed are sums of all steps, not of some batches.
    kept = any(o.unzeroed.longest >= THRICE - 1 for o in loop.training)
    # The same inputs again and again are samples of one gradient, and a closure may be called any number of times.
    others = not kept and loop.batches.lag != 1 and not any(o.by_closure for o in loop.training)
    if steps >= THRICE - 1 and 2 * steps > total and undivided and others and len(loop.training) == 1:
        yield _summed(summed, steps, total, loop.training[0].steps)


def micro_batches(pattern: Pattern) -> int:
    """How many batches, or parts of one, each called, reduced and sent backward by itself, a step was made of; 1
    where it was made otherwise. Two or three calls on one batch may be the terms of a loss."""
    events = written_out(pattern.letters).partition("S")[0]
    letters = "".join(letter for letter in events if letter in "DFB")
    number = letters.count("B")
    if number and letters in ("DFB" * number, "FBD" * number, "BDF" * number):
        return number
    # A closure that is called several times zeroes the gradient each time.
    within = "".join(letter for letter in events if letter in "FBZ").strip("Z")
    parts = number >= PARTS_OF_A_BATCH and letters.count("D") <= 1 and within == "FB" * number
    return number if parts else 1


def written_out(letters: str) -> str:
    """An order without its brackets: "(DFB)2S" becomes "DFBDFBS"."""
    return REPEATED_EVENTS.sub(lambda found: (found[1] or found[2]) * int(found[3]), letters)


def _lost(o: OptimizerFacts) -> LoopFinding:
    passes = o.passes_lost
    lost = "an earlier backward pass was" if passes == 1 else f"{passes:,} earlier backward passes were"
    return LoopFinding(
        Level.ALARM,
        Cause.ACCUMULATION_LOST,
        f"Gradients are zeroed before they are used: at {of_the_steps(o.lost.times, o.looked, o.steps)}, "
        f"{lost} thrown away and only the last one counted.",
        "Call optimizer.zero_grad() after optimizer.step() only, not at every micro-batch.",
        "A gradient that holds all backward passes since the step before.",
        step=o.lost.first,
        explained_by=(Cause.STEP_MISSING,),
    )


def _summed(patterns: list[Pattern], steps: int, total: int, all_steps: int) -> LoopFinding:
    number = max(micro_batches(p) for p in patterns)
    return LoopFinding(
        Level.WARNING,
        Cause.ACCUMULATION_NOT_DIVIDED,
        f"The gradients of {number:,} batches are summed for each step, not averaged: the loss is the mean of each "
        f"batch and is not divided by {number:,}, so the gradient is {number:,} times as large "
        f"({of_the_steps(steps, total, all_steps)}).",
        f"Call (loss / {number}).backward() for each batch.",
        f"A learning rate that was chosen for the sum of {number:,} batches.",
        step=patterns[0].first,
    )
