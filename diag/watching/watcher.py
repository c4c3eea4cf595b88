"""`watch(model)`: one line that records what a training loop does, and measures the model while it trains.

The loop need know nothing of it. The four promises: training is bit-identical, the time spent is bounded and
recorded, nothing raises into the loop, and what has been recorded survives the process.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from diag.checkpoints.unwrap import bare_model
from diag.distributed.meeting import rank_here
from diag.door import class_at_the_door, names_at_the_door
from diag.errors import InvalidInput, of_the_steps, text_of
from diag.run.entries import Finding
from diag.run.reading import read_run
from diag.run.run import Run
from diag.snapshot.history import History
from diag.snapshot.state.modes import unseen
from diag.snapshot.validation import check_model_and_loss
from diag.watching.about import describe_run, temporary_folder
from diag.watching.arguments import (
    Settings,
    check_callable,
    checked_optimizer,
    checked_record,
    checked_schedule,
    given_probe,
    watched_parameters,
)
from diag.watching.guard import Clock, Guarded, guarded, safely
from diag.watching.listener import TrainingListener
from diag.watching.measure.findings import Findings
from diag.watching.measure.live import LiveChecks
from diag.watching.measure.measuring import Measurements, chosen_instruments
from diag.watching.measure.runner import MeasurementRunner
from diag.watching.measure.schedule import MeasurementSchedule
from diag.watching.measure.training import Training
from diag.watching.observe.loop.observer import LoopObserver
from diag.watching.observe.losses import LossObserver
from diag.watching.observe.rows import Row, RowQueue
from diag.watching.observe.steps import Followed, StepObserver
from diag.watching.ranks.company import Company, hold_whole
from diag.watching.record import Recorder

ALWAYS_ON_SHARE = 0.1  # of the budget, for the norms that need a copy of the parameters
HOOKS_TAKEN = (
    "Other code has taken away the hook by which calls of the model are seen, as by clearing all of its hooks: the "
    "losses of the steps in between are not recorded; the hook is put back each time."
)
NO_STEP_SEEN = (
    "No optimizer step on the model's parameters was seen; the optimizer must hold the parameters that the model "
    "has. A loop that updates them by itself reports its steps by watcher.step()."
)
LOGGED_NO_NUMBER = "What was given to watcher.log() as {}= is a {} and not one number, so it is not recorded."
NO_CALL = (
    "No call of the model in training was seen (it may run inside a compiled function, or only its parts are "
    "called); watch the part that is called, or give probe= and loss_fn=."
)
NO_PASS_SEEN = (
    "No backward() from a loss of this model was seen before {}, so no loss is recorded there; where gradients "
    "come from torch.autograd.grad or torch.func, give it by watcher.loss(value)."
)

_watchers: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Watcher]] = weakref.WeakKeyDictionary()


@names_at_the_door
@unseen()
def watch(
    model: nn.Module,
    *,
    loss_fn: Callable[[Any, Any], Any] | None = None,
    probe: Any = None,
    held_out: Any = None,
    optimizer: Optimizer | None = None,
    run: str | Path | None = None,
    instruments: str | Iterable[str] | Mapping[str, Mapping[str, Any]] | None = None,
    every: int | None = None,
    budget: float = 0.05,
    resume: bool | int = False,
    on_finding: Callable[[Finding], object] | None = None,
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
    instruments: names, or a mapping from names to settings; by default all that can judge. "all" adds the
        descriptions.
    every: measure every so many steps, besides the geometrically spaced ones.
    budget: the share of wall time that watching may take; `math.inf` measures at every scheduled step.
    resume: continue the run in the folder, after its last step or after the given one.
    on_finding: called with each finding when it is first seen; what it raises is noted, and training goes on.

    What cannot be observed is recorded once, with the reason. Where several processes train, call it on every rank:
    norms, losses and flags are put together over ranks, replicas are compared, and rank 0 records. The Hessian's
    spectrum is measured by all ranks on all of their probe sets; sharded models (fully_shard, tensor parallel) are
    put together for it on every rank, at the scheduled steps. What else is measured rank 0 measures while the
    others wait, at most half of the process group's timeout.
    Raises InvalidInput for arguments that do not fit, RunError where the folder cannot be written.
    """
    check_model_and_loss(model, loss_fn)
    steps, share = checked_schedule(every, budget)
    folder, after = checked_record(run, resume)
    check_callable(on_finding)
    bare = bare_model(model)
    parameters = watched_parameters(bare)
    settings = Settings(
        optimizer=checked_optimizer(optimizer, parameters),
        instruments=chosen_instruments(instruments),
        probe=given_probe(bare, probe),
        held_out=given_probe(bare, held_out).batches or None,
        loss_fn=loss_fn,
        run=folder,
        every=steps,
        budget=share,
        resume=after,
        on_finding=on_finding,
    )
    return Watcher(model, parameters, settings)


