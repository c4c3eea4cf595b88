"""Measuring on a training step's own backward pass: the gradients of its examples, at its own parameters.

What asks for nothing but per-example gradients and labels (coherence, conflict) needs no passes of its own: the
step makes these gradients anyway. For one step the model's calls are recorded and its output gradients read; the
step itself runs as it is. What comes out is used only where it can be checked: backward() was called on a multiple
of one known loss function's value, the same as `loss_fn` gives on the model's outputs and the targets, and the
gradients of the examples add up to the gradient that the step has. Else the probe set is measured, with the reason.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diag.errors import DiagError, first_line
from diag.quantities import pause
from diag.quantities.batch import tensors_in
from diag.quantities.parameters import trainable
from diag.quantities.per_example import StepGradients, plan_for_steps
from diag.quantities.snapshot import Snapshot
from diag.registry import Instrument
from diag.watch.backwards import Backwards, SeenBackward
from diag.watch.capture import LOW_PRECISION, observed_loss
from diag.watch.hooks import INERT, compiled_wrappers, frames_compiled, is_transformed

ATTEMPTS = 3  # steps in a row that could not be read, before the probe set is used for good
LEAST = 8  # examples in a batch (our choice): fewer say little of an agreement
TOLERANCE = 1e-3
LOW_TOLERANCE = 3e-2  # where the step computes in half precision
GIVEN = {"per_example_gradients", "labels"}
ON_THE_STEP = (
    "Measured on the training batch of {:,} examples as the step saw it (dropout and augmentation included), at "
    "the parameters before its update, from its own backward pass."
)
ON_THE_PROBE = "Measured on the probe set: the training steps' own gradients are not used, because {}."
AT_ONCE = "Measured on the probe set, as no training step was at hand."


@dataclass(frozen=True)
class Read:
    """What one step gave: its examples' gradients, the labels where they are class numbers, and their number."""

    gradients: StepGradients
    labels: Tensor | None
    note: str

    def quantities(self) -> dict[str, Any]:
        """By glossary name."""
        found: dict[str, Any] = {"per_example_gradients": self.gradients}
        return found if self.labels is None else found | {"labels": self.labels}


class OwnStep:
    """Reads one training step when it is armed: the first micro-batch of it."""

    def __init__(self, instruments: Mapping[str, Instrument]) -> None:
        self._model: nn.Module | None = None
        self._able = {name for name, instrument in instruments.items() if _asks_for_gradients_alone(instrument)}
        self.names: list[str] = []  # what is to be measured on the next step
        self.over = False  # no step follows
        self.touched = False  # whether the step that is going on was armed
        self.refused = ""  # why no step is read any more
        self._reasons: dict[str, str] = {}  # the same, of one instrument
        self.backwards = Backwards()
        self._plan: Any = None
        self._step: StepGradients | None = None
        self._recording = self._clean = self._seen = False
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

    def leave(self, name: str, reason: str) -> None:
        """This instrument gave nothing on a step's gradients: from now on it is measured on the probe set."""
        self._reasons[name] = reason.rstrip(".")

    def note(self, name: str) -> str:
        """What a result on the probe set has to say for itself."""
        if name not in self._able:
            return ""
        reason = self.refused or self._reasons.get(name, "")
        return ON_THE_PROBE.format(reason) if reason else AT_ONCE

    def arm(self, names: list[str], snapshot: Snapshot) -> float:
        """Read the next step for these, unless it is refused; gives the time taken, in seconds."""
        began, self._model = time.perf_counter(), snapshot.model
        try:
            if self._is_compiled(self._model):
                self.refused = "the model is compiled"
            elif self._plan is None:
                self._plan = plan_for_steps(self._model, snapshot.batch_loss, snapshot.batches[0])
        except DiagError as error:
            self.refused = _clause(error)
        except Exception as error:  # a model that cannot run on a few examples, say
            self.refused = f"a few examples could not be run through the model ({first_line(error)})"
        if not self.refused:
            self.names, self._seen, self.touched = names, False, True
            self.backwards.look(True)
            self._handles = [
                self._model.register_forward_pre_hook(_Before(self), prepend=True, with_kwargs=True),
                self._model.register_forward_hook(_After(self), prepend=True, always_call=True),
            ]
        return time.perf_counter() - began

    def _is_compiled(self, model: nn.Module) -> bool:
        """Whether the model, a part or a wrapper of it is compiled: reading its calls would compile it anew."""
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
        if seen or size < LEAST or self._model is None:
            return
        try:
            step = StepGradients(self._model, self._plan, size)
            _guard(step._capture)
            step.__enter__()
        except Exception:  # this is in the middle of the training's own call; `backward_ends` finds no step
            return
        self._step, self._recording = step, True

    def forward_ends(self) -> None:
        """It has returned, or raised."""
        if self._recording and self._step is not None:
            self._recording = False
            self._step._capture.__exit__(None, None, None)

    @property
    def reading(self) -> bool:
        """Whether the forward pass of an armed step has been seen."""
        return self._seen

    def backward_begins(self) -> None:
        """A backward pass begins: gradients of earlier ones must not be in the way."""
        if self._step is not None:
            grads = [p.grad for p in self._parameters() if p.grad is not None]
            self._clean = not any(bool(g.any()) for g in grads)

    def backward_ends(self, loss_fn: Any) -> Read | None:
        """It has ended: what the step gave, or None."""
        seen, step = self.backwards.backward_done(), self._step
        self._step, self._seen = None, False
        self.disarm(keep_names=True)
        reason = f"no call with a batch of at least {LEAST} examples could be recorded" if step is None else ""
        if step is not None:
            step._capture.__enter__()  # what StepGradients leaves: recording ended with the forward pass
            step.__exit__(None, None, None)
            reason = self._why_not(step, seen, loss_fn)
        if step is None or seen is None or reason:
            self._failed(reason)
            return None
        self._failures = 0
        return Read(step, _labels(seen, step.num_examples), ON_THE_STEP.format(step.num_examples))

    def _why_not(self, step: StepGradients, seen: SeenBackward | None, loss_fn: Any) -> str:
        """Why what was read cannot be used; empty where every check holds."""
        if not self._clean:
            return "gradients were left over from an earlier backward pass"
        if seen is None:
            return "backward() was not called on a multiple of one loss function's value"
        found = observed_loss(seen.forward, seen.call)
        if isinstance(found, str):
            return found
        if loss_fn is None:
            return "the loss is the model's own"
        try:
            return _disagreement(step, self._parameters(), seen)
        except DiagError as error:
            return _clause(error)

    def _parameters(self) -> list[nn.Parameter]:
        return [] if self._model is None else list(trainable(self._model).values())

    def _failed(self, reason: str) -> None:
        self._failures += 1
        self._plan = None  # perhaps it was made for another kind of batch
        if self._failures >= ATTEMPTS:
            self.refused = reason

    def disarm(self, keep_names: bool = False) -> None:
        """Stop reading; nothing is left on the model."""
        self.forward_ends()
        for handle in self._handles:
            handle.remove()
        self._handles, self._step = [], None
        self.backwards.look(False)
        if not keep_names:
            self.names = []


