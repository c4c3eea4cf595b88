"""What the training loop shows of its micro-batches: inputs, outputs, targets and the loss.

A micro-batch is a call of the model in training followed by a backward pass that reaches it. The loss of a step is
what it descends: the sum over its micro-batches of what `backward()` was called on, before a GradScaler scaled it,
and of that only the terms that depend on this model. A value given by `watcher.loss(value)` comes before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diag.distributed.placement import is_spread
from diag.errors import named
from diag.snapshot.batch import tensors_in
from diag.snapshot.state.modes import doubtful_modes
from diag.watching.guard import safely, shielded
from diag.watching.measure.probe import Probe
from diag.watching.observe.capture import (
    ForwardCall,
    ObservedLoss,
    SeenBackward,
    SeenLossCall,
    detached,
    losses_among,
    settings_now,
    units_of,
)
from diag.watching.observe.learning import Learner, Note
from diag.watching.observe.loss_calls import LossCalls, Pass, SeenValue, number_of
from diag.watching.observe.route import part_of, source_of
from diag.watching.observe.terms import reaches

MODEL_CALLS_KEPT = 8  # of the model that are kept while the loss is learned
OUTPUTS = 4  # of a call that are listened to
NOT_A_NUMBER = (
    "backward() is called on something other than one number, so its loss is not recorded; give it by "
    "watcher.loss(value)."
)
NOT_ONE_NUMBER = "backward() is called on something other than one number"
IN_PARTS = "backward() is called on a distributed tensor, which no process can read alone"
FROM_BACKWARD = (
    "The recorded loss is what backward() was called on, for {reason}; give watcher.loss(value) if something "
    "else is meant."
)
LOSS_MOVED = (
    "The parameters were moved between two backward passes of one step, as SAM does: the recorded loss is that "
    "before the move, the recorded gradient the one that the optimizer was given."
)
INSIDE_A_MODE = (
    "The training runs inside {}, a mode that sees every operation and may change what it gives; diag's own "
    "operations are hidden from it, and what is measured outside of it is the network without it."
)
NESTED = "the model is called on nested tensors, or gives them"
OTHER_PARAMETERS = "the model is called with other parameters than its own, as in torch.func.functional_call"


class LossObserver:
    """Follows the micro-batches of every step.

    loss_fn: the user's own, else it is learned. note(key, sentence): tell once what cannot be observed.
    info(key, sentence): the same of what is. parameters: those that are trained, which tell when losses belong to
    no step or to different points.
    """

    def __init__(
        self, loss_fn: Any, probe: Probe, note: Note, info: Note, parameters: Sequence[nn.Parameter] = ()
    ) -> None:
        self.learner = Learner(loss_fn, probe, note, info)
        self.probe, self._note, self._info, self._parameters = probe, note, info, tuple(parameters)
        self._own = {id(p) for p in self._parameters}
        self._reached_hook = shielded(self._output_reached)
        self._calls = LossCalls()
        self._forwards: deque[ForwardCall] = deque(maxlen=MODEL_CALLS_KEPT)
        self._sources: deque[int] = deque(maxlen=MODEL_CALLS_KEPT * OUTPUTS)
        self._places: dict[int, int] = {}  # of the step's outputs, by the number of the graph node, which of them
        self._foreign = ""  # why the last call of the model is none to learn from
        self._pending: Pass | None = None
        self._called = self._reached = self._unheard = False
        # Graph nodes of the pass that goes on, where it may reach what is not listened to.
        self._roots: list[Any] = []
        self._passes: list[Pass] = []
        self.closely = False  # whether the calls of this step are kept whole, since its gradients are read
        self.seen: SeenBackward | None = None  # of the last backward pass of such a step
        self.descended: list[tuple[Any, Any]] = []  # of the last step: losses, and what was descended
        self._reported: list[Any] = []
        self.without = 0  # steps before which no backward pass was seen
        self._zeroed: list[Any] = []  # what has thrown gradients away since the last backward pass
        self._frozen = self._moved = False
        # The loss function and the form of its call whose value as it is this step descends, and the last did.
        self._usual: tuple[str, Any] | None = None
        self._last: tuple[str, Any] | None = None
        self._version = -1
        self._source: int | None = None
        self._place: tuple[nn.Module | None, nn.Module | None, str] = (None, None, "")
        self._hook: Any = None
        if isinstance(loss_fn, nn.Module):
            self._hook = loss_fn.register_forward_hook(_ModuleHook(self.learner))

    @property
    def loss_fn(self) -> Any:
        """The loss as a function of outputs and targets, where it is known."""
        loss = self.learner.loss
        if self.learner.users_loss is not None:
            return self.learner.users_loss
        return loss if isinstance(loss, ObservedLoss) else None

    @property
    def objective(self) -> Any:
        """What snapshots of this training are given as their loss."""
        return self.learner.loss

    @property
    def learned(self) -> bool:
        """Whether the loss is known."""
        return self.learner.learned

    @property
    def settled(self) -> bool:
        """Whether the loss is known, or will not be."""
        return self.learner.settled

    @property
    def in_step(self) -> bool:
        """Whether a backward pass has gone through whose gradients no step has used yet."""
        return bool(self._passes)

    # What happens, in the order in which it happens.

    def forward_called(self, args: Any, kwargs: Any, outputs: Any, module: nn.Module | None = None) -> bool:
        """The model or a wrapper of it returned `outputs`. True where it was another call in training."""
        one = type(outputs) is Tensor
        found = [outputs] if one else tensors_in(outputs)
        found = [t for t in found if t.requires_grad and not t.is_leaf][:OUTPUTS]
        if not found or not self._trains():
            return False
        for i, tensor in enumerate(found):
            # The hook tells whether a backward pass reaches this model; it returns None and so changes nothing.
            tensor.register_hook(self._reached_hook)
            number = number_of(tensor)
            self._sources.append(number)
            self._places[number] = i
        self._called = True
        if modes := doubtful_modes():
            self._note("modes", INSIDE_A_MODE.format(named([type(mode).__name__ for mode in modes])))
        for place, loss in () if one else losses_among(outputs):
            self._calls.add(SeenValue(number_of(loss), loss.detach().clone(), "", place=place))
        self._foreign = OTHER_PARAMETERS if self._is_swapped(module) else ""
        if (self.learner.active or self.closely) and not self._foreign:
            self._keep(args, kwargs, outputs)
        source, before = source_of(found[0]), self._source
        self._source = source
        return source is None or source != before

    def usual_call(self, outputs: Tensor) -> bool:
        """The same for what nearly every call is, where no wrapper of the model is listened to and nothing is
        learned any more: one tensor. False, and nothing done, for any other."""
        node = outputs.grad_fn
        if node is None or self.learner.active or self.closely or not self._trains():
            return False
        number = node._sequence_nr()
        if number == self._source:
            return False
        # Where the last step's loss was called on the outputs this one's will be, which says that they are reached.
        if self._last is not None and self._last[1][0] is not None and not self._passes:
            self._unheard = True
        else:
            outputs.register_hook(self._reached_hook)
        self._sources.append(number)
        self._places[number] = 0
        self._source, self._called, self._foreign = number, True, ""
        return True

    def loss_called(self, function: Any, args: Any, kwargs: Any, value: Tensor) -> None:
        """A loss function returned `value`."""
        if value.grad_fn is None:
            return
        # Every loss module of torch gives its reduction by name.
        count = units_of(function, args, kwargs) if kwargs.get("reduction") == "sum" else None
        whole = self.learner.active or self.closely
        # The loop may scale it in place, so it is read or copied now.
        at_once = value.is_cpu and value.ndim == 0 and not whole and value.is_floating_point()
        kept = value.item() if at_once else value.detach().clone()
        call = SeenLossCall.of(function, args, kwargs, kept) if isinstance(kept, Tensor) and whole else None
        self._calls.add(
            SeenValue(number_of(value), kept, function.__name__, call, count, form=self._form(args, kwargs))
        )

    def _form(self, args: Any, kwargs: Any) -> Any:
        """What tells a loss function's call from others of the same: the output, which part of it, the settings."""
        prediction = args[0] if args else kwargs["input"]
        found = part_of(prediction, self._places)
        where = None if found is None else (self._places[found[0]], found[1])
        return where, settings_now(args, kwargs)

    def loss_scaled(self, losses: Any, scaled: Any) -> None:
        """A GradScaler made `scaled` of `losses`."""
        if isinstance(losses, Tensor) and isinstance(scaled, Tensor) and scaled.grad_fn is not None:
            self._calls.scaled(losses, scaled)

    def zeroed(self, owner: Any) -> None:
        """An optimizer or a module has thrown its parameters' gradients away."""
        if self._passes and not self._frozen:
            self._zeroed.append(owner)

    def backward_called(self, roots: Any, weight: Any = None, inputs: Any = None) -> None:
        """A backward pass from `roots` begins, in the direction of `weight`, to `inputs` alone if there are any."""
        if type(roots) is Tensor and weight is None and inputs is None and self._usual_backward(roots):
            return
        roots = [roots] if isinstance(roots, Tensor) else [r for r in roots or () if isinstance(r, Tensor)]
        self._reached, self._pending, self.seen, self._usual = False, None, None, None
        self._roots = [r.grad_fn for r in roots] if self._unheard else []
        self._leave_out_what_belongs_elsewhere()
        if not roots or self._leaves_out_this_model(inputs):
            return
        if len(roots) != 1 or roots[0].numel() != 1:
            self._pending = Pass(None, None, NOT_ONE_NUMBER)
            return
        if is_spread(roots[0]):
            self._pending = Pass(None, None, IN_PARTS)
            return
        found = self._calls.behind(roots[0], self._concerns)
        self._pending = _weighted(found, weight)

    def _usual_backward(self, root: Tensor) -> bool:
        """The same for what nearly every pass is: the first of its step, from the value of the last loss function's
        call as it is. False, and nothing done, for any other."""
        if self._passes or self._frozen or (found := self._calls.just_called(root)) is None:
            return False
        seen = found.seen
        on_outputs = seen is not None and seen.form is not None and seen.form[0] is not None
        if self._unheard and not on_outputs:
            return False
        self._reached, self._pending, self.seen = on_outputs, found, None
        self._usual = None
        if seen is not None and seen.call is seen.count is seen.place is None:
            self._usual = seen.name, seen.form
        self._zeroed, self._version = [], self._parameters[0]._version
        return True

    @property
    def descending(self) -> SeenLossCall | None:
        """The loss function's call that the backward pass which goes on is a multiple of, where it was kept."""
        return None if self._pending is None else _call_of(self._pending)

    def backward_done(self) -> None:
        """The backward pass has ended; it counts if it reached this model."""
        pending, self._pending = self._pending, None
        roots, self._roots = self._roots, []
        if pending is None or (self._called and not (self._reached or self._reaches(roots))):
            return
        self.seen = self._seen_whole(pending) if self.closely else None
        if pending.value is None:
            self._note("loss root", NOT_A_NUMBER)
        elif pending.reason:
            self._info("loss", FROM_BACKWARD.format(reason=pending.reason))
        if not self._frozen:
            self._passes.append(pending)
            if self.learner.active:
                self.learner.stage(pending, self._foreign or self._forward_behind(pending))

    def give(self, value: Any) -> None:
        """The user gives the loss of this micro-batch."""
        self._reported.append(value.detach() if isinstance(value, Tensor) else float(value))

    def freeze(self) -> None:
        """Later losses do not belong to this step: a closure is being evaluated again at other parameters."""
        self._frozen = True

    def take(self) -> list[Any]:
        """The losses of the step that has been made: one for what it descended, or those that the user gave."""
        passes, self._passes = self._passes, []
        if len(passes) == 1 and self._usual is not None and self._usual == self._last and self._is_plain():
            (one,), losses, self._reported = passes, self._reported, []
            self.descended = [(_unmultiplied(one), one.value)]
            self._usual = None
            self._places.clear()
            self._calls.clear()
            return losses or [one.value]
        if self._moved:
            self._note("moved", LOSS_MOVED)
        self.without += not (passes or self._reported)
        values = [p.value for p in passes if p.value is not None]
        whole = [sum(values[1:], values[0])] if values and len(values) == len(passes) else []
        losses, self._reported = self._reported or whole, []
        self.descended = [(_unmultiplied(p), p.value) for p in passes if p.value is not None]
        learned = not self.learner.active
        self.learner.stepped(passes)
        self._forget_the_step()
        self._last, self._usual = self._usual if learned and len(passes) == 1 else None, None
        return losses

    def _is_plain(self) -> bool:
        """Whether nothing else happened in the step, and no call was kept: where it descends what the last one did,
        there is nothing in it to learn."""
        return not (self._frozen or self._zeroed or self._forwards or self.learner.active)

    def close(self) -> None:
        """Let go of everything that belongs to the training loop."""
        if self._hook is not None:
            self._hook.remove()
        self.learner.forget()
        self.learner.user_targets = self._pending = self.seen = None
        self._passes = []
        self._forget_the_step()

    # How calls and backward passes are matched.

    def _trains(self) -> bool:
        """Whether any parameter is trained; the first one, in most networks."""
        own = self._parameters
        return bool(own) and (own[0].requires_grad or any(p.requires_grad for p in own))

    def _output_reached(self, gradient: Tensor) -> None:
        self._reached = True

    def _keep(self, args: Any, kwargs: Any, outputs: Any) -> None:
        if any(t.is_nested for t in tensors_in((args, kwargs, outputs))):
            self.learner.give_up(NESTED)
            return
        try:
            self._forwards.append(ForwardCall.of(args, kwargs, outputs))
        except LookupError as error:
            self.learner.give_up(str(error))
        except RecursionError:
            self.learner.give_up("the model's outputs hold themselves")

    def _is_swapped(self, module: nn.Module | None) -> bool:
        """Whether the call that has just ended used tensors in place of the model's own parameters."""
        if module is None or not self._own:
            return False
        first = self._first_of(module)
        return first is not None and not (first.is_leaf and isinstance(first, nn.Parameter))

    def _first_of(self, module: nn.Module) -> Tensor | None:
        """The first trainable tensor among a module's parameters; where it was last time is looked at first."""
        known, owner, name = self._place
        first = owner._parameters.get(name) if known is module and owner is not None else None
        if first is not None and first.requires_grad:
            return first
        for part in module.modules():
            if isinstance(part, torch.jit.ScriptModule):
                continue
            for name, p in part._parameters.items():
                if p is not None and p.requires_grad:
                    self._place = (module, part, name)
                    return p
        return None

    def _forward_behind(self, seen: Pass) -> ForwardCall | str:
        """The call of the model whose outputs the loss was called on, else the last."""
        if not self._forwards:
            return "no call of the model was seen before it"
        call = None if seen.seen is None else seen.seen.call
        if call is None:
            return self._forwards[-1]
        behind = [f for f in self._forwards if f.leads_to(call)]
        return behind[-1] if behind else self._forwards[-1]

    def _seen_whole(self, done: Pass) -> SeenBackward | None:
        """Of a step that is looked at closely: the loss function's call, and the model's if it is the first."""
        call = _call_of(done)
        if call is None or not self._forwards or self._forward_behind(done) is not self._forwards[0]:
            return None
        return SeenBackward(call, self._forwards[0])

    def _reaches(self, roots: list[Any]) -> bool:
        """Whether the pass reached this model, as its graph says of outputs that were not listened to."""
        nodes, sources = [node for node in roots if node is not None], set(self._sources)
        return bool(nodes) and reaches(nodes, sources, ()) is not False

    def _concerns(self, node: Any) -> bool | None:
        return reaches([node], set(self._sources), self._own)

    def _leaves_out_this_model(self, inputs: Any) -> bool:
        if inputs is None:
            return False
        tensors = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        return bool(tensors) and not any(id(t) in self._own for t in tensors)

    def _leave_out_what_belongs_elsewhere(self) -> None:
        """Before a backward pass: which of the losses so far, and of those to come, belong to the step."""
        version = self._parameters[0]._version if self._parameters else -1
        zeroed, self._zeroed = self._zeroed, []
        if not self._passes or self._frozen:
            self._version = version
        elif version != self._version:
            self._frozen = self._moved = True
        elif self._are_gone(zeroed):
            # Their gradients were thrown away: a GAN's other half was training, or a step was given up.
            self._passes = []
            self.learner.forget()

    def _are_gone(self, zeroed: Iterable[Any]) -> bool:
        dropped: set[int] = set()
        for owner in zeroed:
            groups = getattr(owner, "param_groups", None)
            held = owner.parameters() if groups is None else (p for group in groups for p in group["params"])
            dropped |= {id(p) for p in held}
        return all(p.grad is None or id(p) in dropped for p in self._parameters)

    def _forget_the_step(self) -> None:
        self._frozen = self._moved = False
        self._zeroed = []
        self._places.clear()
        self._calls.clear()  # what is kept of the calls while learning holds inputs and outputs
        self._forwards.clear()