@class_at_the_door(hint="diag.watch(model) makes one", convert=False)
class Watcher(Guarded):
    """A watch that is going on, which `watch` began.

    It ends by `close()`, at the end of a `with` block, or with the process.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], settings: Settings) -> None:
        super().__init__(Clock(), self._internal_error)
        self._hooks_taken = False
        self.model, self.optimizer = bare_model(model), settings.optimizer
        self._end_others(settings.run)
        about = describe_run(self.model, parameters, settings.instruments, settings.budget, settings.every)
        self.path = settings.run if settings.run is not None else temporary_folder()
        leads = rank_here() == 0
        self._recorder = Recorder(self.path if leads else None, about, settings.resume)
        note, info = self._recorder.note, self._recorder.info
        self._company = Company(self.model, parameters, note, info)
        self._rows = RowQueue(self._recorder.dtype, self._recorder.last_step, self._row_complete)
        self._probe = settings.probe
        self._findings = Findings(settings.on_finding, self._recorder.event, note)
        self._losses = LossObserver(settings.loss_fn, self._probe, note, info, list(parameters.values()))
        share = ALWAYS_ON_SHARE * min(settings.budget, 0.05)
        followed = Followed(share, by_this_rank=leads, whole=hold_whole(parameters))
        self._steps = StepObserver(
            parameters, self._losses, self._row_finished, self.clock.elapsed, note, followed, self._step_broke
        )
        self._loop = LoopObserver(self.model, self._recorder.last_step, self._recorder.rates_before)
        self._ending, self._from_the_start = False, self._recorder.last_step == 0
        self._loop.rows.know(self._probe.batches)
        self._loop.ranks, self._loop.directions = self._company.facts, self._steps.directions.facts
        self._training = Training(
            self.model, self.optimizer, self._losses, self._steps, settings.held_out, self._history, self._loop
        )
        self._measurements = self._measured(settings)
        self._live = self._checked_live(settings, about["layers"])
        self._loop.rows.needed = self._measurements.asks_for("loop")
        self._own_step = self._measurements.own_step
        guard = (self.clock, self._internal_error)
        self._runner = MeasurementRunner(*guard, self._training, self._measurements, self._recorder, settings.every)
        self._listener = TrainingListener(
            *guard, self._training, self._measurements.windows, self._runner, self._company, self.close
        )
        self._why_ended = "its watch was closed"
        self._counted = 0  # examples of the steps that are over
        self._begin(model)

    def _measured(self, settings: Settings) -> Measurements:
        return Measurements(
            settings.instruments,
            lambda names: MeasurementSchedule(names, settings.budget, settings.every),
            self._recorder.outcome,
            self._recorder.note,
            self._recorder.info,
            self._findings.result,
            self._recorder.last_step,
        )

    def _checked_live(self, settings: Settings, layers: Mapping[str, int]) -> LiveChecks:
        return LiveChecks(
            self._measurements.live,
            settings.instruments,
            layers,
            self._recorder.dtype,
            lambda: {"loop": self._loop.facts(ended=self._ending)},
            self._recorder.outcome,
            self._findings.verdict,
        )

    @property
    def run(self) -> Run:
        """What has been recorded so far."""
        if not self._company.leads:
            return Run()
        if not self.clock.closed:
            self._drain()
        return read_run(self.path)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What has been found so far, in the order in which it was first seen."""
        return tuple(self._findings.found)

    @property
    def last_step(self) -> int:
        """The number of the last recorded step."""
        return self._rows.step

    @guarded("loss")
    def loss(self, value: Any) -> None:
        """Give the loss of the current micro-batch; it takes precedence over what is observed."""
        self._losses.give(value)

    @guarded("steps")
    def step(self) -> None:
        """Report that the loop has made a step, where it has no optimizer of torch's: after the parameters were
        updated, while they still have their gradients."""
        self.clock.start()
        self._steps.told()

    @guarded("logged numbers")
    def log(self, **values: Any) -> None:
        """Put numbers of your own on the record, at the last step: `watcher.log(accuracy=0.93)`.

        Each is one number, or a tensor of one; what is not is left out, with a note.
        """
        numbers = {name: number for name, value in values.items() if (number := _number(value)) is not None}
        for name in values.keys() - numbers.keys():
            self._recorder.note(f"log {name}", LOGGED_NO_NUMBER.format(name, type(values[name]).__name__))
        if numbers:
            self._recorder.metrics(numbers)

    def measure(self, *names: str) -> None:
        """Measure now, whatever the budget: with the instruments named, else with all that this watch has.

        The time is recorded with the rest. Raises InvalidInput for an instrument that the watch does not have.
        """
        try:
            chosen = self._measurements.named(names)
        except InvalidInput:
            raise
        except Exception as error:
            safely(self._internal_error, "measurements", error)
            return
        self._measure_now(chosen)

    def close(self) -> None:
        """End the watch, after the last measurements that the budget allows. It may be called twice."""
        safely(self._end, True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if error is not None and not self.clock.closed:
            safely(self._ended_by, error)
        safely(self._end, error is None)

    def _ended_by(self, error: BaseException) -> None:
        text = text_of(error)
        sentence = f"Training ended by {type(error).__name__}" + (f": {text}" if text else "")
        self._recorder.event(self.last_step, "exception", f"{sentence[:500]}.")
        self._why_ended = f"its training ended by {type(error).__name__} at step {self.last_step:,}"

    def __repr__(self) -> str:
        state = "closed" if self.clock.closed else "watching"
        if not self._company.leads:
            state += f", rank {self._company.rank}, not rank 0, which records"
        return f"<Watcher of {type(self.model).__name__}, {self.last_step:,} steps, {state}>"

    # How it begins

    def _begin(self, model: nn.Module) -> None:
        models = (model, self.model) if model is not self.model else (self.model,)
        self._listener.begin(models)
        _watchers[self.model] = weakref.ref(self)
        self._runner.announce_probe()

    def _end_others(self, run: Path | None) -> None:
        """End earlier watches: a model has one, and a folder has one that writes to it, the last that was begun."""
        for other in [w for reference in _watchers.values() if (w := reference()) is not None]:
            if other.model is self.model or (run is not None and _same(other.path, run)):
                other._end(measure=False)

    # How it goes on

    def _row_finished(self, row: Row, in_step: bool) -> None:
        row.examples, self._counted = self._training.examples - self._counted, self._training.examples
        if not self._company.alone:
            self._meet()
            self._compare(row)
        step = self._rows.add(row)
        if self._loop.rows.needed:
            self._within("rows of the data", self._loop.rows.step_ended)
        self._loop.step_ended(step, row.learning_rate)
        if self._listener.look_for_calls():
            self._hooks_taken = True
            self._recorder.note("hooks", HOOKS_TAKEN)
        if self._company.leads:
            self._runner.step_ended(row, step, in_step)
            self._within("checks", self._judge, step)
        elif not self._company.together:
            self._end(measure=False)
        else:
            self._runner.follow(step, in_step)
        self._listener.step_ended()

    @guarded("other ranks")
    def _meet(self) -> None:
        self._company.meet()
        self._rows.sharing, self._company.send = self._company.sharing, self._rows.drain
        self._runner.over_ranks.agreement = self._company.agreement

    @guarded("other ranks")
    def _compare(self, row: Row) -> None:
        if self._company.step_ended(row, self._steps.optimizers):
            self._loop.moment.changed.add("ranks")

    def _row_complete(self, table: Any, row: Row) -> None:
        self._recorder.row(table, row)
        self._live.row(table, row.optimizer)

    def _judge(self, step: int) -> None:
        self._live.step_ended(step, self.clock.elapsed(), news=self._loop.moment.changed)
        if self._findings.new:
            self._findings.tell()

    @guarded("measurements")
    def _measure_now(self, names: list[str]) -> None:
        self._finish_rows()
        self._runner.now(names)
        self._findings.tell()

    def _finish_rows(self) -> None:
        self._steps.finish(in_step=False)
        self._rows.drain(wait=True)

    @guarded("record")
    def _drain(self) -> None:
        self._rows.drain(wait=True)

    def _history(self) -> History | None:
        self._drain()
        here = self._live.whole_history if self._from_the_start else None
        return here if here is not None else self.run.history

    def _step_broke(self, error: Exception) -> None:
        self._internal_error("optimizer steps", error)

    def _internal_error(self, part: str, error: Exception) -> None:
        """Something of ours broke in `part`: record it once."""
        self._recorder.internal_error(self.last_step, part, error)

    # How it ends

    @unseen()
    def _end(self, measure: bool) -> None:
        if self.clock.closed:
            return
        try:
            self._last(measure and self._company.leads)
        finally:
            self.clock.closed = True
            self._release()

    def _last(self, measure: bool) -> None:
        """What there is still to record; what fails in one part keeps no other from being recorded."""
        self._finish_last()
        if measure:
            self._measure_last()
        if self._company.leads:
            self._judge_last()
            self._explain()

    @guarded("the last steps")
    def _finish_last(self) -> None:
        self._finish_rows()

    @guarded("the last measurements")
    def _measure_last(self) -> None:
        self._runner.last()

    @guarded("the last checks")
    def _judge_last(self) -> None:
        self._ending = True
        self._live.judge(self.last_step, last=True)
        self._findings.tell()

    @guarded("what was not measured")
    def _explain(self) -> None:
        self._runner.explain_unrun()
        for key, sentence in self._never_seen():
            self._recorder.note(key, sentence)

    def _never_seen(self) -> Iterable[tuple[str, str]]:
        if self._steps.steps == 0:
            yield "steps", NO_STEP_SEEN
        elif self._training.calls == 0:
            yield "inputs", NO_CALL
        elif (without := self._losses.without) and not self._hooks_taken:
            yield "no loss", NO_PASS_SEEN.format(of_the_steps(without, self._steps.steps, self._steps.steps))

    def _release(self) -> None:
        """Nothing is left on the model or in torch, and the files are closed."""
        broke = partial(self._internal_error, "the end")
        leave = partial(self._company.leave, self._why_ended)
        for work in (self._listener.remove, self._own_step.disarm, self._losses.close, self._close_record, leave):
            safely(work, broke=broke)
        safely(self._forget)

    def _close_record(self) -> None:
        self._recorder.close(self.last_step, self.clock)

    def _forget(self) -> None:
        if (known := _watchers.get(self.model)) is not None and known() is self:
            del _watchers[self.model]


def _number(value: Any) -> float | None:
    """A number of Python, NumPy or torch as a float; None for anything else."""
    try:
        plain = value.detach() if isinstance(value, Tensor) else value
        return None if isinstance(plain, (str, bytes)) else float(plain)
    except Exception:
        return None


def _same(a: Path, b: Path) -> bool:
    return os.path.realpath(a) == os.path.realpath(b)
