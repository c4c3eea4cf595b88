"""`watch(model)`: one line that records what a training loop does, and measures the model while it trains.

The loop need know nothing of it. The four promises: training is bit-identical, the time spent is bounded and
recorded, nothing raises into the loop, and what has been recorded survives the process.
"""

from __future__ import annotations

import math
import os
import statistics
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from diag.quantities.batch import tensors_in
from diag.quantities.carry import Carry
from diag.quantities.snapshot import Snapshot
from diag.quantities.unwrap import bare_model
from diag.run import Run, load
from diag.watch.about import describe_run, distributed_rank, is_sharded, temporary_folder
from diag.watch.arguments import check, checked_optimizer, given_probe, trainable
from diag.watch.guard import Clock, guarded
from diag.watch.hooks import ModelHooks
from diag.watch.hub import HUB
from diag.watch.losses import LossObserver
from diag.watch.measure import Measurements, chosen_instruments
from diag.watch.record import Recorder
from diag.watch.rows import Row, Rows
from diag.watch.schedule import Schedule
from diag.watch.steps import StepObserver

ALWAYS_ON_SHARE = 0.1  # of the budget, for the norms that need a copy of the parameters
WARM_UP, AGAIN = 3, 4  # costs are estimated after so many steps, and again after so many times as many
USUAL = 9  # steps that tell what a step takes
SPARE = 0.25  # seconds that the last measurements may take beyond the budget
LOOK_EVERY = 0.01  # seconds
PROBE_STEPS = 16  # the probe set is what these first steps have shown, where that is less than its limit
SHARDED = (
    "The parameters are sharded over processes, so that one process alone cannot run the model; nothing is "
    "measured on it."
)
NO_STEP = (
    "No optimizer step on the model's parameters was seen; the optimizer must hold the parameters that the model "
    "has."
)
NO_CALL = (
    "No call of the model in training was seen (it may run inside a compiled function, or only its parts are "
    "called); watch the part that is called, or give probe= and loss_fn=."
)

_watchers: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Watcher]] = weakref.WeakKeyDictionary()


def watch(
    model: nn.Module,
    *,
    loss_fn: Callable[[Any, Any], Any] | None = None,
    probe: Any = None,
    held_out: Any = None,
    optimizer: Optimizer | None = None,
    run: str | Path | None = None,
    instruments: Iterable[str] | Mapping[str, Mapping[str, Any]] | None = None,
    every: int | None = None,
    budget: float = 0.05,
    resume: bool | int = False,
) -> Watcher:
    """Watch the training of `model`: `with diag.watch(model, run="runs/mine"): train(model)`.

    model: the network, before or after torch.compile or a data-parallel wrapper. A second watch on the same
        model replaces the first.
    loss_fn: `loss_fn(outputs, targets)`, mean-reduced; by default the loss that training is seen to use.
    probe: the data to measure on, in any form that `Snapshot` takes; by default the first examples that
        training is seen to use, up to 512 within 16 steps. It stays the same over the run. What needs nothing but
        the gradients of single examples is measured on those of a training step, where that can be read.
    held_out: data of the same kind that is not trained on, for what instruments measure on it besides.
    optimizer: count only the steps of this one; by default every optimizer that holds parameters of the model.
    run: the folder of the record; by default a temporary one, which ends with the process.
    instruments: names, or a mapping from names to settings; all of them by default.
    every: measure every so many steps, besides the geometrically spaced ones.
    budget: the share of wall time that watching may take; `math.inf` measures at every scheduled step.
    resume: go on with the run in the folder, after its last step or after the given one.

    What cannot be observed is recorded once, with the reason. In a distributed run only rank 0 records.
    Raises InvalidInput for arguments that do not fit, RunError where the folder cannot be written.
    """
    return Watcher(
        model,
        loss_fn=loss_fn,
        probe=probe,
        held_out=held_out,
        optimizer=optimizer,
        run=run,
        instruments=instruments,
        every=every,
        budget=budget,
        resume=resume,
    )


