"""Learning rates that came down early: by a scheduler that takes a falling loss for a plateau, or by whatever
schedule.

Part of the check of the schedule.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy

from diag.instruments.causes import Cause
from diag.instruments.loop.findings import TWICE, LoopFinding
from diag.result import Level
from diag.snapshot.history import History
from diag.snapshot.loop.facts import Loop

SAME_NUMBER = 1e-6  # relative: a loss in float32 and the same number as a float
AT_ITS_PEAK = 0.99  # of the peak: a cut has been made
LITTLE, OF_ALL_STEPS, ENOUGH_RATES = 1e-2, 0.75, 100


def plateaus(history: History, loop: Loop) -> Iterator[LoopFinding]:
    """A scheduler that waits for a plateau, takes larger for better, and is given the training loss."""
    losses = history.loss[numpy.isfinite(history.loss)]
    rates = history.learning_rate[numpy.isfinite(history.learning_rate)]
    for s in loop.schedulers:
        if s.plateau != "max" or s.steps < TWICE or not math.isfinite(s.best) or s.best == 0 or not len(losses):
            continue
        if not (numpy.abs(losses - s.best) <= SAME_NUMBER * abs(s.best)).any():
            continue
        cut = len(rates) > 1 and rates[-1] < AT_ITS_PEAK * rates.max()
        how = f", and has come down from {rates.max():.2g} to {rates[-1]:.2g}" if cut else ""
        yield LoopFinding(
            Level.ALARM,
            Cause.SCHEDULE_TOO_FAST,
            f'{s.kind} is made with mode="max" and given the training loss (its best so far, {s.best:.4g}, is a '
            f"loss of this run): it takes a falling loss for no improvement, so the learning rate is cut again and "
            f"again{how}.",
            'Make it with mode="min", or give it a number that is to rise, such as the accuracy.',
            "A learning rate that stays while the loss falls.",
            step=s.first_step,
        )


def gone_early(history: History, loop: Loop) -> Iterator[LoopFinding]:
    """A rate that was a hundredth of its largest, or less, for three quarters of a training that has ended."""
    seen = numpy.flatnonzero(numpy.isfinite(history.learning_rate))
    if not loop.ended or loop.resumed or len(seen) < ENOUGH_RATES:
        return
    rates, steps = history.learning_rate[seen], history.steps[seen]
    if not rates[-1] > 0:  # a rate of zero has a check of its own
        return
    last_large = int(numpy.flatnonzero(rates > LITTLE * rates.max())[-1])
    rest = len(seen) - 1 - last_large
    if rest >= OF_ALL_STEPS * len(seen):
        kinds = sorted({s.kind for s in loop.schedulers if s.steps})
        yield LoopFinding(
            Level.WARNING,
            Cause.SCHEDULE_ENDED_EARLY,
            f"The learning rate{f' ({kinds[0]})' if len(kinds) == 1 else ''} came down from {rates.max():.2g} to a "
            f"hundredth of that by step {int(steps[last_large]) + 1:,}, and stayed there or below for the other "
            f"{rest:,} of {len(seen):,} steps: it ended at {rates[-1]:.2g}.",
            "Let the schedule last as long as the training: count its steps in the unit in which scheduler.step() "
            "is called, and let a plateau last longer before it counts.",
            "A longer schedule that ends no better.",
            step=int(steps[last_large]) + 1,
        )