def _weighted(found: Pass, weight: Any) -> Pass:
    """The pass in the direction of a number that backward() was given."""
    if isinstance(weight, (tuple, list)):
        weight = weight[0] if len(weight) == 1 else None
    if not isinstance(weight, Tensor) or weight.numel() != 1 or found.value is None:
        return found
    number = weight.detach().reshape(())
    factor = found.factor * (float(number) if number.device.type == "cpu" else number)
    return found._replace(value=found.value * number, factor=factor)


def _call_of(seen: Pass) -> SeenLossCall | None:
    """The loss function's call that a pass descends a constant multiple of."""
    return None if seen.reason or seen.seen is None else seen.seen.call


def _unmultiplied(seen: Pass) -> Any:
    """The loss function's own value, where it is all that the pass descends."""
    if seen.reason or seen.seen is None or not seen.seen.is_one:
        return seen.value
    value = seen.seen.mean
    return value if seen.seen.count is None else value / seen.seen.count


class _ModuleHook:
    """Sees the targets that a loss module is called with; a copy of the module carries nothing of it."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            safely(self._called, args)

    def _called(self, args: Any) -> None:
        if self._learner.active and len(args) > 1:
            self._learner.user_targets = detached(args[1])

    def __reduce__(self) -> Any:
        from diag.watching.hooks.model_hook import INERT

        return INERT
