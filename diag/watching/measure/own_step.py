"""Measuring on a training step's own backward pass: the gradients of its examples, at its own parameters.

What asks for nothing but per-example gradients and labels (coherence, conflict) needs no passes of its own: the
step makes these gradients anyway. For one step the model's calls are recorded and its output gradients read; the
step itself runs as it is. Which queries will be asked is found by a dry run when the backward pass begins, and they
are answered while it runs, so that no activation is held longer than training holds it. What comes out is used
only where it can be checked (see `step_check`). Else the probe set is measured, with the reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from diag.errors import DiagError, Unsupported, first_line
from diag.gradients import GroupSums, PerExampleGradients, StepGradients, plan_for_steps
from diag.gradients.dry_run import queries_of
from diag.gradients.queries import Query
from diag.linalg.deadline import Deadline
from diag.registry import Instrument
from diag.result import Outcome
from diag.snapshot import pause
from diag.snapshot.batch import tensors_in
from diag.snapshot.parameters import trainable
from diag.snapshot.snapshot import Snapshot
from diag.snapshot.state.modes import unseen
from diag.snapshot.state.tensors import hearing
from diag.watching.guard import safely
from diag.watching.hooks.model_hook import INERT, compiled_wrappers, frames_compiled, is_transformed
from diag.watching.measure.step_check import as_clause, why_not_the_steps
from diag.watching.observe.capture import SeenBackward, SeenLossCall

UNREADABLE_STEPS = 3  # steps in a row that could not be read, before the probe set is used for good
FEWEST_IN_BATCH = 8  # examples in a batch (our choice): fewer say little of an agreement
GRADIENTS = "per_example_gradients"
FROM_OWN_STEP = {GRADIENTS, "labels"}
ON_THE_STEP = (
    "Measured on the training batch of {:,} examples as the step saw it (dropout and augmentation included), at "
    "the parameters before its update, from its own backward pass."
)
ON_THE_PROBE = "Measured on the probe set: the training steps' own gradients are not used, because {}."
NO_STEP_AT_HAND = "Measured on the probe set, as no training step was at hand."

Measure = Callable[[str, Mapping[str, Any]], Outcome]


@dataclass(frozen=True)
class Read:
    """What one step gave: its examples' gradients, and what can be measured on by glossary name."""

    gradients: StepGradients
    quantities: dict[str, Any]
    note: str


