"""What is learned from the first steps: the loss that is descended, and the examples to measure on.

A backward pass counts once the optimizer has stepped after it: another network's pass goes through this one too.
What is descended is taken for a multiple of one loss only where the graph says so; where something is added to it,
or it is multiplied by something that is not constant, that is said once and no loss is given to measure with.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diag.errors import first_line
from diag.snapshot.batch import LABEL_KEYS, map_tensors
from diag.watching.measure.probe import Probe
from diag.watching.observe.capture import (
    ForwardCall,
    ModelLoss,
    ObservedLoss,
    SeenLossCall,
    UnknownLoss,
    mean_of_its_rows,
    observed_loss,
)
from diag.watching.observe.loss_calls import ROWS_CHANGED, Pass

LEARNING_ATTEMPTS = 5
SAME_FACTOR = 1e-3  # relative: below it a factor is taken to be the one that it was
# What Hugging Face models divide a summed loss by, a count for the whole step, is wrong for any other examples;
# without it they take the mean.
ITEMS_IN_BATCH = "num_items_in_batch"
OBJECTIVE = (
    "The loss cannot be measured again: {}; give loss_fn=, from outputs and targets all that is descended, without "
    "which nothing is measured that needs the loss."
)
BESIDE_THE_TARGETS = " (weights or a mask can stand beside the targets: probe=(inputs, (targets, weights)))"
UNKEPT = "what the model was called on could not be kept ({})"
NOT_LIKE = "backward() is called on more than one kind of loss in a step"
NOT_THE_SAME = (
    "backward() is called on losses that differ in a step (of several outputs or targets, or with several settings)"
)
OTHERWISE = "backward() was called on another loss than before"
IN_ANOTHER_FORM = (
    "backward() was called on {} of another output than before, or with other settings (class weights, smoothing)"
)
LOSS_FACTOR = "Training descends {:.6g} times the mean of this loss, and measurements take the factor over."
FACTOR_MOVES = "The factor by which training multiplies its loss changes; measurements use that of the last step."
WITHOUT_TARGETS = (
    "The first calls of the model serve as the probe set, without targets: what needs only the model's outputs is "
    "measured on them."
)
TARGETS_UNSEEN = "the targets that belong to loss_fn= were not seen"
OTHER_TERMS = (
    "The loss that backward() is called on has {} more of which this model has no part; its own part is recorded."
)
NOT_OWN_LOSS = (
    "loss_fn= gives another value than what backward() was called on: measurements are of the loss given, what is "
    "recorded of gradients is of the other."
)

Note = Callable[[str, str], None]
Found = ObservedLoss | ModelLoss | UnknownLoss


class Staged(NamedTuple):
    """A backward pass of the step that is going on: the loss found behind it, or why none was, and its examples."""

    found: Found | str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Any
    outputs: Any
    known: bool  # whether the targets are
    kept: bool = False  # whether the call is, for what needs no targets
    source: Any = None  # the numbers of the graph nodes that made the outputs of the model's call


class Learner:
    """Learns the loss and fills the probe set.

    loss_fn: the user's own, else it is learned. note(key, sentence): tell once what cannot be observed.
    info(key, sentence): the same of what is.
    """

    def __init__(self, loss_fn: Any, probe: Probe, note: Note, info: Note) -> None:
        self.users_loss, self.probe, self._note, self._info = loss_fn, probe, note, info
        self.loss: Any = loss_fn
        self.active = not probe.complete or loss_fn is None
        self.user_targets: Any = None
        self._staged: list[Staged] = []
        self._attempts = 0
        self._bare = Probe()  # calls of the model, for where their targets are not found out
        self._probed: Any = None  # the loss that the targets of the set are of
        self._form: Any = None  # in which form the learned loss was called
        self._last: list[Any] | None = None  # what the last step descended

    @property
    def learned(self) -> bool:
        """Whether there is a loss to measure with."""
        return self.loss is not None and not isinstance(self.loss, UnknownLoss)

    @property
    def settled(self) -> bool:
        """Whether the loss is known, or will not be."""
        return self.loss is not None or not self.active

    # The passes of a step

    def stage(self, seen: Pass, forward: ForwardCall | str) -> None:
        """A backward pass that reached the model has ended; `forward`: the call before it, or why there is none."""
        if not self.active:
            return
        if isinstance(forward, str):
            self._staged.append(Staged(forward, (), {}, None, None, False))
            return
        found, targets, known = self._look(seen, forward)
        source = tuple(forward.sources)
        kwargs = {name: value for name, value in forward.kwargs.items() if name != ITEMS_IN_BATCH}
        if known and not self.probe.complete:  # the loop may use its buffers again before the step
            args, kwargs, targets = (map_tensors(_copied, x) for x in (forward.args, kwargs, targets))
            sizes = map_tensors(_sized, forward.outputs)
            self._staged.append(Staged(found, args, kwargs, targets, sizes, True, source=source))
        elif not (known or self.probe.batches or self._bare.complete):
            args, kwargs = (map_tensors(_copied, x) for x in (forward.args, kwargs))
            sizes = map_tensors(_sized, forward.outputs)
            self._staged.append(Staged(found, args, kwargs, None, sizes, False, kept=True))
        else:
            self._staged.append(Staged(found, (), {}, None, None, False, source=source))
        self.user_targets = None

    def forget(self) -> None:
        """The passes so far belong to no step of this model."""
        self._staged = []

    def stepped(self, passes: list[Pass]) -> None:
        """The optimizer has stepped; `passes`: all that the step descends. Nothing is learned any more of a step
        that descends what the last one did."""
        kinds = None if self.active else [_kind_of(p) for p in passes]
        if kinds is None or kinds != self._last or None in kinds:
            self.commit(passes)
            self.take_factor(passes)
        self._last = kinds

    def commit(self, passes: list[Pass]) -> None:
        """The optimizer has stepped; `passes`: all that the step descends. What fails here loses no step."""
        try:
            self._commit(passes)
        except Exception as error:
            self.give_up(UNKEPT.format(first_line(error)))

    def _commit(self, passes: list[Pass]) -> None:
        staged, self._staged = self._staged, []
        if not passes or not self.active:
            self._watch_for_changes(passes)
            return
        if self.users_loss is None and self.loss is None:
            self._settle_on(staged, passes)
        for i, s in enumerate(staged):
            if self.users_loss is None and s.source is not None and s.source in [t.source for t in staged[:i]]:
                continue  # the same examples with other targets
            if s.known and not self.probe.complete and self._belongs(s):
                self.probe.add(s.args, s.kwargs, s.targets, s.outputs)
            elif s.kept and not self.probe.batches:
                self._bare.add_call(s.args, s.kwargs, s.outputs)
        self._watch_for_changes(passes)
        if self.probe.complete and self.loss is not None:
            self.stop()

    def _belongs(self, staged: Staged) -> bool:
        """Whether these targets are of the loss that the set of examples is for: a step may descend several."""
        part = _part(staged.found)
        if self.users_loss is not None or part is None:
            return True
        if self._probed is None or _part(self.loss) is not None:
            self._probed = _part(self.loss) or part
        return bool(self._probed.is_like(part))

    def stop(self) -> None:
        """Nothing more is learned."""
        self.active, self._staged = False, []
        if not self.probe.batches and self._bare.batches:
            self.probe.take_over(self._bare)
            self._info("probe without targets", WITHOUT_TARGETS)
            if self.users_loss is not None:
                self.loss = UnknownLoss(TARGETS_UNSEEN)
        self.probe.complete = True

    def give_up(self, reason: str) -> None:
        """No loss is learned, for this reason."""
        if self.active:
            self._note(
                "loss not learned", f"The loss cannot be measured again: {reason}; give loss_fn= and probe=."
            )
            self._unknown(reason)
            self.stop()

    def refuse(self, reason: str, part: ObservedLoss | None = None) -> None:
        """What is descended is more than what is known of it: nothing is measured that needs it."""
        if self.users_loss is None and not isinstance(self.loss, UnknownLoss):
            self._note(
                "objective", OBJECTIVE.format(reason + (BESIDE_THE_TARGETS if reason == ROWS_CHANGED else ""))
            )
            self._unknown(reason, part)

    def _unknown(self, reason: str, part: ObservedLoss | None = None) -> None:
        if self.users_loss is None:
            self.loss = UnknownLoss(f"what training descends is not known: {reason}", part)

    def take_factor(self, passes: list[Pass]) -> None:
        """Let the loss be as many times the mean as the last step descended."""
        if not isinstance(self.loss, ObservedLoss | ModelLoss) or self.users_loss is not None:
            return
        now = _multiple(passes, self.loss)
        before = self.loss.factor
        if math.isfinite(now) and now != 0 and abs(now - before) > SAME_FACTOR * abs(before):
            self.loss = dataclasses.replace(self.loss, factor=now)
            if before != 1:
                self._note("factor moves", FACTOR_MOVES)
            elif not getattr(self.loss, "notes", ()):  # a summed loss has said so
                self._info("factor", LOSS_FACTOR.format(now))

    # What is behind one pass

    def _look(self, seen: Pass, forward: ForwardCall) -> tuple[Found | str, Any, bool]:
        """The loss behind it or why there is none, the targets, and whether they are known."""
        call = None if seen.seen is None else seen.seen.call
        if self.users_loss is not None:
            return self.users_loss, *self._targets_of_users_loss(seen, forward, call)
        found = self._found(seen, forward, call)
        part = found.part if isinstance(found, UnknownLoss) else found
        if isinstance(part, ObservedLoss) and call is not None:
            return found, part.targets(forward, call), True
        if isinstance(part, ModelLoss):
            return found, _labels(forward), True
        return found, None, False

    def _found(self, seen: Pass, forward: ForwardCall, call: SeenLossCall | None) -> Found | str:
        observed = observed_loss(forward, call) if call is not None else None
        place = None if seen.seen is None else seen.seen.place
        if seen.reason:
            part = observed if isinstance(observed, ObservedLoss) else None
            return UnknownLoss(seen.reason, part) if seen.seen is not None else seen.reason
        if isinstance(observed, ObservedLoss) and call is not None:
            return mean_of_its_rows(observed, call)
        if place is not None:
            return ModelLoss(place, in_parts=ITEMS_IN_BATCH in forward.kwargs)
        return observed or "no call of a loss function was seen"

    def _targets_of_users_loss(
        self, seen: Pass, forward: ForwardCall, call: SeenLossCall | None
    ) -> tuple[Any, bool]:
        values = [v for v in (seen.value, seen.seen.value if seen.seen else None) if v is not None]
        candidates = [self.user_targets, call.targets if call is not None else None]
        for targets in [c for c in candidates if c is not None]:
            try:
                with torch.no_grad():
                    got = self.users_loss(forward.outputs, targets)
            except Exception:
                continue
            agrees = [
                bool(torch.allclose(got.double(), torch.as_tensor(v).double(), rtol=2e-2, equal_nan=True))
                for v in values
            ]
            if any(agrees):
                if not agrees[0] and seen.reason:
                    self._note("objective", NOT_OWN_LOSS)
                return targets, True
        return None, False

    # What follows from a step

    def _settle_on(self, staged: list[Staged], passes: list[Pass]) -> None:
        found = [s.found for s in staged]
        refused = [f for f in found if isinstance(f, str)]
        if not found or refused:
            return self._try_again(refused[0] if refused else "no call of the model leads to it")
        unknown = next((f for f in found if isinstance(f, UnknownLoss)), None)
        first = found[0]
        if unknown is not None:
            if unknown.part is None:  # it may become clearer
                return self._try_again(unknown.reason)
            return self.refuse(unknown.reason, unknown.part)
        assert isinstance(first, ObservedLoss | ModelLoss)
        if not all(first.is_like(f) for f in found) or len({s.source for s in staged}) < len(found):
            kinds = {f.function if isinstance(f, ObservedLoss) else None for f in found}
            reason = NOT_LIKE if len(kinds) > 1 else NOT_THE_SAME
            return self.refuse(reason, first if isinstance(first, ObservedLoss) else None)
        self._tell(first, passes)
        self.loss = first
        return None

    def _tell(self, loss: ObservedLoss | ModelLoss, passes: list[Pass]) -> None:
        verb = "was observed:" if isinstance(loss, ObservedLoss) else "is"
        self._info("loss function", f"The loss {verb} {loss.describe()}.")
        for text in loss.notes if isinstance(loss, ObservedLoss) else ():
            self._note("reduction", f"{text[0].upper()}{text[1:]}.")
        if others := max(p.others for p in passes):
            self._info("other terms", OTHER_TERMS.format("one term" if others == 1 else f"{others} terms"))

    def _try_again(self, reason: str) -> None:
        self._attempts += 1
        if self._attempts >= LEARNING_ATTEMPTS:
            self.give_up(reason)

    def _watch_for_changes(self, passes: list[Pass]) -> None:
        """A loss that was learned is given up where a step descends something else."""
        if self.users_loss is not None:
            self._attempts += self.active and not self.probe.batches
            if self.active and self._attempts >= LEARNING_ATTEMPTS:
                self._note(
                    "probe", "The targets that belong to loss_fn= were not seen; give probe=(inputs, targets)."
                )
                self.stop()
            return
        if not isinstance(self.loss, ObservedLoss | ModelLoss) or not passes:
            return
        reason = next((p.reason for p in passes if p.reason), "")
        name = self.loss.function.__name__ if isinstance(self.loss, ObservedLoss) else ""
        if not reason and name and any(p.seen is not None and p.seen.name not in (name, "") for p in passes):
            reason = OTHERWISE
        if not reason and name and self._is_in_another_form(passes):
            reason = IN_ANOTHER_FORM.format(name)
        if reason:
            self.refuse(reason, self.loss if isinstance(self.loss, ObservedLoss) else None)

    def _is_in_another_form(self, passes: list[Pass]) -> bool:
        """Whether the loss was called on another output, or with other settings, than when it was called first."""
        forms = [p.seen.form for p in passes if p.seen is not None and p.seen.form is not None]
        if self._form is None and forms:
            self._form = forms[0]
        return any(differ(self._form, form) for form in forms)


def differ(form: Any, other: Any) -> bool:
    """Whether two forms of a call differ; where its input came from may not be known of one of them."""
    where, settings = form
    another, others = other
    return settings != others or (None not in (where, another) and where != another)


def _part(found: Any) -> Any:
    """The loss of torch's, or the model's own, that is all or a part of what was found."""
    found = found.part if isinstance(found, UnknownLoss) else found
    return found if isinstance(found, ObservedLoss | ModelLoss) else None


def _multiple(passes: list[Pass], loss: ObservedLoss | ModelLoss) -> float:
    """How many times the mean loss the step's passes descend together."""
    if not passes or any(p.reason for p in passes):
        return math.nan
    if isinstance(loss, ModelLoss) and loss.in_parts:
        return float(passes[-1].factor)
    return float(sum(float(p.multiple) for p in passes))


def _kind_of(p: Pass) -> Any:
    """What a pass descends, apart from its value; None where that is not known without waiting for a device."""
    seen, count = p.seen, None if p.seen is None else p.seen.count
    if type(p.factor) is not float or isinstance(count, Tensor):
        return None
    return p.reason, p.factor, p.others, count, None if seen is None else (seen.name, seen.place, seen.form)


def _labels(forward: ForwardCall) -> Any:
    return next((forward.kwargs[key] for key in LABEL_KEYS if key in forward.kwargs), None)


def _copied(t: Tensor) -> Tensor:
    return t.detach().clone()


def _sized(t: Tensor) -> Tensor:
    return torch.empty_like(t, device="meta")
