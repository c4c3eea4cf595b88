"""What the training loop shows of its micro-batches: inputs, outputs, targets and the loss.

A micro-batch is a call of the model in training followed by a backward pass that reaches it. Its loss is, in
this order: the value that the user gives to `watcher.loss(value)`; what a loss function of torch returned, if
exactly one led to the backward pass (a sum that the loop divides: the quotient); else what `backward()` was called
on, before a GradScaler scaled it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diag.snapshot.batch import tensors_in
from diag.watching.measure.probe import Probe
from diag.watching.observe.capture import ForwardCall, LossCall, ObservedLoss, detached, observed_loss
from diag.watching.observe.loss_calls import LossCalls, Pass
from diag.watching.observe.route import source_of

ATTEMPTS = 5
NOT_A_NUMBER = (
    "backward() is called on something other than one number, so its loss is not recorded; give it by "
    "watcher.loss(value)."
)
FROM_BACKWARD = (
    "The recorded loss is what backward() was called on, for {reason}; give watcher.loss(value) if something "
    "else is meant."
)
MOVED = (
    "The parameters were moved between two backward passes of one step, as SAM does: the recorded loss is that "
    "before the move, the recorded gradient the one that the optimizer was given."
)
# What Hugging Face models divide a summed loss by, a count for the whole step, is wrong for any other examples;
# without it they take the mean.
COUNT = "num_items_in_batch"

Note = Callable[[str, str], None]


class LossObserver:
    """Follows the micro-batches; learns the loss and fills the probe set from the first of them.

    loss_fn: the user's own, else it is learned. note(key, sentence): tell once what cannot be observed.
    info(key, sentence): the same of what is. parameters: those that are trained, which tell when losses belong to
    no step or to different points.
    """

    def __init__(
        self, loss_fn: Any, probe: Probe, note: Note, info: Note, parameters: Sequence[nn.Parameter] = ()
    ) -> None:
        self.loss_fn: Any = loss_fn
        self.learned = loss_fn is not None
        self.probe, self._note, self._info, self._parameters = probe, note, info, tuple(parameters)
        self._learning = not probe.complete or not self.learned
        self._attempts = 0
        self._forward: ForwardCall | None = None
        self._calls = LossCalls()
        self._pending: Pass | None = None
        self._forwards = self._reached = False
        self._losses: list[Tensor] = []
        self._descended: list[tuple[Tensor, Tensor]] = []
        self.descended: list[tuple[Tensor, Tensor]] = []  # of the last step: losses, and what was descended
        self._given: list[Any] = []
        self._frozen = self._add_up = False
        self._version = -1
        self._source: int | None = None
        self._hook: Any = None
        self._user_targets: Any = None
        if isinstance(loss_fn, nn.Module):
            self._hook = loss_fn.register_forward_hook(_ModuleHook(self))

    @property
    def settled(self) -> bool:
        """Whether the loss is known, or will not be."""
        return self.learned or not self._learning

    # What happens, in the order in which it happens.

    def forward_called(self, args: Any, kwargs: Any, outputs: Any) -> bool:
        """The model or a wrapper of it returned `outputs`. True where it was another call in training."""
        found = [outputs] if isinstance(outputs, Tensor) else tensors_in(outputs)
        tensor = next((t for t in found if t.requires_grad and not t.is_leaf), None)
        if tensor is None:
            return False
        # The hook tells whether a backward pass reaches this model; it returns None and so changes nothing.
        tensor.register_hook(self._output_reached)
        self._forwards = True
        if self._learning:
            try:
                self._forward = ForwardCall.of(args, kwargs, outputs)
            except LookupError as error:
                self._give_up(str(error))
        source, before = source_of(tensor), self._source
        self._source = source
        return source is None or source != before

    def loss_called(self, function: Callable[..., Any], args: Any, kwargs: Any, value: Tensor) -> None:
        """A loss function returned `value`."""
        if value.grad_fn is None:
            return
        call = LossCall.of(function, args, kwargs, value) if self._learning else None
        # Every loss module of torch gives its reduction by name.
        self._calls.add(value, call, summed=kwargs.get("reduction") == "sum")

    def loss_scaled(self, losses: Any, scaled: Any) -> None:
        """A GradScaler made `scaled` of `losses`."""
        if isinstance(losses, Tensor) and isinstance(scaled, Tensor) and scaled.grad_fn is not None:
            self._calls.scaled(losses, scaled)

    def backward_called(self, roots: Any) -> None:
        """A backward pass from `roots` begins."""
        roots = [roots] if isinstance(roots, Tensor) else [r for r in roots or () if isinstance(r, Tensor)]
        self._reached, self._pending = False, None
        self._leave_out_what_belongs_elsewhere()
        if len(roots) != 1 or roots[0].numel() != 1:
            if roots:
                self._note("loss root", NOT_A_NUMBER)
            return
        self._pending = self._calls.behind(roots[0])

    def backward_done(self) -> None:
        """The backward pass has ended; it counts if it reached this model."""
        pending, self._pending = self._pending, None
        if pending is None or (self._forwards and not self._reached):
            return
        if pending.reason:
            self._note("loss", FROM_BACKWARD.format(reason=pending.reason))
        if not self._frozen:
            self._losses.append(pending.value)
            self._add_up = pending.is_part
            if not pending.is_part:  # how many times the mean loss such a part is, is not known
                self._descended.append((pending.value, pending.root))
        if self._learning:
            self._learn(pending.value, pending.call, pending.reason)
        self._calls.clear()

    def give(self, value: Any) -> None:
        """The user's own word for the loss of this micro-batch."""
        self._given.append(value.detach() if isinstance(value, Tensor) else float(value))

    def freeze(self) -> None:
        """Later losses do not belong to this step: a closure is being evaluated again at other parameters."""
        self._frozen = True

    def take(self) -> list[Any]:
        """The losses of the micro-batches since the last step."""
        losses = self._given or ([sum(self._losses)] if self._add_up and self._losses else self._losses)
        self._given, self._losses, self._frozen = [], [], False
        self.descended, self._descended = self._descended, []
        return losses

    def close(self) -> None:
        """Let go of everything that belongs to the training loop."""
        if self._hook is not None:
            self._hook.remove()
        self._calls.clear()
        self._forward = self._pending = self._user_targets = None

    # How calls and backward passes are matched.

    def _output_reached(self, gradient: Tensor) -> None:
        self._reached = True

    def _leave_out_what_belongs_elsewhere(self) -> None:
        """Before a backward pass: which of the losses so far, and of those to come, belong to the step."""
        version = self._parameters[0]._version if self._parameters else -1
        if not self._losses or self._frozen:
            self._version = version
        elif version != self._version:
            self._frozen = True
            self._note("moved", MOVED)
        elif all(p.grad is None for p in self._parameters):
            # Their gradients were thrown away: a GAN's other half was training, or a step was given up.
            self._losses, self._descended = [], []

    # What is learned from the first micro-batches.

    def _learn(self, value: Tensor, call: LossCall | None, reason: str) -> None:
        forward, self._forward = self._forward, None
        if forward is None:
            return
        targets, known = self._targets(forward, call, value, reason)
        if known:
            kwargs = {name: value for name, value in forward.kwargs.items() if name != COUNT}
            self.probe.add(forward.args, kwargs, targets, forward.outputs)
        self._user_targets = None
        if self.probe.complete and self.learned:
            self._stop_learning()

    def _targets(self, forward: ForwardCall, call: LossCall | None, value: Tensor, reason: str) -> tuple[Any, bool]:
        """The targets that belong to this micro-batch, and whether they are known."""
        if isinstance(self.loss_fn, ObservedLoss):
            return (self.loss_fn.targets(forward, call), True) if call is not None else (None, False)
        if self.loss_fn is not None:
            return self._targets_of_users_loss(forward, call, value)
        if self.learned:
            return forward.kwargs.get("labels"), True
        return self._learn_loss(forward, call, reason)

    def _learn_loss(self, forward: ForwardCall, call: LossCall | None, reason: str) -> tuple[Any, bool]:
        found = observed_loss(forward, call) if call is not None else reason
        if isinstance(found, ObservedLoss):
            self.loss_fn, self.learned = found, True
            self._info("loss function", f"The loss was observed: {found.describe()}.")
            for note in found.notes:
                self._note("reduction", f"{note[0].upper()}{note[1:]}.")
            return found.targets(forward, call), True  # type: ignore[arg-type]
        if _carries_loss(forward.outputs):
            self.learned = True
            self._info("loss function", "The loss is the one that the model returns with its outputs.")
            return forward.kwargs.get("labels"), True
        self._attempts += 1
        if self._attempts >= ATTEMPTS:
            self._give_up(found)
        return None, False

    def _targets_of_users_loss(
        self, forward: ForwardCall, call: LossCall | None, value: Tensor
    ) -> tuple[Any, bool]:
        candidates = [self._user_targets, call.targets if call is not None else None]
        for targets in [c for c in candidates if c is not None]:
            try:
                with torch.no_grad():
                    got = self.loss_fn(forward.outputs, targets)
                if torch.allclose(got.double(), value.double(), rtol=2e-2, equal_nan=True):
                    return targets, True
            except Exception:
                continue
        self._attempts += 1
        if self._attempts >= ATTEMPTS:
            self._note("probe", "The targets that belong to loss_fn= were not seen; give probe=(inputs, targets).")
            self._stop_learning()
        return None, False

    def _give_up(self, reason: str) -> None:
        if not self._learning:
            return
        self._note("loss function", f"The loss cannot be measured again: {reason}; give loss_fn= and probe=.")
        self._stop_learning()

    def _stop_learning(self) -> None:
        self._learning = False
        self.probe.complete = True
        self._forward = None
        # What was kept of the calls while learning holds inputs and outputs.
        self._calls.forget_contents()


class _ModuleHook:
    """Sees the targets that a loss module is called with; a copy of the module carries nothing of it."""

    def __init__(self, observer: LossObserver) -> None:
        self._observer = observer

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and self._observer._learning and len(args) > 1:
            self._observer._user_targets = detached(args[1])

    def __reduce__(self) -> Any:
        from diag.watching.hooks.model_hook import INERT

        return INERT


def _carries_loss(outputs: Any) -> bool:
    loss = outputs.get("loss") if hasattr(outputs, "get") else getattr(outputs, "loss", None)
    return isinstance(loss, Tensor)
