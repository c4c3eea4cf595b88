"""Runs the measurements of a watched training, each when it can be made: after an optimizer step, on a step's own
backward pass, over a window of steps, when the user asks, and at the end.

`MeasurementSchedule` says what is due and paid for; here it is decided what the step at hand can be used for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from diag.distributed.meeting import group_timeout, initialized
from diag.snapshot.snapshot import Snapshot
from diag.watching import record
from diag.watching.guard import Clock, Guarded, guarded
from diag.watching.measure import floor
from diag.watching.measure.measuring import Measurements
from diag.watching.measure.over_ranks import OverRanks
from diag.watching.measure.step_time import StepTime
from diag.watching.measure.training import Training
from diag.watching.observe.rows import Row
from diag.watching.ranks.agreement import Agreed
from diag.watching.record import Recorder

WARM_UP, NEXT_ESTIMATE_AT = 3, 4  # costs are estimated after so many steps, and again after so many times as many
SPARE = 0.15  # seconds that the last measurements may take beyond the budget; judging and writing come on top
CLOCK_EVERY, CLOCK_SHARE = 0.01, 0.005  # seconds between two looks at what is due, or a share of all so far
LEAST_LOOK = 1.0  # seconds that the checks may take in any case: a garbage collection may come in between
LOOK_SHARE = 2.0  # of the time that training takes for as many examples: a forward pass is a third of it
PROBE_STEPS = 16  # the probe set is what these first steps have shown, where that is less than its limit
HELD_OUT_SEEN = (
    "The first {:,} rows that the loop evaluates on serve as held-out data; held_out= would give others."
)
SHARDED_PARAMETERS = (
    "The parameters are sharded over processes, so that one process alone cannot run the model; they are measured "
    "where all ranks are watched, at the steps that all of them know, and neither at once nor at the end."
)
OVER_STEPS = "{} records consecutive steps, which is not done on sharded parameters: it is not measured."
MOST_OF_TIMEOUT = 0.5  # of the training's own group, which gives up where rank 0 keeps the others waiting longer


class MeasurementRunner(Guarded):
    """Measures a training when the schedule and the state of the step allow."""

    def __init__(
        self,
        clock: Clock,
        failed: Callable[[str, Exception], None],
        training: Training,
        measurements: Measurements,
        recorder: Recorder,
        every: int | None = None,
    ) -> None:
        super().__init__(clock, failed)
        self._training, self._measurements, self._recorder = training, measurements, recorder
        tell = (recorder.note, recorder.info)
        self.over_ranks = OverRanks(training, measurements, every, *tell, recorder.last_step)
        self._most = MOST_OF_TIMEOUT * group_timeout() if initialized() else math.inf
        self._losses, self._steps, self._probe = training.losses, training.steps, training.probe
        self._windows, self._schedule = measurements.windows, measurements.schedule
        self.own_step = measurements.own_step
        self._time = StepTime(clock)
        self._step = recorder.last_step
        self._estimate_at, self._look_again = WARM_UP, 0.0
        self._wake: tuple[float, float] = 0, 0.0  # see `_rest`
        self._last_look: Snapshot | None = None  # the one at the end, with what it has computed

    # After a step

    def step_ended(self, row: Row, step: int, in_step: bool) -> None:
        """A step has been recorded; in_step: nothing of the training loop is half done."""
        self._step = step
        if step < self._wake[0] and self.clock.elapsed() < self._wake[1]:
            self._time.pause()
            return
        longer = self._time.step_ended(read=self.own_step.touched)
        self.own_step.touched = self.own_step.armed
        self._measurements.keep_step(step, longer)
        self._recorder.cost(step, self.clock)
        if self._steps.steps >= PROBE_STEPS:
            self._probe.complete = True
        self._windows.examples.stepped(self._losses.descended, row.skipped)
        if self._windows.open is not None:
            self._record_losses(row, step, in_step)
        if self.over_ranks.due(step):
            self._with_all_ranks(step, self._is_ready(in_step))
        elif self._wants_a_look(step) and self._is_ready(in_step):
            self._alone(step)
        self._rest()

    def _rest(self) -> None:
        """Until which step, and how many seconds after the start, nothing need be looked at."""
        going_on = self.own_step.touched or self.own_step.armed or self._windows.open is not None
        # Of two steps in a row the second is timed, so that it stays known what one takes.
        going_on |= not self._time.timed
        always = self._schedule.budget == math.inf or self.over_ranks.agreement is not None
        if going_on or always or not self._probe.complete:
            self._wake = 0, 0.0
            return
        measures = self._schedule.budget > 0 and bool(self._schedule.accounts)
        due = self._look_again if measures else math.inf
        self._wake = self._measurements.floor.due, min(due, self.clock.elapsed() + record.COST_EVERY)

    def _is_ready(self, in_step: bool) -> bool:
        # An instrument that lacked the loss would not be asked again; with a compiled model it takes some steps.
        settled = self._losses.settled or self._steps.steps >= PROBE_STEPS
        return in_step and bool(self._probe.batches) and settled

    def _wants_a_look(self, step: int) -> bool:
        """Whether anything may be due."""
        return self._measurements.floor.is_due(step) or (
            self._probe.complete and self._schedule.budget > 0 and self._is_time()
        )

    def _is_time(self) -> bool:
        """Whether there is anything to measure, and enough could be earned since the last look at what is due."""
        if not self._schedule.accounts:
            return False
        return self.clock.elapsed() >= self._look_again or self._schedule.budget == math.inf

    def _alone(self, step: int) -> None:
        # Whether the model is sharded takes a walk through it, so without other ranks only what is due asks for it.
        if not self.over_ranks.holds or not self._training.sharded:
            self._with_this_rank(step)

    def _with_this_rank(self, step: int) -> None:
        if self._measurements.floor.is_due(step):
            self._look(step, self._time_to_look())
        if self._probe.complete and self._schedule.budget > 0:
            self._measure_if_due(step)

    # With all ranks

    @guarded("measurements")
    def _with_all_ranks(self, step: int, ready: bool) -> None:
        """Rank 0 says what is due, and all ranks enter it, or none."""
        common, sharded = self.over_ranks, self._training.sharded
        due = self._due(step) if ready and self._probe.complete and self._schedule.budget > 0 else []
        limits = {n: min(self._schedule.limit(n), self._most) for n in due if common.able(n)}
        look = ready and self._measurements.floor.is_due(step)
        gather = (sharded and (look or bool(due))) or (bool(limits) and common.apart)
        agreed = common.settle(ready, Agreed(gather, limits))
        own = [n for n in due if n not in limits]
        if agreed is not None:
            with common.whole(agreed.gather) as done:
                self.clock.measuring += common.lead(agreed, step) if done else 0.0
                if done and sharded:
                    self._on_the_copy(step, look, own)
        if ready and not sharded:
            self._with_this_rank(step)

    def _on_the_copy(self, step: int, look: bool, names: list[str]) -> None:
        """What rank 0 measures on its whole copy, with its own probe set."""
        if look:
            self._look(step, self._time_to_look())
        for name in names:
            if self._windows.needs_record(name):
                self._recorder.note(f"window of {name}", OVER_STEPS.format(name))
                self._schedule.postpone(name, math.inf)
        self._measure([n for n in names if not self._windows.needs_record(n)], step)

    def follow(self, step: int, in_step: bool) -> None:
        """Another rank than 0 has ended a step: where rank 0 wants all of them, it goes along."""
        if self._steps.steps >= PROBE_STEPS:
            self._probe.complete = True
        if self.over_ranks.due(step):
            self._follow(self._is_ready(in_step))

    @guarded("measurements")
    def _follow(self, ready: bool) -> None:
        began = time.perf_counter()
        agreed = self.over_ranks.settle(ready)
        if agreed is not None:
            self.over_ranks.follow(agreed)
        self.clock.measuring += time.perf_counter() - began

    # Of this rank

    def _measure_if_due(self, step: int) -> None:
        if not self._is_time():
            return
        now = self.clock.elapsed()
        self._look_again = now + max(CLOCK_EVERY, CLOCK_SHARE * now)
        names = [name for name in self._due(step) if not self.over_ranks.able(name)]
        names, window = self._windows.choose(names)
        names, later = self.own_step.choose(names)
        if later and self._time.known:  # what a step takes must be known, to tell what reading one adds
            self._arm(later)
        if names:
            self._measure(names, step)
        if window is not None:
            self._begin_window(window, step)
        self._steps.keep_before = self._measurements.wants_previous(step + 1)

    def _due(self, step: int) -> list[str]:
        """What is due and paid for."""
        self._estimate()
        self._schedule.earn(self.clock.elapsed())
        return self._measurements.affordable(step, with_previous=bool(self._steps.before))

    @guarded("measurements")
    def _measure(self, names: list[str], step: int, at_most: float | None = math.inf) -> None:
        if self._training.sharded:
            self._recorder.note("measurements", SHARDED_PARAMETERS)
            return
        most = at_most if at_most is None else min(at_most, self._most)
        self.clock.measuring += self._measurements.run(names, step, self._training.snapshot(), most)

    # At the floor

    @guarded("checks")
    def _look(self, step: int, at_most: float, last: bool = False) -> None:
        if self._training.sharded:
            self._recorder.note("measurements", SHARDED_PARAMETERS)
            return
        self._tell_of_held_out()
        waiting = self._training.held_out_may_come and not last
        snapshot = self._training.snapshot(floor.FLOOR_EXAMPLES)
        seconds = self._measurements.look(step, snapshot, at_most, waiting)
        self._last_look = snapshot if last else None
        self.clock.measuring += seconds
        self.clock.checking += seconds

    def _tell_of_held_out(self) -> None:
        if seen := self._training.held_out_seen:
            self._recorder.info("held out", HELD_OUT_SEEN.format(seen))

    def _time_to_look(self) -> float:
        """Seconds that the checks may take: one pass over some of the probe set takes about these steps."""
        steps = max(self._steps.steps, 1)
        each = max(self.clock.elapsed() - self.clock.ours(), 0.0) / steps
        examples = self._training.examples / steps
        batches = min(self._probe.size, floor.FLOOR_EXAMPLES) / max(examples, 1.0)
        return max(LOOK_SHARE * each * max(batches, 1.0), LEAST_LOOK)

    # What it is expected to take

    def _estimate(self) -> None:
        if self._steps.steps < self._estimate_at:
            return
        self._estimate_at = NEXT_ESTIMATE_AT * self._steps.steps
        # The measurements are made in float32, which is several times slower on a GPU made for half precision.
        slower = 4.0 if torch.is_autocast_enabled("cuda") else 1.0
        self.announce_probe()
        examples = self._training.examples / self._steps.steps
        self._measurements.estimate(self._time.shortest(self._steps.steps), examples, self._probe.size, slower)

    def _estimate_again(self) -> None:
        """Where steps turned out not to be read, what is measured on the probe set takes another time."""
        if self.own_step.refused:
            self._estimate_at = 0
            self._estimate()

    def announce_probe(self) -> None:
        """Record, once, which examples the measurements are made on."""
        if text := self._training.describe_probe():
            self._recorder.event(self._step, "probe", text)

    # On a step's own backward pass

    @guarded("measurements")
    def _arm(self, names: list[str]) -> None:
        if not self._training.sharded:
            self.own_step.limit = sum(self._schedule.limit(name) for name in names)
            snapshot = self._training.snapshot()
            snapshot.deadline.restart(self.own_step.limit)
            seconds = self.own_step.arm(names, snapshot)
            self._losses.closely = self.own_step.armed
            self.clock.measuring += seconds
            self._schedule.pay(seconds)
            self._estimate_again()

    @guarded("measurements")
    def own_step_descends(self) -> None:
        """The backward pass of a step that is to be read begins."""
        seconds = self.own_step.backward_begins(self._losses.descending)
        self.clock.measuring += seconds
        self._schedule.pay(seconds)

    @guarded("measurements")
    def own_step_descended(self) -> None:
        """The backward pass of a step that was to be read has ended."""
        names = self.own_step.names
        read = self.own_step.backward_ends(self._losses.seen, self._losses.loss_fn)
        self._losses.closely, self._losses.seen = False, None
        self.own_step.names = []
        if read is not None:
            self.clock.measuring += self._measurements.measure_step(read, names)
        else:
            self._estimate_again()

    # Over a window of steps

    @guarded("measurements")
    def _begin_window(self, name: str, step: int) -> None:
        if not self._training.sharded:
            snapshot = self._training.snapshot()
            snapshot.deadline.restart(self._schedule.limit(name))
            self.clock.measuring += self._windows.begin(name, step, snapshot)

    @guarded("measurements")
    def _record_losses(self, row: Row, step: int, in_step: bool) -> None:
        if not in_step:
            self._windows.drop(step, "the loop went on before the step was seen to be over")
            return
        if bool(row.skipped):
            return  # a GradScaler left the update out: nothing moved
        snapshot = self._training.snapshot()
        if self._windows.open is not None:
            snapshot.deadline.restart(self._schedule.limit(self._windows.open.name))
        self.clock.measuring += self._windows.add(step, snapshot)
        if self._windows.complete and self._windows.open is not None:
            self.clock.measuring += self._measurements.run([self._windows.open.name], step, snapshot)

    # When the user asks, and at the end

    def now(self, names: list[str]) -> None:
        """Measure with these, whatever the budget."""
        if self._ready_without_a_step():
            self._measure(names, self._step, None)

    def last(self) -> None:
        """No step follows: measure what the budget allows and has no result of the last step."""
        if not self._ready_without_a_step():
            return
        self._schedule.earn(self.clock.elapsed())
        # The budget of a short run is small, and a run without any number is of no use.
        end = time.perf_counter() + max(self._schedule.left, 0.0) + SPARE
        if self._measurements.floor.is_new(self._step):
            self._look(self._step, end - time.perf_counter(), last=True)
        if self._schedule.budget == 0:
            return
        self._windows.end()
        for name in self._measurements.unfinished(self._step):
            account = self._schedule.accounts[name]
            if name in self.over_ranks.measured:
                continue  # another probe set than that of all ranks would be another measure of it
            if account.times and self.own_step.has_course(name):
                continue  # the steps tell its course; the probe set would be another measure of it
            if self._windows.is_enough(name):
                continue
            left = end - time.perf_counter()
            if account.estimate <= (self._schedule.left if account.times else left):
                self._measure([name], self._step, left)

    def explain_unrun(self) -> None:
        """Record, of each instrument that the budget never allowed, that it was too small."""
        first_is_due = self._schedule.budget > 0 and self._recorder.last_step == 0
        if first_is_due and not self._training.sharded and self._probe.batches and self._steps.steps:
            snapshot = self._last_look or self._training.snapshot(floor.FLOOR_EXAMPLES)
            snapshot.deadline.restart(SPARE)
            self._measurements.explain_unrun(self._step, snapshot)

    def _ready_without_a_step(self) -> bool:
        if not self._probe.batches or self._steps.steps == 0:
            return False
        self._probe.complete = True
        self._estimate_at, self.own_step.over = 0, True
        self._estimate()
        self.own_step.over = False
        self.announce_probe()
        return True
