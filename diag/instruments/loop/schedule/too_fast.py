"""Schedulers that run ahead of their plan: stepped too often, or with each batch though made for epochs."""

from __future__ import annotations

from collections.abc import Iterator

from diag.errors import counted
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import THRICE, TWICE, LoopFinding
from diag.result import Level
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.steps import SchedulerFacts

STEEP, HUNDREDTH = 0.8, 1.001e-2  # a schedule for batches decays more slowly; 0.1 * 0.1 is above 0.01 by rounding
SO_FEW, LONG_PAST = 20, 4  # batches within which no schedule for batches ends; times its last milestone


def too_fast(loop: Loop) -> Iterator[LoopFinding]:
    """What steps too often, and what steps as often as the optimizer and was made for epochs."""
    for s in loop.schedulers:
        if s.repeated.longest >= TWICE:
            yield _fast(s, s.repeated.times, s.repeated.first, "more than once after a step of the optimizer")
        elif s.per_micro_batch.longest >= TWICE:
            how = "at each backward pass, several times for a step of the optimizer that accumulates them"
            yield _fast(s, s.per_micro_batch.times, s.per_micro_batch.first, how)
        elif has_milestones_in_epochs(s, loop):
            yield _milestones(s, steps_an_epoch(loop))
        elif is_for_epochs(s, loop):
            yield _within_an_epoch(s, steps_an_epoch(loop))


def _fast(s: SchedulerFacts, times: int, first: int, how: str) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.SCHEDULE_TOO_FAST,
        f"The scheduler ({s.kind}) steps {how}: at {counted(times, 'step')} so far, so the learning rate runs "
        "ahead of its plan.",
        "Call scheduler.step() once, where optimizer.step() is called.",
        "One step of the scheduler for each of the optimizer.",
        step=first,
    )


def is_for_epochs(s: SchedulerFacts, loop: Loop) -> bool:
    """Whether the scheduler steps with each batch, and divides the learning rate by a hundred within one epoch."""
    steep = s.decay <= STEEP and s.decay ** steps_an_epoch(loop) <= HUNDREDTH
    return steps_each_batch(s, loop) and (steep or has_milestones_in_epochs(s, loop))


def has_milestones_in_epochs(s: SchedulerFacts, loop: Loop) -> bool:
    """Whether the scheduler steps with each batch, and its last milestone, from which on the rate is a hundredth,
    is passed in the first half of one epoch: within fewer batches than any schedule has, or long ago by now."""
    within = 0 < 2 * s.last_milestone <= steps_an_epoch(loop) and s.final <= HUNDREDTH
    certain = s.last_milestone <= SO_FEW or s.steps >= LONG_PAST * s.last_milestone
    return within and certain and steps_each_batch(s, loop)


def steps_each_batch(s: SchedulerFacts, loop: Loop) -> bool:
    """Whether the scheduler has stepped as often as its optimizer."""
    steps = loop.optimizers[s.optimizer].steps if s.optimizer >= 0 else 0
    return s.steps >= THRICE and abs(s.steps - steps) <= 1


def steps_an_epoch(loop: Loop) -> float:
    """Steps of the optimizer in an epoch of the loader; several calls of the model may make one."""
    return loop.batches.loader_batches / max(loop.calls / max(loop.step, 1), 1.0)


def _within_an_epoch(s: SchedulerFacts, batches: float) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.SCHEDULE_TOO_FAST,
        f"The scheduler ({s.kind}) steps after every batch and multiplies the learning rate by {s.decay:.3g} each "
        f"time, so that it is {s.decay**batches:.1g} of what it was when the {batches:,.0f} steps of one epoch are "
        "over.",
        "Call scheduler.step() after each epoch, or let it decay as slowly as batches need.",
        "A training that is meant to end within an epoch.",
        step=s.first_step,
    )


def _milestones(s: SchedulerFacts, batches: float) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.SCHEDULE_TOO_FAST,
        f"The scheduler ({s.kind}) steps after every batch, so its last milestone comes after "
        f"{s.last_milestone:,} of the {batches:,.0f} batches of the first epoch, and the learning rate is "
        f"{s.final:.2g} of its first value from there on.",
        "Call scheduler.step() after each epoch, or count the milestones in batches.",
        "A training that is meant to end within an epoch.",
        step=s.first_step,
    )
