"""The learning-rate schedulers that stepped, or that an optimizer carries without ever being stepped by them."""

from __future__ import annotations

import math
import weakref
from typing import Any

from torch.optim.lr_scheduler import ExponentialLR, LRScheduler, MultiStepLR, ReduceLROnPlateau, StepLR

from diag.snapshot.loop.steps import SchedulerFacts
from diag.watching.hooks.model_hook import instances_of
from diag.watching.observe.loop.moment import Counter, Moment
from diag.watching.observe.loop.optimizers import OptimizerRecord, Optimizers

MOST = 64
RATE_THAT_IS_GONE = 1e-6  # of the largest learning rate so far
STEPS_AT_SUCH_A_RATE = (3, 10)  # steps at such a rate that are news
# Attributes that say after how many of its steps a scheduler has run its course.
HORIZONS = ("total_steps", "T_max", "total_iters")


class Schedule:
    """One scheduler and its steps."""

    def __init__(self, scheduler: Any, record: OptimizerRecord | None) -> None:
        self.record = record  # kept, as the scheduler may be gone when the facts are asked for
        self.before = last_epoch_of(scheduler)
        self.plateau, self.best = "", math.nan
        self.reference = weakref.ref(scheduler)
        self.kind = type(scheduler).__name__
        self.horizon, self.peak = horizon_of(scheduler), peak_of(scheduler)
        self.last_milestone, self.final = milestones_of(scheduler)
        self.steps = self.first_step = self.last_step = 0
        self.before_optimizer = False
        self.repeated, self.per_micro_batch = Counter(), Counter()
        self._at = self._passes = 0
        self._optimizer_steps = -1
        self._several = 0

    def stepped(self, step: int, record: OptimizerRecord | None, backwards: int) -> bool:
        """It stepped after `backwards` backward passes in all; whether it came again without a step of its
        optimizer."""
        steps = 0 if record is None else record.steps
        again = steps == self._optimizer_steps and steps > 0
        self.before_optimizer |= self.steps == 0 and steps == 0
        if not again:
            if self._several == 0:
                self.repeated.miss()
                self.per_micro_batch.miss()
            self._several = 0
        elif self._several == 0:
            self._several = 1
            (self.per_micro_batch if backwards > self._passes else self.repeated).hit(step)
        self.steps += 1
        self.first_step, self.last_step = self.first_step or step, step
        self._optimizer_steps, self._passes = steps, backwards
        return again


