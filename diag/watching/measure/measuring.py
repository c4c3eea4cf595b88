"""The measurements of a watched run: which instruments, what they are expected to take, and running them.

All of them see the same probe set through one `Snapshot`, right after an optimizer step. What an instrument
lacks or what breaks in it is recorded; a broken one is tried again ever more rarely.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from math import inf
from typing import Any

import torch

from diag.curvature.memory import available_memory
from diag.display import format_seconds
from diag.errors import DiagError, InvalidInput, MissingQuantity, did_you_mean, type_of
from diag.registry import Instrument, Kind, attempt, find, instruments
from diag.result import Failed, Outcome, Result, Skipped
from diag.snapshot import pause
from diag.snapshot.glossary import HELD_OUT, Effort
from diag.snapshot.inside.together import share_the_pass
from diag.snapshot.snapshot import Snapshot
from diag.snapshot.state.tensors import hearing
from diag.watching.measure.floor import Floor
from diag.watching.measure.own_step import OwnStep, Read
from diag.watching.measure.schedule import Account, MeasurementSchedule
from diag.watching.measure.window import Windows
from diag.watching.observe.capture import UnknownLoss

FIXED = 2e-3
# Training steps that it is taken to cost to measure on a step's own gradients; measured on the CPU, with labels of
# ten classes: 14 (a small convolutional net) to 155 (an MLP of 670,000 parameters), for the products of the groups'
# sums.
STEPS_READ = 100.0
FORWARD_SHARE = 1 / 3
FAILURES = 3
TOO_LONG = "twice its estimate of {}"
NO_MORE = "what the budget leaves for it (its estimate: {})"
NEVER_RUN = (
    "The run was too short to earn the time that measuring takes (estimate: {}; budget: {:.0%}); give a larger "
    "budget=, call watcher.measure(), or measure a checkpoint."
)
NO_WINDOW = "The run ended before enough consecutive steps were recorded to judge; train on, or give {}."

OF_THE_LOSS = ("losses", "gradient", "per_example_gradients", "hessian", "gauss_newton", "loss_at", "update")

Chosen = Mapping[str, Mapping[str, Any]]


def chosen_instruments(
    chosen: str | Instrument | Iterable[str | Instrument] | Mapping[str, Mapping[str, Any]] | None,
) -> dict[str, dict[str, Any]]:
    """Instrument names with their settings, as the user gave them; by default all that can judge, and with "all"
    the descriptions too.

    Raises InvalidInput for an unknown instrument or setting.
    """
    if isinstance(chosen, Instrument) or (isinstance(chosen, str) and chosen != "all"):
        chosen = [chosen]
    if chosen is not None and not isinstance(chosen, Iterable):
        raise InvalidInput(f"instruments is {type_of(chosen)}; expected names, or a dict of settings by name.")
    by_name: Mapping[Any, Mapping[str, Any]]
    here = {n: i for n, i in instruments().items() if i.of_a_snapshot}
    by_default = [n for n, i in here.items() if chosen == "all" or i.kind is not Kind.DESCRIPTION]
    names = by_default if chosen is None or isinstance(chosen, str) else chosen
    by_name = chosen if isinstance(chosen, Mapping) else {name: {} for name in names}
    return {
        which.name: which.converted_settings(settings)
        for name, settings in by_name.items()
        for which in [find(name)]
    }


class Measurements:
    """Runs the chosen instruments: the checks at the floor, the measurements when the schedule allows.

    record(step, outcome, seconds): keep what came out. note(key, sentence): tell once what went wrong.
    info(key, sentence): tell once how it is done. tell(instrument, result, step): what a result says.
    """

    def __init__(
        self,
        chosen: Chosen,
        schedule_of: Callable[[Iterable[str]], MeasurementSchedule],
        record: Callable[[int, Outcome, float], None],
        note: Callable[[str, str], None],
        info: Callable[[str, str], None],
        tell: Callable[[Instrument, Result, int], None] | None = None,
        last_step: int = 0,
    ) -> None:
        self._settings = chosen
        found = {n: find(n) for n in chosen}
        # What needs nothing but the record and the facts of the loop is judged live (see `live`).
        self.live = {n: i for n, i in found.items() if i.from_record}
        self.chosen = {n: i for n, i in found.items() if n not in self.live}
        self.floor = Floor((n for n, i in self.chosen.items() if i.kind is Kind.CHECK), last_step)
        measurements = {n: i for n, i in self.chosen.items() if i.kind is not Kind.CHECK}
        self.schedule = schedule_of(measurements)
        self.windows = Windows(measurements, chosen, self.schedule, note, info, self._undisturbed)
        self.own_step = OwnStep(measurements, self._measured_on)
        self._previous = [n for n, i in measurements.items() if _asks_for_previous(i)]
        self._found: list[tuple[str, Outcome, float]] = []  # on the step that is going on
        self._record, self._note, self._tell = record, note, tell
        self._last: dict[str, int] = {}
        self._succeeded: set[str] = set()  # those that have given a result
        self._failures: dict[str, int] = {}
        self.last_outcome: Outcome | None = None  # of the last measurement
        self.estimated = False

    def asks_for(self, quantity: str) -> bool:
        """Whether any of the instruments takes this quantity."""
        every = (*self.live.values(), *self.chosen.values())
        return any(need.name == quantity for instrument in every for need in instrument.needs)

    def affordable(self, step: int, with_previous: bool = True) -> list[str]:
        """The names of those that are due and paid for at `step`; without those that ask for the state before
        the step where there is none."""
        names = self.schedule.affordable(step)
        return names if with_previous else [n for n in names if n not in self._previous]

    def wants_previous(self, step: int) -> bool:
        """Whether one that asks for the state before the step is due at `step`, and there may be time for it."""
        accounts = (self.schedule.accounts[n] for n in self._previous)
        return any(a.due <= step and a.estimate <= self.schedule.left for a in accounts)

    def estimate(self, seconds_per_step: float, examples_per_step: float, probe_size: int, slower: float) -> None:
        """Estimate first costs from what training takes; `slower` is how much slower float32 is than training.

        It may be called again, when more steps have been timed: what has been measured keeps its own time.
        """
        if not seconds_per_step or not examples_per_step:
            return
        again = self.estimated
        self.estimated = True
        forward = slower * FORWARD_SHARE * seconds_per_step * probe_size / examples_per_step
        for name, account in self.schedule.accounts.items():
            if account.times or account.stops:
                continue
            instrument = self.chosen[name]
            passes = instrument.expected_passes(self._settings[name])
            if passes is None:
                passes = sum(cost.passes for cost in instrument.costs)
            on_a_step = STEPS_READ * seconds_per_step
            self.schedule.estimate(name, FIXED + (on_a_step if self.own_step.reads(name) else passes * forward))
        self.windows.forward = self.windows.forward if again else FIXED + forward

    def run(self, names: Iterable[str], step: int, snapshot: Snapshot, at_most: float | None = inf) -> float:
        """Measure with these instruments, recording each outcome; gives the time taken in seconds.

        Each is stopped at twice its estimate, and all of them after `at_most` seconds; None: nothing is stopped.
        """
        began = time.perf_counter()
        for name in names:
            if at_most is not None:
                self._limit(name, snapshot, at_most - (time.perf_counter() - began))
            own_settings, before = self._recorded(name, snapshot)
            self._measure(self.chosen[name], step, snapshot, own_settings, before)
        return time.perf_counter() - began

    def look(self, step: int, snapshot: Snapshot, at_most: float, waiting: bool = False) -> float:
        """The checks that look at the probe set, recording each outcome; gives the time taken in seconds. waiting:
        those that need held-out data wait for it."""
        began = time.perf_counter()
        self.floor.looked(step)
        share_the_pass(snapshot, {n.name for name in self.floor.names for n in self.chosen[name].needs})
        with self._undisturbed(snapshot), _once(snapshot):
            for name in list(self.floor.names):
                left = at_most - (time.perf_counter() - began)
                if left > 0 and not (waiting and needs_held_out(self.chosen[name])):
                    snapshot.deadline.restart(left, why="the time of the checks")
                    self._measure(self.chosen[name], step, snapshot, {})
        seconds = time.perf_counter() - began
        self.schedule.pay(seconds)
        return seconds

    def _limit(self, name: str, snapshot: Snapshot, at_most: float) -> None:
        """What one measurement may take; where the budget is infinite, no more memory than is free."""
        own, estimate = self.schedule.limit(name), self.schedule.estimated(name)
        about = format_seconds(estimate) if estimate < inf else "not known"
        why = (TOO_LONG if own <= at_most else NO_MORE).format(about)
        memory = available_memory(next(snapshot.model.parameters()).device)
        snapshot.limit.restart(min(own, at_most), memory, why)

    def measure_step(self, read: Read, names: Iterable[str]) -> float:
        """Measure with these on the gradients of the step that is going on; gives the time taken in seconds."""
        began = time.perf_counter()
        for name in names:
            start = time.perf_counter()
            read.gradients.deadline.restart(self.schedule.limit(name))
            outcome = self._measured_on(name, read.quantities)
            if isinstance(outcome, Result):
                about = dataclasses.replace(outcome.provenance, num_examples=read.gradients.num_examples)
                outcome = dataclasses.replace(outcome, notes=(*outcome.notes, read.note), provenance=about)
                self._found.append((name, outcome, time.perf_counter() - start))
            else:
                self.own_step.leave(name, outcome.reason, read)
        return time.perf_counter() - began

    def _measured_on(self, name: str, own_settings: Mapping[str, Any]) -> Outcome:
        """What an instrument gives on what it needs of these quantities."""
        instrument = self.chosen[name]
        needed = {need.quantity.name for need in instrument.needs}
        return attempt(
            None,
            instrument,
            **self._settings[name],
            **{n: value for n, value in own_settings.items() if n in needed},
        )

    def keep_step(self, step: int, longer: float) -> None:
        """That step is over, which reading it made longer by so many seconds: record what was found on it."""
        found, self._found = self._found, []
        if longer and not found:
            self.schedule.pay(longer)
        for name, outcome, seconds in found:
            seconds += longer / len(found)
            self.schedule.spent(name, step, seconds)
            self._keep(name, step, outcome, seconds)

    def _recorded(self, name: str, snapshot: Snapshot) -> tuple[dict[str, Any], float]:
        """The record of an open window that can be judged, as a quantity by name, and what it took in seconds."""
        if not self.windows.usable(name):
            self.windows.without_record(name)
            return {}, 0.0
        return self.windows.close(snapshot)

    def unfinished(self, step: int) -> list[str]:
        """Those that can still run and whose last result is older than `step`, the cheapest first."""
        accounts = self.schedule.accounts.values()
        open_ones = [a for a in accounts if a.due != inf and self._last.get(a.name, -1) < step]
        open_ones = [a for a in open_ones if self.windows.usable(a.name) or not self.windows.needs_record(a.name)]
        return [a.name for a in sorted(open_ones, key=lambda a: a.estimate)]

    def named(self, names: Iterable[str]) -> list[str]:
        """The names, all where there is none. Raises InvalidInput for one that this watch does not have."""
        names = list(names)
        for name in names:
            if name not in self.chosen:
                hint = did_you_mean(name, self.chosen) or "give it to diag.watch in instruments=."
                raise InvalidInput(f"This watch does not measure {name!r}; {hint}")
        return names or list(self.chosen)

    def explain_unrun(self, step: int, snapshot: Snapshot) -> None:
        """Record, of each instrument that never ran, what a run does not have for it, or that the budget was too
        small."""
        unrun = {n: a for n, a in self.schedule.accounts.items() if a.times == 0 and n not in self._last}
        if not unrun:
            return
        with _once(snapshot, called=False):
            missing = {name: _never_given(self.chosen[name], snapshot) for name in unrun}
        for name, account in unrun.items():
            self._record(step, Skipped(name, missing[name] or self._not_allowed(name, account)), 0.0)

    def _not_allowed(self, name: str, account: Account) -> str:
        if self.windows.needs_record(name) and account.estimate <= self.schedule.left:
            return NO_WINDOW.format(self.windows.shorten(name))
        time_taken = format_seconds(account.estimate) if account.estimate < inf else "not known"
        return NEVER_RUN.format(time_taken, self.schedule.budget)

    def _measure(
        self,
        instrument: Instrument,
        step: int,
        snapshot: Snapshot,
        own_settings: Mapping[str, Any],
        before: float = 0.0,
    ) -> None:
        """`own_settings`: quantities by name. `before`: seconds that making them took, which have been paid."""
        began = time.perf_counter()
        outcome = self.attempted(instrument.name, snapshot, own_settings)
        note = self.own_step.note(instrument.name)
        if note and isinstance(outcome, Result):
            outcome = dataclasses.replace(outcome, notes=(*outcome.notes, note))
        _wait(snapshot)
        seconds = time.perf_counter() - began
        name, deadline = instrument.name, snapshot.limit
        self.last_outcome = outcome
        if deadline.reason:
            self._stopped(name, step, seconds, min(deadline.seconds, seconds))
            if name not in self._succeeded:  # else there is a result, of an earlier step
                self._last[name] = step
                self._record(step, outcome, before + seconds)
            return
        if isinstance(outcome, Skipped) and _waits_for_a_step(instrument, snapshot):
            self._record(step, outcome, before + seconds)
            return
        if name in self.schedule.accounts:
            self.schedule.spent(name, step, seconds)
        self._keep(name, step, outcome, before + seconds)

    def attempted(self, name: str, snapshot: Snapshot, own_settings: Mapping[str, Any] | None = None) -> Outcome:
        """What an instrument gives, with its settings; nothing is recorded."""
        with self._undisturbed(snapshot):
            return attempt(snapshot, self.chosen[name], **self._settings[name], **own_settings or {})

    def _stopped(self, name: str, step: int, seconds: float, limit: float) -> None:
        """It took longer than it might, or more memory; it is tried again, a few times."""
        if name in self.schedule.accounts:
            self.schedule.stopped(name, step, seconds, limit)
        else:
            self.floor.stopped(name)

    @contextmanager
    def _undisturbed(self, snapshot: Snapshot) -> Iterator[None]:
        # A loss that an instrument computes is none of the loop's.
        with hearing() as said, torch.enable_grad(), _uncompiled(), pause.measuring():
            yield
        for sentence in said:
            self._note(sentence, sentence)

    def _keep(self, name: str, step: int, outcome: Outcome, seconds: float) -> None:
        if isinstance(outcome, Result):
            self._failures[name] = 0
            self._succeeded.add(name)
            if self._tell is not None:
                self._tell(self.chosen[name], outcome, step)
        elif isinstance(outcome, Skipped) and not self.windows.needs_record(name):
            # What the run cannot give now it will not give later: say so once.
            self._postpone(name, inf)
        elif isinstance(outcome, Failed):
            failures = self._failures[name] = self._failures.get(name, 0) + 1
            self._postpone(name, inf if failures >= FAILURES else step * 4)
        self._last[name] = step
        self._record(step, outcome, seconds)

    def _postpone(self, name: str, step: float) -> None:
        if name in self.schedule.accounts:
            self.schedule.postpone(name, step)
        elif step == inf:
            self.floor.give_up(name)


def needs_held_out(instrument: Instrument) -> bool:
    """Whether it gives nothing without held-out data."""
    return any(need.name.startswith(HELD_OUT) and not need.optional for need in instrument.needs)


def _waits_for_a_step(instrument: Instrument, snapshot: Snapshot) -> bool:
    """Whether it reads the record of the steps and there is none yet: the numbers of the first steps come later
    from a device or from other ranks."""
    if not any(need.name == "history" for need in instrument.needs) or snapshot.history is None:
        return False
    try:
        with pause.measuring():  # or it would be waited for them
            return len(snapshot.history) == 0
    except MissingQuantity:
        return True


def _never_given(instrument: Instrument, snapshot: Snapshot) -> str:
    """Why it gives nothing on this snapshot however long the run, as without a second network; else nothing."""
    # A loss that is not known says so when it is called first, after one forward pass.
    unknown = isinstance(snapshot.loss_fn, UnknownLoss)
    for need in instrument.needs:
        if need.optional or not (need.quantity.cost is Effort.NONE or (unknown and need.name in OF_THE_LOSS)):
            continue
        try:
            snapshot.quantity(need.name)
        except MissingQuantity as error:
            return str(error)
        except DiagError:
            continue
    return ""


@contextmanager
def _once(snapshot: Snapshot, called: bool = True) -> Iterator[None]:
    """What to measure inside of, for several at once; where the model is refused, each of them says so."""
    with ExitStack() as stack:
        with suppress(DiagError):
            stack.enter_context(snapshot.undisturbed(called))
        yield


def _asks_for_previous(instrument: Instrument) -> bool:
    return any(n.quantity.name == "update" or n.name.startswith("previous_") for n in instrument.needs)


def _uncompiled() -> AbstractContextManager[Any]:
    # Parts of the model that are compiled in place would be compiled again for evaluation, and what is compiled
    # cannot be differentiated twice.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _wait(snapshot: Snapshot) -> None:
    # The device works on after Python has returned; the time belongs to the measurement.
    device = next((p.device for p in snapshot.model.parameters()), None)
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
