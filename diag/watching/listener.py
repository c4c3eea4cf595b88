"""The events of one training, passed on to those who observe it (see `hub.Listener`).

Each method is called in the middle of the training loop: nothing raises into it, and the time is counted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from diag.distributed.placement import is_spread
from diag.snapshot.batch import tensors_in
from diag.watching.guard import Clock, Guarded, guarded, safely
from diag.watching.hooks.hub import HUB
from diag.watching.hooks.model_hook import ModelHooks
from diag.watching.measure.runner import MeasurementRunner
from diag.watching.measure.training import Training
from diag.watching.measure.window import Windows
from diag.watching.observe.loop.observer import LoopObserver
from diag.watching.observe.losses import LossObserver
from diag.watching.observe.steps import StepObserver
from diag.watching.ranks.company import Company

FACTS_OF_LOOP, ROWS_OF_DATA = "facts of the loop", "rows of the data"


class TrainingListener(Guarded):
    """Receives the model's calls and the events of the hub, and picks what concerns this training.

    end(): the process ends.
    """

    def __init__(
        self,
        clock: Clock,
        failed: Callable[[str, Exception], None],
        training: Training,
        windows: Windows,
        runner: MeasurementRunner,
        company: Company,
        end: Callable[[], None],
    ) -> None:
        super().__init__(clock, failed)
        self._company = company
        self._training, self._runner, self._end = training, runner, end
        self._losses: LossObserver = training.losses
        self._steps: StepObserver = training.steps
        self._examples, self._own_step = windows.examples, runner.own_step
        self._loop: LoopObserver = training.loop
        self._moment, self._rows = self._loop.moment, self._loop.rows
        self._evaluated: tuple[Any, int] = (None, 0)
        self._hooks: ModelHooks | None = None
        self._thread: int | None = None  # the one that trains, by its last call of the model
        self._calls = self._silent = 0
        self._plain = False

    def begin(self, models: tuple[nn.Module, ...]) -> None:
        """Listen to the calls of these, the bare model last, and to the process."""
        self._loop.wrapped_by(models)
        self._hooks = ModelHooks(models, self.forward_called, self.evaluated, self.broke)
        HUB.add(self)

    def remove(self) -> None:
        """Listen no more; nothing is left on the model or in torch."""
        safely(HUB.remove, self, broke=self.broke)
        safely(self._loop.close, broke=self.broke)
        if self._hooks is not None:
            safely(self._hooks.remove, broke=self.broke)

    def step_ended(self) -> None:
        """A step is over: may the next one be what nearly every one is? Of a wrapper and the model in it each call
        is seen twice, and other ranks are told of each."""
        self._plain = self._company.alone and self._hooks is not None and self._hooks.single

    def look_for_calls(self) -> bool:
        """After a step without a call of the model: it may have been compiled since, or other code may have taken
        the hook away. True where that is so, and the hook is back."""
        silent = self._training.calls == self._calls
        self._calls = self._training.calls
        self._silent += silent
        # Looking goes through all objects of the process, so it is done ever more rarely.
        if silent and self._silent & (self._silent - 1) == 0 and self._hooks is not None:
            self._hooks.find_compiled()
        return silent and self._hooks is not None and self._hooks.put_back()

    # The model and its loss

    @guarded("inputs and outputs")
    def forward_called(self, args: Any, kwargs: Any, outputs: Any, module: nn.Module | None = None) -> None:
        """The model was called with gradients on."""
        self._thread = threading.get_ident()
        usual = self._plain and not self._moment.attentive and type(outputs) is Tensor
        if usual and self._losses.usual_call(outputs):
            self._called(args, kwargs, outputs)
            return
        if module is not self._training.model and module is not None:
            self._loop.wrapper_called(module)
        self._company.called(args, kwargs)
        if self._losses.forward_called(args, kwargs, outputs, module):
            self._called(args, kwargs, outputs)

    def _called(self, args: Any, kwargs: Any, outputs: Any) -> None:
        """It was another call in training."""
        if not self._training.calls:
            self.clock.start()
        self._steps.training_pass()
        if self._examples.looking:
            self._examples.forward_called(args, kwargs)
        self._training.called(_length(args, kwargs))
        nested = _has_nested(args, outputs)
        if nested:  # rows of several lengths, of which no check knows
            args, kwargs, outputs = (), {}, None
        self._within(FACTS_OF_LOOP, self._loop.forward_called, args, kwargs, outputs)
        if self._rows.needed and self._loop.drawn is not None and not nested:
            self._within(ROWS_OF_DATA, self._rows.training_call, args, kwargs, *self._loop.drawn)

    def evaluated(self, args: Any, kwargs: Any, outputs: Any, module: nn.Module) -> None:
        """The model was called without gradients."""
        last, self._evaluated = self._evaluated, (module, id(outputs))
        self._paused()
        if last[1] != id(outputs) or last[0] is module:  # a wrapper and the model in it are one call
            self._facts("evaluated", args, kwargs, outputs)

    @guarded("other ranks")
    def _paused(self) -> None:
        self._company.paused()

    def _closely(self, event: str, *args: Any) -> None:
        """An event that matters only at steps that are looked at closely."""
        if self._moment.attentive:
            self._facts(event, *args)

    @guarded(FACTS_OF_LOOP)
    def _facts(self, event: str, *args: Any) -> None:
        getattr(self._loop, event)(*args)

    def _is_here(self) -> bool:
        """Whether this thread is the one that trains: losses and backward passes say nothing of their model."""
        return self._thread is None or self._thread == threading.get_ident()

    @guarded("loss")
    def loss_called(self, function: Any, args: Any, kwargs: Any, value: Any) -> None:
        """A loss function returned `value`, with a graph."""
        if not self._is_here():
            return
        self._losses.loss_called(function, args, kwargs, value)
        if not self._company.alone:
            self._company.loss_called(args, kwargs)
        if self._rows.needed:
            self._within(ROWS_OF_DATA, self._rows.loss_called, function.__name__, args, kwargs)
        if self._moment.attentive:
            self._within(FACTS_OF_LOOP, self._loop.loss_called, function, args, kwargs, value)

    def further_loss_called(self, function: Any, args: Any, kwargs: Any) -> None:
        """A loss function of several tensors or of alignments returned a value with a graph."""
        if self._is_here():
            self._closely("further_loss_called", function, args, kwargs)

    def loss_evaluated(self, function: Any, args: Any, kwargs: Any, value: Any) -> None:
        """A loss function was called without gradients."""
        self._closely("loss_evaluated", function, args, kwargs, value)

    @guarded("loss")
    def loss_scaled(self, losses: Any, scaled: Any) -> None:
        """A GradScaler made `scaled` of `losses`."""
        if self._is_here():
            self._losses.loss_scaled(losses, scaled)
            self._closely("loss_scaled", losses, scaled)

    def zeroed(self, owner: Any) -> None:
        """An optimizer or a module throws its gradients away."""
        if self._losses.in_step:  # as after a step, nothing of the next one is lost otherwise
            self._thrown_away(owner)

    @guarded("loss")
    def _thrown_away(self, owner: Any) -> None:
        self._losses.zeroed(owner)

    @guarded("loss")
    def backward_called(self, roots: Any, weight: Any = None, inputs: Any = None) -> None:
        """A backward pass from `roots` begins."""
        if not self._is_here():
            return
        self._losses.backward_called(roots, weight, inputs)
        self._steps.backward_begins()
        if self._own_step.names:
            self._runner.own_step_descends()
        self._within(FACTS_OF_LOOP, self._loop.root_seen, roots)
        # What a loss is made of that is spread over processes lies on others, too.
        if self._moment.attentive and not any(map(is_spread, tensors_in(roots))):
            self._within(FACTS_OF_LOOP, self._loop.backward_called, roots)

    @guarded("loss")
    def backward_done(self) -> None:
        """It has ended."""
        if not self._is_here():
            return
        self._losses.backward_done()
        if self._moment.attentive:
            self._within(FACTS_OF_LOOP, self._loop.backward_done)
        if self._own_step.reading:
            self._runner.own_step_descended()
        self._steps.backward_done()

    # Gradients and optimizer steps

    @guarded("gradients before clipping")
    def before_clip(self, parameters: Any, max_norm: Any, total_norm: Any) -> Any:
        """Gradients are about to be clipped; what is returned comes back in `after_clip`."""
        self._closely("clipping", parameters, max_norm)
        return self._steps.gradients.before_clip(parameters, max_norm, total_norm)

    @guarded("gradients before clipping")
    def after_clip(self, token: Any) -> None:
        """They have been clipped."""
        self._steps.gradients.after_clip(token)

    @guarded("GradScaler")
    def unscaling(self, optimizer: Optimizer, scaler: Any) -> None:
        """A GradScaler is about to divide an optimizer's gradients by its scale."""
        self._steps.unscaling(optimizer, scaler)
        self._closely("unscaling", optimizer, scaler)

    @guarded("GradScaler")
    def scaler_stepping(self, optimizer: Optimizer) -> None:
        """A GradScaler is about to step the optimizer, or to leave the step out."""
        self._steps.scaler_stepping(optimizer)
        self._facts("scaler_stepping", optimizer)

    @guarded("GradScaler")
    def scaler_stepped(self, optimizer: Optimizer) -> None:
        """The step was made, or left out."""
        self._facts("scaler_stepped", optimizer)
        if self._counts(optimizer):
            self._steps.scaler_stepped(optimizer)

    @guarded("optimizer steps")
    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """An optimizer is about to step."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if self._moment.attentive:
            self._within(FACTS_OF_LOOP, self._loop.before_step, optimizer, callable(closure))
        if not self._counts(optimizer):
            return None
        self.clock.start()
        return self._steps.before_step(optimizer, args, kwargs)

    @guarded("optimizer steps")
    def after_step(self, optimizer: Optimizer) -> None:
        """It has stepped."""
        self._within(FACTS_OF_LOOP, self._loop.after_step, optimizer)
        if self._counts(optimizer):
            self._steps.after_step(optimizer)

    def _counts(self, optimizer: Optimizer) -> bool:
        return self._training.optimizer is None or optimizer is self._training.optimizer

    # Zeroing, schedules, data

    def has_zeroed(self, owner: Any) -> None:
        """Gradients were zeroed."""
        self._closely("zeroed", owner)

    def scheduler_stepped(self, scheduler: Any) -> None:
        """A learning-rate scheduler has stepped."""
        self._closely("scheduler_stepped", scheduler)

    def seeded(self, seed: Any) -> None:
        """`torch.manual_seed` was called."""
        self._facts("seeded", seed)

    def loader_started(self, loader: Any) -> None:
        """An epoch of a DataLoader begins."""
        self._paused()
        self._facts("loader_started", loader)

    def indices_drawn(self, iterator: Any, indices: Any) -> None:
        """A DataLoader has drawn the places of a batch."""
        self._facts("indices_drawn", iterator, indices)

    def batch_fetched(self, batch: Any, iterator: Any) -> None:
        """A DataLoader gave a batch."""
        self._facts("drawn_fetched", iterator)
        self._closely("batch_fetched", batch)

    # The process

    def broke(self, error: Exception) -> None:
        """Something failed between torch and the methods above."""
        self._broke("torch's calls", error)

    def close(self) -> None:
        """The process ends."""
        self._end()

    def abandon(self) -> None:
        """This is a forked child: stop without touching the record, which is the parent's."""
        self.clock.closed = True


def _has_nested(args: Any, outputs: Any) -> bool:
    """Whether the model was called on a nested tensor, or gave one."""
    for value in (*args, outputs):  # noqa: SIM110 - at every step, where a generator takes three times as long
        if isinstance(value, Tensor) and value.is_nested:
            return True
    return False


def _length(args: Any, kwargs: Any) -> int:
    if args and isinstance(args[0], Tensor) and args[0].ndim:
        return args[0].size(0)
    return next((t.size(0) for t in tensors_in((args, kwargs)) if t.ndim), 0)