class Schedulers:
    """All schedulers that were seen."""

    def __init__(self, moment: Moment, optimizers: Optimizers) -> None:
        self._moment, self._optimizers = moment, optimizers
        self.schedules: list[Schedule] = []
        self._by_id: dict[int, Schedule] = {}
        self._inside = 0
        self._searched: set[int] = set()
        self._most, self._low = 0.0, 0

    def stepped(self, scheduler: Any, backwards: int) -> bool:
        """A scheduler's `step` has returned; False where the call was another scheduler's own, or its first."""
        optimizer = getattr(scheduler, "optimizer", None)
        if getattr(scheduler, "_is_initial", False) or optimizer is None:
            return False
        record = self._optimizers.record(optimizer)
        schedule = self._schedule(scheduler)
        if schedule is None or record is None:
            return False
        again = schedule.stepped(max(self._moment.step - 1, 0), record, backwards)
        if isinstance(scheduler, ReduceLROnPlateau):
            schedule.plateau, schedule.best = str(scheduler.mode), best_given(scheduler)
        if schedule.steps <= 3 or (again and schedule.repeated.running <= 3):
            self._moment.news(
                ("scheduler", id(schedule), min(schedule.steps, 3), schedule.repeated.running), "schedulers"
            )
        if schedule.horizon and schedule.steps == schedule.horizon + 2:
            self._moment.news(("scheduler ended", id(schedule)), "schedulers")
        return True

    def rate(self, rate: float) -> None:
        """A step was taken at this learning rate: has it come down to nothing for a number of steps?"""
        if rate > RATE_THAT_IS_GONE * self._most:
            self._most, self._low = max(rate, self._most), 0
        else:
            self._low += 1
            if self._low in STEPS_AT_SUCH_A_RATE:
                self._moment.news(("learning rate is gone", self._low), "schedulers")

    def _schedule(self, scheduler: Any) -> Schedule | None:
        known = self._by_id.get(id(scheduler))
        if known is not None and known.reference() is scheduler:
            return known
        if len(self.schedules) >= MOST:
            return None
        record = self._optimizers.record(getattr(scheduler, "optimizer", None))
        known = self._by_id[id(scheduler)] = Schedule(scheduler, record)
        self.schedules.append(known)
        return known

    def search(self, record: OptimizerRecord) -> None:
        """Look once for schedulers of an optimizer that carries the trace of one and was never scheduled."""
        optimizer = record.reference()
        if optimizer is None or id(record) in self._searched:
            return
        self._searched.add(id(record))
        if not hasattr(optimizer.step, "_wrapped_by_lr_sched"):
            return
        found = instances_of(LRScheduler)
        # SequentialLR and its like hold others, which they step in their own way.
        held = {id(part) for o in found for part in getattr(o, "_schedulers", ())}
        for scheduler in found:
            if getattr(scheduler, "optimizer", None) is optimizer and id(scheduler) not in held:
                self._schedule(scheduler)

    def facts(self) -> tuple[SchedulerFacts, ...]:
        """Each as plain data."""
        return tuple(f for s in self.schedules if (f := self._facts(s)) is not None)

    def _facts(self, s: Schedule) -> SchedulerFacts | None:
        scheduler = s.reference()
        record = s.record if scheduler is None else self._optimizers.record(getattr(scheduler, "optimizer", None))
        index = (
            -1
            if record is None or record not in self._optimizers.records
            else self._optimizers.records.index(record)
        )
        return SchedulerFacts(
            kind=s.kind,
            optimizer=index,
            steps=max(s.steps, s.before, last_epoch_of(scheduler)),
            first_step=s.first_step,
            last_step=s.last_step,
            horizon=s.horizon,
            before_optimizer=s.before_optimizer,
            repeated=s.repeated.tally(),
            per_micro_batch=s.per_micro_batch.tally(),
            peak=s.peak,
            decay=decay_of(scheduler),
            last_milestone=s.last_milestone,
            final=s.final,
            plateau=s.plateau,
            best=s.best,
        )


def last_epoch_of(scheduler: Any) -> int:
    """How often the scheduler says that it has stepped."""
    last = getattr(scheduler, "last_epoch", 0)
    return last if isinstance(last, int) else 0


def best_given(scheduler: ReduceLROnPlateau) -> float:
    """The best value that it was given, where that is known without waiting."""
    best = scheduler.best
    return float(best) if isinstance(best, (int, float)) else math.nan


def peak_of(scheduler: Any) -> float:
    """The learning rate that the scheduler leads up to in the first parameter group: max_lr where the group has one
    (OneCycleLR, CyclicLR), else the one that the optimizer was made with; NaN where that is not on the host."""
    groups = getattr(getattr(scheduler, "optimizer", None), "param_groups", None) or [{}]
    rates = [r for r in (groups[0].get("max_lr"), groups[0].get("initial_lr")) if isinstance(r, (int, float))]
    return max(map(float, rates), default=math.nan)


def decay_of(scheduler: Any) -> float:
    """What the scheduler multiplies the learning rate with at each of its steps, on average over many: of one that
    multiplies by `gamma` again and again; else 1."""
    if not isinstance(scheduler, (ExponentialLR, StepLR)) or not isinstance(scheduler.gamma, float):
        return 1.0
    each = scheduler.step_size if isinstance(scheduler, StepLR) else 1
    return scheduler.gamma ** (1 / each) if scheduler.gamma > 0 and each > 0 else 1.0


def milestones_of(scheduler: Any) -> tuple[int, float]:
    """The last milestone of a schedule that has some, and what the learning rate is from then on, as a share of the
    first; 0 and 1 of another."""
    if not isinstance(scheduler, MultiStepLR) or not scheduler.milestones or scheduler.gamma <= 0:
        return 0, 1.0
    return int(max(scheduler.milestones)), float(scheduler.gamma ** sum(scheduler.milestones.values()))


def horizon_of(scheduler: Any) -> int:
    """After how many of its steps the scheduler has run its course, by its own settings; 0 where it has no end."""
    for name in HORIZONS:
        value = vars(scheduler).get(name)
        if isinstance(value, int) and value > 0:
            return value
    parts = vars(scheduler).get("_schedulers")
    milestones = vars(scheduler).get("_milestones")
    if parts and milestones and (last := horizon_of(parts[-1])):
        return int(milestones[-1]) + last
    return 0