class _Before:
    """The hook before an armed step's forward pass; a copy of the model carries nothing of it."""

    def __init__(self, own: OwnStep) -> None:
        self.own = own

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
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
            self.own.forward_ends()


def _asks_for_gradients_alone(instrument: Instrument) -> bool:
    needed = {need.quantity.name for need in instrument.needs if not need.optional}
    return "per_example_gradients" in needed and needed <= GIVEN


def _guard(capture: Any) -> None:
    """Let no error of the recording reach the training: the call that was asked for runs once in any case."""
    recorded = capture._call

    def call(name: str, func: Any, args: Any, kwargs: Any) -> Any:
        ran: list[Any] = []

        def once(*a: Any, **k: Any) -> Any:
            ran.append(None)
            ran[-1] = (func(*a, **k),)
            return ran[-1][0]

        if capture.__dict__.get("_broken"):
            return func(*args, **kwargs)
        try:
            return recorded(name, once, args, kwargs)
        except Exception:
            if ran and ran[0] is None:
                raise  # the training's own
            capture._broken = True
            capture.uses.clear()  # so that the step is seen to differ from the plan
            return ran[0][0] if ran else func(*args, **kwargs)

    capture._call = call


def _disagreement(step: StepGradients, parameters: list[nn.Parameter], seen: SeenBackward) -> str:
    """Why the examples' gradients are not those of the step; empty where they add up to its gradient."""
    expected = torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad.to_dense()).reshape(-1) for p in parameters]
    )
    if not bool(torch.isfinite(expected).all()):
        return "its gradient is not finite"
    low = seen.call.given.dtype in LOW_PRECISION or any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
    gap = torch.linalg.vector_norm(step.mean().to(expected) - expected)
    if not bool(gap <= (LOW_TOLERANCE if low else TOLERANCE) * torch.linalg.vector_norm(expected)):
        return "its examples' gradients do not add up to its gradient (an added term, or several processes)"
    return ""


def _labels(seen: SeenBackward, n: int) -> Tensor | None:
    targets = seen.call.targets
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.shape != (n,):
        return None
    return targets.detach() if int(targets.min()) >= 0 else None


def _clause(error: DiagError) -> str:
    text = str(error).split("; ")[0].rstrip(".")  # what to do about it is no part of the reason
    return text[0].lower() + text[1:]
