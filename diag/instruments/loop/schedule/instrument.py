"""Does the learning rate follow the schedule that was meant?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy

from diag.errors import counted
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import NO_STEP, SOURCE, THRICE, TWICE, LoopCheck, LoopFinding, judged
from diag.instruments.loop.schedule.early_rates import gone_early, plateaus
from diag.instruments.loop.schedule.too_fast import HUNDREDTH, is_for_epochs, steps_an_epoch, too_fast
from diag.registry import instrument
from diag.result import Level
from diag.snapshot.history import History
from diag.snapshot.loop.facts import Loop

NOTHING = 1e-6  # of the largest learning rate so far
STILL, STILL_FALLING = 3, 10  # steps at a rate of exactly zero, and at one next to it
RARELY = 5  # steps of the optimizer for one of the scheduler
HALF, NEAR, SAME_RATE_WITHIN = 0.5, 0.1, 1e-4
EPOCHS, MANY = 2, 20  # epochs, or steps without any, that end without a step of the scheduler


@dataclass(frozen=True, kw_only=True, eq=False)
class LearningRateSchedule(LoopCheck):
    """Where the learning rate is not what the schedule was meant to give."""


@instrument(
    source=SOURCE,
    title="Learning-rate schedule",
    kind="check",
    why="A schedule that runs at the wrong pace stops the learning early, or never slows it down; the loss "
    "curve does not say which.",
)
def learning_rate_schedule(history: History, loop: Loop) -> LearningRateSchedule:
    """Whether the schedule's steps are those of the training: not twice, not over early, not another optimizer's.

    A scheduler that steps several times for one step of its optimizer runs too fast; one whose optimizer never
    steps changes nothing; a learning rate that has come down to zero while steps go on trains nothing. A rate of
    zero at the very first step (warm-up) and at the last (a schedule that fits) are as they should be. One that
    steps once for many steps of the optimizer is too slow where training ends while the rate still rises, below
    half of what it leads up to, or where it was made for as many steps as the optimizer took. Milestones that
    leave a hundredth of the rate are too early for a scheduler that steps with each batch where the last lies in
    the first half of an epoch and within 20 batches, or is long past: four times as many were trained. A resumed
    run starts its schedule over where the rate is again that of its first step and had changed since. One that
    waits for a plateau with mode="max" goes the wrong way where the best that it was given is a loss of the record.
    A rate that was a hundredth of its largest for three quarters of a training is told at its end.

    Raises nothing of its own.
    """
    findings = list(_findings(history, loop)) if loop.training else []
    about = {} if loop.training else {"preconditions": (NO_STEP,)}
    known = counted(len(loop.schedulers), "scheduler")
    fine = f"No fault of the learning rate's course was seen; {known} known."
    return judged(LearningRateSchedule, loop.step, findings, fine, **about)


def _findings(history: History, loop: Loop) -> Iterator[LoopFinding]:
    yield from too_fast(loop)
    if not any(is_for_epochs(s, loop) for s in loop.schedulers):
        yield from _ended(history, loop)
    yield from _elsewhere(loop)
    yield from _beside(loop)
    wrong_way = list(plateaus(history, loop))
    yield from wrong_way or (*_gone_in_an_epoch(history, loop), *gone_early(history, loop))
    yield from _never(loop)
    yield from _first(loop)
    yield from _too_slow(history, loop)
    yield from _started_over(history, loop)


def _ended(history: History, loop: Loop) -> Iterator[LoopFinding]:
    rates = history.learning_rate
    seen = numpy.flatnonzero(numpy.isfinite(rates))
    if not len(seen) or not loop.training:
        return
    most = numpy.maximum.accumulate(rates[seen])
    small = (rates[seen] <= NOTHING * most) & (most > 0)
    tail = len(small) - 1 - (numpy.flatnonzero(~small)[-1] if (~small).any() else -1)
    exact = bool((rates[seen][-tail:] == 0).all()) if tail else False
    falls = tail >= (STILL if exact else STILL_FALLING)
    if falls and _highest(loop) <= NOTHING * most[-1]:
        since = int(history.steps[seen[-tail]])
        now, at_most = rates[seen[-1]], most[-1]
        yield LoopFinding(
            Level.ALARM,
            Cause.SCHEDULE_ENDED_EARLY,
            f"The learning rate has come down to {now:.2g} from {at_most:.2g} and has been there since step "
            f"{since:,}, while training goes on and the weights stand still.",
            "Make the schedule as long as the training: count its steps in the unit in which scheduler.step() is "
            "called, batches or epochs.",
            "A learning rate above zero.",
            step=since,
        )
    elif not most[-1] and len(seen) >= STILL and not loop.schedulers and _highest(loop) == 0:
        yield LoopFinding(
            Level.ALARM,
            Cause.LEARNING_RATE_ZERO,
            f"The learning rate has been zero for all {counted(len(seen), 'step')}.",
            "Give the optimizer a learning rate.",
            "A learning rate above zero.",
            step=1,
        )
    else:
        yield from _past_its_end(loop)


def _highest(loop: Loop) -> float:
    """The largest learning rate of any group that trains; rates that are not on the host are taken to be none."""
    rates = (group.get("lr") for o in loop.training for group in o.groups)
    return max((float(r) for r in rates if isinstance(r, (int, float))), default=0.0)


def _past_its_end(loop: Loop) -> Iterator[LoopFinding]:
    """A cosine that is stepped on after its half period climbs up again."""
    for s in loop.schedulers:
        if s.kind == "CosineAnnealingLR" and s.horizon and s.steps >= s.horizon + 2:
            yield LoopFinding(
                Level.WARNING,
                Cause.SCHEDULE_TOO_FAST,
                f"The schedule ({s.kind}) was made for {counted(s.horizon, 'step')} and has been stepped "
                f"{s.steps:,} times: the learning rate goes up again.",
                "Set T_max to the number of calls of scheduler.step() in the whole training.",
                "T_max that is not less than the number of its steps.",
                step=s.last_step,
            )


def _elsewhere(loop: Loop) -> Iterator[LoopFinding]:
    scheduled = {s.optimizer for s in loop.schedulers if s.steps}
    for s in loop.schedulers:
        idle = s.optimizer >= 0 and not loop.optimizers[s.optimizer].steps
        others = [o for i, o in enumerate(loop.optimizers) if i not in scheduled and o in loop.training]
        if idle and s.steps >= TWICE and any(o.steps >= THRICE for o in others):
            yield LoopFinding(
                Level.ALARM,
                Cause.SCHEDULER_OF_ANOTHER_OPTIMIZER,
                f"The scheduler ({s.kind}) changes an optimizer that never steps: {counted(s.steps, 'step')} of it "
                "have left the learning rate of the one that trains as it is.",
                "Make the scheduler from the optimizer that is stepped, after the last time that one is made.",
                "A step of the scheduler's own optimizer.",
                step=s.first_step,
            )


def _beside(loop: Loop) -> Iterator[LoopFinding]:
    for o in loop.training:
        if o.set_beside:
            yield LoopFinding(
                Level.ALARM,
                Cause.SETTING_WITHOUT_EFFECT,
                f"optimizer.{o.set_beside[0]} was set, and {o.kind} does not read it: its steps use what its "
                "param_groups hold.",
                f"Set it there: for group in optimizer.param_groups: group['{o.set_beside[0]}'] = ...",
                "An optimizer of one's own that reads this attribute.",
            )


def _gone_in_an_epoch(history: History, loop: Loop) -> Iterator[LoopFinding]:
    """A rate that is a hundredth of its largest since the first of three epochs, by whatever schedule."""
    steps = steps_an_epoch(loop)
    if loop.batches.epochs <= EPOCHS or loop.resumed or not steps:
        return
    rates, later = history.learning_rate, history.steps > steps
    before, after = rates[~later & numpy.isfinite(rates)], rates[later & numpy.isfinite(rates)]
    if len(before) and len(after) and 0 < after.max() <= HUNDREDTH * before.max():
        yield LoopFinding(
            Level.WARNING,
            Cause.SCHEDULE_ENDED_EARLY,
            f"The learning rate came down from {before.max():.2g} to {after.max():.2g} within the first epoch "
            f"({steps:,.0f} steps), and training goes on with a hundredth of it or less.",
            "Count the schedule in the unit in which scheduler.step() is called: batches or epochs.",
            "A schedule that is meant to end in the first epoch.",
            step=int(steps) + 1,
        )


def _never(loop: Loop) -> Iterator[LoopFinding]:
    epochs = loop.batches.epochs
    scheduled = {s.optimizer for s in loop.schedulers if s.steps}
    for s in loop.schedulers:
        if s.optimizer < 0 or loop.optimizers[s.optimizer] not in loop.training or s.optimizer in scheduled:
            continue
        if (epochs > EPOCHS and _are_whole(loop)) or (loop.ended and epochs != 1 and loop.step >= MANY):
            yield LoopFinding(
                Level.WARNING,
                Cause.SCHEDULER_NEVER_STEPPED,
                f"The optimizer has a scheduler ({s.kind}), which has not been stepped in {loop.step:,} steps.",
                "Call scheduler.step(), after each epoch or each step as its settings mean.",
                "A step of the scheduler.",
                step=1,
            )


def _are_whole(loop: Loop) -> bool:
    """Whether epochs that began were gone through, and are more than a batch each."""
    each = steps_an_epoch(loop)
    return loop.step >= EPOCHS * each and (each >= TWICE or loop.step >= MANY)


def _first(loop: Loop) -> Iterator[LoopFinding]:
    for s in loop.schedulers:
        started = s.optimizer >= 0 and loop.optimizers[s.optimizer].steps >= TWICE
        if s.before_optimizer and started and s.steps >= TWICE and s.first_step <= 1 and not loop.resumed:
            yield LoopFinding(
                Level.WARNING,
                Cause.SCHEDULER_BEFORE_OPTIMIZER,
                f"scheduler.step() ({s.kind}) is called before optimizer.step(), so the first learning rate of the "
                "schedule is skipped.",
                "Call optimizer.step() first, then scheduler.step().",
                "A step of the optimizer before the first of the scheduler.",
                step=1,
            )


def _too_slow(history: History, loop: Loop) -> Iterator[LoopFinding]:
    """At the end of a training in which the scheduler stepped once for many steps of the optimizer."""
    if not loop.ended or loop.resumed:
        return
    rates = history.learning_rate[numpy.isfinite(history.learning_rate)]
    for s in loop.schedulers:
        steps = loop.optimizers[s.optimizer].steps if s.optimizer >= 0 else 0
        if not 1 <= s.steps * RARELY <= steps:
            continue
        rising = len(rates) > 1 and bool((numpy.diff(rates) >= 0).all()) and rates[-1] > rates[0]
        if rising and rates[-1] <= HALF * s.peak:
            how = (
                f"the learning rate was still rising when training ended, at {rates[-1]:.2g} of the "
                f"{s.peak:.2g} that it leads up to"
            )
        elif abs(s.horizon - steps) <= NEAR * steps:
            how = f"it was made for {counted(s.horizon, 'step')}, about as many as the optimizer took"
        else:
            continue
        yield LoopFinding(
            Level.WARNING,
            Cause.SCHEDULE_TOO_SLOW,
            f"The scheduler ({s.kind}) stepped {s.steps:,} times in {counted(steps, 'step')} of the optimizer, and "
            f"{how}.",
            "Call scheduler.step() after each step of the optimizer; or give the schedule lengths that fit the "
            f"{s.steps:,} times that it steps.",
            "Settings of the schedule that are meant in epochs, for a longer training than this.",
        )


def _started_over(history: History, loop: Loop) -> Iterator[LoopFinding]:
    """The first rate of what goes on is that of the very first step, and the schedule had moved on from it."""
    after = history.learning_rate[(history.steps > loop.resumed) & numpy.isfinite(history.learning_rate)]
    if not loop.resumed or len(loop.rates_before) != TWICE or not len(after):
        return
    first, last = loop.rates_before
    moved = abs(last - first) > NEAR * max(abs(first), abs(last))
    if moved and abs(after[0] - first) <= SAME_RATE_WITHIN * abs(first):
        yield LoopFinding(
            Level.WARNING,
            Cause.SCHEDULE_JUMPED,
            f"The schedule started over where training was resumed: the learning rate went from {last:.2g} at step "
            f"{loop.resumed:,} back to {first:.2g}, that of the first step.",
            "Save and load scheduler.state_dict() with the model's and the optimizer's.",
            "A schedule that is meant to begin again there.",
            step=loop.resumed + 1,
        )