class Watcher:
    """A watch that is going on: see `watch` for the arguments.

    It ends by `close()`, at the end of a `with` block, or with the process.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss_fn: Callable[[Any, Any], Any] | None = None,
        probe: Any = None,
        held_out: Any = None,
        optimizer: Optimizer | None = None,
        run: str | Path | None = None,
        instruments: Iterable[str] | Mapping[str, Mapping[str, Any]] | None = None,
        every: int | None = None,
        budget: float = 0.05,
        resume: bool | int = False,
    ) -> None:
        check(model, loss_fn, every, budget)
        self.model = bare_model(model)
        parameters = trainable(self.model)
        self.optimizer = checked_optimizer(optimizer, parameters)
        chosen = chosen_instruments(instruments)
        self.active = distributed_rank() == 0
        self._clock = Clock()
        self._probe = given_probe(self.model, probe)
        self._held_out = given_probe(self.model, held_out).batches or None
        self._replace_others(run)
        about = describe_run(self.model, parameters, chosen, budget, every)
        self.path = Path(run) if run is not None else temporary_folder()
        self._recorder = Recorder(self.path if self.active else None, about, resume)
        self._rows = Rows(self._recorder.dtype, self._recorder.last_step, self._recorder.row)
        self._losses = LossObserver(loss_fn, self._probe, self._recorder.note, list(parameters.values()))
        share = ALWAYS_ON_SHARE * min(budget, 0.05)
        self._steps = StepObserver(
            parameters, self._losses, self._row_finished, self._clock.elapsed, self._recorder.note, share
        )
        self._measurements = Measurements(
            chosen, lambda names: Schedule(names, budget, every), self._recorder.outcome, self._recorder.note
        )
        self._windows, self._own_step = self._measurements.windows, self._measurements.own_step
        self._carry = Carry()
        self._shortest = math.inf
        self._last_time: float | None = None
        self._usual: deque[float] = deque(maxlen=USUAL)
        self._hooks: ModelHooks | None = None
        self._estimate_at = WARM_UP
        self._forwards = self._forwards_before = self._silent = self._examples = 0
        self._fingerprint, self._look_again = "", 0.0
        if self.active:
            self._begin(model)

    # For the user

    @property
    def run(self) -> Run:
        """What has been recorded so far."""
        if not self.active:
            return Run()
        if not self._clock.closed:
            self._drain()
        return load(self.path)

    @property
    def step(self) -> int:
        """The number of the last recorded step."""
        return self._rows.step

    @guarded("loss")
    def loss(self, value: Any) -> None:
        """Tell the loss of the current micro-batch; it counts before any that is observed."""
        self._losses.give(value)

    def measure(self, *names: str) -> None:
        """Measure now, whatever the budget: with the instruments named, else with all that this watch has.

        The time is recorded with the rest. Raises InvalidInput for an instrument that the watch does not have.
        """
        self._measure_now(self._measurements.named(names))

    def close(self) -> None:
        """End the watch, after the last measurements that the budget allows. It may be called twice."""
        self._end(measure=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if error is not None and not self._clock.closed:
            text = f"Training ended by {type(error).__name__}" + (f": {error}" if str(error) else "")
            self._recorder.event(self.step, "exception", f"{text[:500]}.")
        self._end(measure=error is None)

    def __repr__(self) -> str:
        state = "closed" if self._clock.closed else "watching" if self.active else "idle: not rank 0"
        return f"<Watcher of {type(self.model).__name__}, {self.step:,} steps, {state}>"

    # What the process shows (see hub.Listener)

    @guarded("inputs and outputs")
    def forward_called(self, args: Any, kwargs: Any, outputs: Any) -> None:
        """The model was called with gradients on."""
        if self._losses.forward_called(args, kwargs, outputs):
            self._clock.start()
            self._steps.training_pass()
            self._windows.examples.forward_called(args, kwargs)
            self._own_step.backwards.forward_called(args, kwargs, outputs)
            self._forwards += 1
            self._examples += _length((args, kwargs))

    @guarded("loss")
    def loss_called(self, function: Any, args: Any, kwargs: Any, value: Any) -> None:
        self._losses.loss_called(function, args, kwargs, value)
        self._own_step.backwards.loss_called(function, args, kwargs, value)

    @guarded("loss")
    def loss_scaled(self, losses: Any, scaled: Any) -> None:
        self._losses.loss_scaled(losses, scaled)

    @guarded("loss")
    def backward_called(self, roots: Any) -> None:
        self._losses.backward_called(roots)
        if self._own_step.armed:
            self._own_step.backwards.backward_called(roots)
            self._own_step.backward_begins()

    @guarded("loss")
    def backward_done(self) -> None:
        self._losses.backward_done()
        if self._own_step.reading:
            self._measure_own_step()
        self._steps.backward_done()

    @guarded("gradients before clipping")
    def before_clip(self, parameters: Any, max_norm: Any, total_norm: Any) -> Any:
        return self._steps.before_clip(parameters, max_norm, total_norm)

    @guarded("gradients before clipping")
    def after_clip(self, token: Any) -> None:
        self._steps.after_clip(token)

    @guarded("GradScaler")
    def unscaling(self, optimizer: Optimizer, scaler: Any) -> None:
        self._steps.unscaling(optimizer, scaler)

    @guarded("GradScaler")
    def scaler_stepping(self, optimizer: Optimizer) -> None:
        self._steps.scaler_stepping(optimizer)

    @guarded("GradScaler")
    def scaler_stepped(self, optimizer: Optimizer) -> None:
        if self._counts(optimizer):
            self._steps.scaler_stepped(optimizer)

    @guarded("optimizer steps")
    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        if not self._counts(optimizer):
            return None
        self._clock.start()
        return self._steps.before_step(optimizer, args, kwargs)

    @guarded("optimizer steps")
    def after_step(self, optimizer: Optimizer) -> None:
        if self._counts(optimizer):
            self._steps.after_step(optimizer)

    def abandon(self) -> None:
        """This is a forked child: stop without touching the record, which is the parent's."""
        self._clock.closed = True

    def internal_error(self, part: str, error: Exception) -> None:
        """Something of ours broke in `part`: record it once, and leave that part alone if it goes on."""
        self._recorder.internal_error(self.step, part, error)

    @property
    def clock(self) -> Clock:
        """The time that passes, and the part of it that is ours."""
        return self._clock

    # How it goes on

    def _begin(self, model: nn.Module) -> None:
        models = (model, self.model) if model is not self.model else (self.model,)
        self._hooks = ModelHooks(models, self.forward_called)
        HUB.add(self)
        _watchers[self.model] = weakref.ref(self)
        self._announce_probe()

    def _counts(self, optimizer: Optimizer) -> bool:
        return self.optimizer is None or optimizer is self.optimizer

    def _row_finished(self, row: Row, in_step: bool) -> None:
        step = self._rows.add(row)
        longer = self._time_step()
        self._measurements.keep_step(step, longer)
        self._recorder.cost(step, self._clock)
        self._look_for_compiled()
        if self._steps.steps >= PROBE_STEPS:
            self._probe.complete = True
        self._windows.examples.stepped(self._losses.descended, row.skipped)
        if self._windows.open is not None:
            self._record_losses(row, step, in_step)
        # An instrument that lacked the loss would not be asked again; with a compiled model it takes some steps.
        settled = self._losses.settled or self._steps.steps >= PROBE_STEPS
        if in_step and self._probe.batches and self._probe.complete and settled:
            self._measure_if_due(step)

    def _time_step(self) -> float:
        """Time the training step that ended; gives by how many seconds reading it made it longer."""
        training, longer = self._clock.elapsed() - self._clock.ours(), 0.0
        if self._last_time is not None:
            taken = training - self._last_time
            if not self._own_step.touched:
                self._usual.append(taken)
                self._shortest = min(self._shortest, taken)
            elif self._usual:
                longer = max(taken - statistics.median(self._usual), 0.0)
                self._clock.charge(longer)
                training -= longer
        self._own_step.touched = self._own_step.armed
        self._last_time = training
        return longer

    def _look_for_compiled(self) -> None:
        # Steps without a call of the model: it may have been compiled since. Looking is dear, so ever more rarely.
        self._silent = self._silent + 1 if self._forwards == self._forwards_before else 0
        self._forwards_before = self._forwards
        if self._silent and self._silent & (self._silent - 1) == 0 and self._hooks is not None:
            self._hooks.find_compiled()

    def _measure_if_due(self, step: int) -> None:
        schedule = self._measurements.schedule
        elapsed = self._clock.elapsed()
        if elapsed < self._look_again and schedule.budget != math.inf:
            return  # what could be earned since the last look is not worth the look
        self._look_again = elapsed + LOOK_EVERY
        self._estimate(step)
        schedule.earn(self._clock.elapsed(), self._clock.overhead())
        names = self._measurements.affordable(step, with_previous=bool(self._steps.before))
        names, window = self._windows.choose(names)
        names, later = self._own_step.choose(names)
        if later and self._usual:  # what a step takes must be known, to tell what reading one adds
            self._arm(later)
        if names:
            self._measure(names, step)
        if window is not None:
            self._begin_window(window, step)
        self._steps.keep_before = self._measurements.wants_previous(step + 1)

    def _estimate(self, step: int) -> None:
        if self._steps.steps < self._estimate_at:
            return
        self._estimate_at = AGAIN * self._steps.steps
        # The shortest step so far: the first ones include what happens once, such as compiling.
        training = self._shortest if self._shortest < math.inf else self._clock.elapsed() / self._steps.steps
        # The measurements are made in float32, which is several times slower on a GPU made for half precision.
        slower = 4.0 if torch.is_autocast_enabled("cuda") else 1.0
        self._announce_probe()
        self._measurements.estimate(training, self._examples / self._steps.steps, self._probe.size, slower)

    @guarded("measurements")
    def _measure(self, names: list[str], step: int) -> None:
        if is_sharded(self.model):
            self._recorder.note("measurements", SHARDED)
            return
        self._clock.measuring += self._measurements.run(names, step, self._snapshot())

    @guarded("measurements")
    def _arm(self, names: list[str]) -> None:
        if not is_sharded(self.model):
            seconds = self._own_step.arm(names, self._snapshot())
            self._clock.measuring += seconds
            self._measurements.schedule.pay(seconds)
            self._estimate_again()

    def _estimate_again(self) -> None:
        """Where steps turned out not to be read, what is measured on the probe set takes another time."""
        if self._own_step.refused:
            self._estimate_at = 0
            self._estimate(self.step)

    @guarded("measurements")
    def _measure_own_step(self) -> None:
        names = self._own_step.names
        read = self._own_step.backward_ends(self._losses.loss_fn)
        self._own_step.names = []
        if read is not None:
            self._clock.measuring += self._measurements.measure_step(read, names)
        else:
            self._estimate_again()

    @guarded("measurements")
    def _begin_window(self, name: str, step: int) -> None:
        if not is_sharded(self.model):
            self._clock.measuring += self._windows.begin(name, step, self._snapshot())

    @guarded("measurements")
    def _record_losses(self, row: Row, step: int, in_step: bool) -> None:
        if not in_step:
            self._windows.drop(step, "the loop goes on before the step is seen to be over")
            return
        if bool(row.skipped):
            return  # a GradScaler left the update out: nothing moved
        snapshot = self._snapshot()
        self._clock.measuring += self._windows.add(step, snapshot)
        if self._windows.complete and self._windows.open is not None:
            self._clock.measuring += self._measurements.run([self._windows.open.name], step, snapshot)

    def _snapshot(self) -> Snapshot:
        snapshot = Snapshot(
            self.model,
            self._losses.loss_fn,
            self._probe.batches,
            held_out=self._held_out,
            previous=self._previous(),
            optimizer=self.optimizer or self._steps.optimizer,
            history=_LazyHistory(self),
            carry=self._carry,
        )
        # The probe set does not change, so it need not be hashed at every measurement.
        snapshot.__dict__["fingerprint"] = self._fingerprint
        return snapshot

    def _previous(self) -> dict[str, Any] | None:
        before = self._steps.before
        if not before:
            return None
        columns = {id(p): c for c, p in enumerate(self._steps.parameters)}
        state = dict(self.model.state_dict())
        for name, p in self.model.named_parameters(remove_duplicate=False):
            if columns.get(id(p)) in before:
                state[name] = before[columns[id(p)]]
        return state

    def _announce_probe(self) -> None:
        if not self._fingerprint and self._probe.batches and self._probe.complete:
            self._fingerprint = Snapshot(self.model, None, self._probe.batches).fingerprint
            self._recorder.event(
                self.step, "probe", f"{self._probe.size} examples, fingerprint {self._fingerprint}."
            )

    @guarded("record")
    def _drain(self) -> None:
        self._rows.drain(wait=True)

    # How it ends

    def _end(self, measure: bool) -> None:
        if self._clock.closed:
            return
        try:
            if self.active:
                self._last_words(measure)
        finally:
            self._clock.closed = True
            self._let_go()

    def _let_go(self) -> None:
        HUB.remove(self)
        if self._hooks is not None:
            self._hooks.remove()
        self._own_step.disarm()
        self._losses.close()
        self._recorder.close(self.step, self._clock)
        if (known := _watchers.get(self.model)) is not None and known() is self:
            del _watchers[self.model]

    @guarded("measurements")
    def _measure_now(self, names: list[str]) -> None:
        self._steps.finish(in_step=False)
        self._rows.drain(wait=True)
        if self._ready_at_last():
            self._measure(names, self.step)

    @guarded("record")
    def _last_words(self, measure: bool) -> None:
        self._steps.finish(in_step=False)
        self._rows.drain(wait=True)
        if measure:
            self._measure_last()
        wanted = self._measurements.schedule.budget > 0 and self._recorder.last_step == 0
        if wanted and not is_sharded(self.model) and self._probe.batches and self._steps.steps:
            self._measurements.explain_unrun(self.step)
        for key, sentence in self._never_seen():
            self._recorder.note(key, sentence)

    def _ready_at_last(self) -> bool:
        if not self._probe.batches or self._steps.steps == 0:
            return False
        self._probe.complete = True
        self._estimate_at, self._own_step.over = 0, True
        self._estimate(self.step)
        self._own_step.over = False
        self._announce_probe()
        return True

    def _measure_last(self) -> None:
        if self._measurements.schedule.budget == 0 or not self._ready_at_last():
            return
        schedule = self._measurements.schedule
        schedule.earn(self._clock.elapsed(), self._clock.overhead())
        self._windows.end()
        spare = SPARE  # a short run earns little, and a run without a number helps nobody
        for name in self._measurements.unfinished(self.step):
            account = schedule.accounts[name]
            if account.times and self._own_step.has_course(name):
                continue  # the steps tell its course; the probe set would be another measure of it
            if self._windows.is_enough(name):
                continue
            lacking = max(account.estimate - max(schedule.left, 0.0), 0.0)
            if lacking > (0.0 if account.times else spare):
                continue
            spare -= lacking
            self._measure([name], self.step)

    def _never_seen(self) -> Iterable[tuple[str, str]]:
        if self._steps.steps == 0:
            yield "steps", NO_STEP
        elif self._forwards == 0:
            yield "inputs", NO_CALL

    def _replace_others(self, run: str | Path | None) -> None:
        previous = _watchers.get(self.model)
        same_run = [w for w in HUB.listeners if isinstance(w, Watcher) and run is not None and _same(w.path, run)]
        for other in [previous() if previous is not None else None, *same_run]:
            if other is not None:
                other._end(measure=False)


class _LazyHistory:
    """The record so far, read only if an instrument looks at it."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = weakref.ref(watcher)

    def __getattr__(self, name: str) -> Any:
        watcher = self._watcher()
        if watcher is None or name.startswith("__"):
            raise AttributeError(name)
        history = watcher.run.history
        self.__dict__.update({f: getattr(history, f) for f in history.__dataclass_fields__} if history else {})
        return getattr(history, name)


def _length(inputs: Any) -> int:
    return next((t.shape[0] for t in tensors_in(inputs) if t.ndim), 0)


def _same(a: Any, b: Any) -> bool:
    return os.path.realpath(a) == os.path.realpath(b)