class OwnStep:
    """Reads one training step when it is armed: the first micro-batch of it.

    measure(name, quantities): what the instrument gives on quantities by glossary name.
    """

    def __init__(self, instruments: Mapping[str, Instrument], measure: Measure) -> None:
        self._model: nn.Module | None = None
        self._able = {name for name, instrument in instruments.items() if _asks_for_gradients_alone(instrument)}
        self.names: list[str] = []  # what is to be measured on the next step
        self.limit = inf  # seconds that reading it may take
        self.over = False  # no step follows
        self.touched = False  # whether the step that is going on was armed
        self.refused = ""  # why no step is read any more
        self._reasons: dict[str, str] = {}  # the same, of one instrument
        self._measure = measure
        self._unplanned: set[str] = set()  # those that ask more than they did in the dry run
        self._plan: Any = None
        self._step: StepGradients | None = None
        self._clean = self._seen = False
        self._failures = self._frames = 0
        self._wrapped = False
        self._handles: list[Any] = []

    @property
    def armed(self) -> bool:
        """Whether the next step is to be read, or is being read."""
        return bool(self.names)

    def choose(self, names: Iterable[str]) -> tuple[list[str], list[str]]:
        """Of the measurements that are due: those to make now, and those to make on the next step's gradients."""
        names = list(names)
        if self.refused:
            return names, []
        later = [name for name in names if self.reads(name)]
        return [name for name in names if name not in later], [] if self.armed else later

    def reads(self, name: str) -> bool:
        """Whether this instrument is measured on the training steps that come."""
        return self.has_course(name) and not self.over

    def has_course(self, name: str) -> bool:
        """Whether what has been measured with this instrument was measured on training steps."""
        return name in self._able and not self.refused and name not in self._reasons

    def leave(self, name: str, reason: str, read: Read) -> None:
        """This instrument gave nothing on a step's gradients: from now on it is measured on the probe set, but
        where it asked something that was not planned, which the next step will be kept for."""
        if read.gradients.unplanned and name not in self._unplanned:
            self._unplanned.add(name)
        else:
            self._reasons[name] = reason.rstrip(".")

    def note(self, name: str) -> str:
        """The note of a result on the probe set: why it is not from a training step."""
        if name not in self._able:
            return ""
        reason = self.refused or self._reasons.get(name, "")
        return ON_THE_PROBE.format(reason) if reason else NO_STEP_AT_HAND

    def arm(self, names: list[str], snapshot: Snapshot) -> float:
        """Read the next step for these, unless it is refused; gives the time taken, in seconds."""
        began, self._model = time.perf_counter(), snapshot.model
        try:
            if self._is_compiled(self._model):
                self.refused = "the model is compiled"
            elif self._plan is None:
                self._plan_for(self._model, snapshot)
        except DiagError as error:
            self.refused = as_clause(error)
        except Exception as error:  # a model that cannot run on a few examples, say
            self.refused = f"a few examples could not be run through the model ({first_line(error)})"
        if not self.refused:
            self.names, self._seen, self.touched = names, False, True
            self._handles = [
                self._model.register_forward_pre_hook(_Before(self), prepend=True, with_kwargs=True),
                self._model.register_forward_hook(_After(self), prepend=True, always_call=True),
            ]
        return time.perf_counter() - began

    def _plan_for(self, model: nn.Module, snapshot: Snapshot) -> None:
        with hearing() as said, snapshot.undisturbed():
            self._plan = plan_for_steps(model, snapshot.batch_loss, *snapshot.cuttable(snapshot.batches[:1]))
        if said:
            self.refused = as_clause(Unsupported(said[0]))

    def _is_compiled(self, model: nn.Module) -> bool:
        """Whether the model, a part or a wrapper of it is compiled: reading its calls would compile it again."""
        if frames_compiled() != self._frames:  # finding the wrappers takes a tenth of a second
            self._frames = frames_compiled()
            self._wrapped = bool(compiled_wrappers(model))
        return self._wrapped or any(
            getattr(m, "_compiled_call_impl", None) is not None or type(m).__name__ == "OptimizedModule"
            for m in model.modules()
        )

    # What happens in the armed step, in order.

    def forward_begins(self, inputs: Any) -> None:
        """The model is about to be called in training: record its calls."""
        size = next((t.shape[0] for t in tensors_in(inputs) if t.ndim), 0)
        seen, self._seen = self._seen, True
        if seen or size < FEWEST_IN_BATCH or self._model is None:
            return
        try:
            step = StepGradients(self._model, self._plan, size)
            step.deadline = Deadline(self.limit)
            step.__enter__()
        except Exception:  # this is in the middle of the training's own call; `backward_ends` finds no step
            return
        self._step = step

    def forward_ends(self) -> None:
        """It has returned, or raised."""
        if self._step is not None:
            self._step.end_forward()

    @property
    def reading(self) -> bool:
        """Whether the forward pass of an armed step has been seen."""
        return self._seen

    def backward_begins(self, call: SeenLossCall | None) -> float:
        """A backward pass begins; gives the time taken, in seconds. call: what it is a multiple of, if known."""
        began = time.perf_counter()
        if self._step is not None:
            self._step.deadline.restart(self.limit)
            # Gradients of earlier passes must not be in the way.
            grads = [p.grad for p in self._parameters() if p.grad is not None]
            self._clean = not any(bool(g.any()) for g in grads)
            if self._unplanned.isdisjoint(self.names):  # else all is kept, and asked afterwards
                self._step.ask_only(self._queries(self._step, call))
        return time.perf_counter() - began

    def _queries(self, step: StepGradients, call: SeenLossCall | None) -> list[Query]:
        """All that will be asked of the step, so that the backward pass can answer it and nothing need be kept."""
        if call is None or not self._clean:
            return []  # it will not be used
        step_quantities = _quantities(step, call)
        asked = [_everyone(step)]
        for name in self.names:
            asked += queries_of(partial(self._rehearse, name, step_quantities), step)
        return asked

    def _rehearse(self, name: str, step_quantities: Mapping[str, Any], gradients: PerExampleGradients) -> None:
        self._measure(name, {**step_quantities, GRADIENTS: gradients})

    def backward_ends(self, seen: SeenBackward | None, loss_fn: Any) -> Read | None:
        """It has ended: what the step gave, or None. seen: the calls that it came from, if they are known."""
        step = self._step
        self._step, self._seen = None, False
        self.disarm(keep_names=True)
        reason = (
            f"no call with a batch of at least {FEWEST_IN_BATCH} examples could be recorded" if step is None else ""
        )
        if step is not None:
            step.__exit__(None, None, None)
            reason = why_not_the_steps(step, seen, loss_fn, self._clean, self._parameters())
        if step is None or seen is None or reason:
            self._failed(reason)
            return None
        self._failures = 0
        return Read(step, _quantities(step, seen.call), ON_THE_STEP.format(step.num_examples))

    def _parameters(self) -> list[nn.Parameter]:
        return [] if self._model is None else list(trainable(self._model).values())

    def _failed(self, reason: str) -> None:
        self._failures += 1
        self._plan = None  # perhaps it was made for another kind of batch
        if self._failures >= UNREADABLE_STEPS:
            self.refused = reason

    def disarm(self, keep_names: bool = False) -> None:
        """Stop reading; nothing is left on the model."""
        self.forward_ends()
        for handle in self._handles:
            handle.remove()
        self._handles, self._step = [], None
        if not keep_names:
            self.names = []


class _Before:
    """The hook before an armed step's forward pass; a copy of the model carries nothing of it."""

    def __init__(self, own: OwnStep) -> None:
        self.own = own

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        safely(self._begins, module, args, kwargs)

    @unseen()
    def _begins(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        ours = module is self.own._model and not pause.is_measuring()
        plainly = torch._C._current_graph_task_id() == -1 and not is_transformed((args, kwargs))
        if ours and plainly and torch.is_grad_enabled():
            self.own.forward_begins((args, kwargs))

    def __reduce__(self) -> Any:
        return INERT


class _After(_Before):
    """The hook after it, which runs also where the forward pass raised."""

    def __call__(self, module: nn.Module, args: Any, outputs: Any) -> None:
        if module is self.own._model:
            safely(self._ends)

    @unseen()
    def _ends(self) -> None:
        self.own.forward_ends()


def _asks_for_gradients_alone(instrument: Instrument) -> bool:
    needed = {need.quantity.name for need in instrument.needs if not need.optional}
    return GRADIENTS in needed and needed <= FROM_OWN_STEP


def _quantities(step: StepGradients, call: SeenLossCall) -> dict[str, Any]:
    """What a step gives to measure on, by glossary name: its gradients, and labels where they are class numbers."""
    step_quantities, targets = {GRADIENTS: step}, call.targets
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.shape != (step.num_examples,):
        return step_quantities
    return step_quantities | {"labels": targets.detach()} if int(targets.min()) >= 0 else step_quantities


def _everyone(step: StepGradients) -> Query:
    """What the mean gradient comes from."""
    return GroupSums((tuple(range(step.num_examples)),))
