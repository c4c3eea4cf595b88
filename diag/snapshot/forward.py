"""The one forward pass over the data, which is made when the first quantity of it is asked for.

Others may listen to it (see `listener`). What the logits and labels are is read from the user's own loss (see
`comparison`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from diag.errors import DiagError, MissingQuantity
from diag.snapshot.batch import Batch, map_tensors, tensors_in
from diag.snapshot.explain import CALL_ERRORS, explained
from diag.snapshot.inside.listener import PassListener
from diag.snapshot.objective.comparison import COMPARES_EXAMPLES, NO_CLASSES, Comparison, by_shape, compared, tried
from diag.snapshot.objective.loss_spy import LossFunctionCall, LossSpy
from diag.snapshot.objective.own_loss import is_models_own
from diag.snapshot.objective.same_rows import matching_rows
from diag.snapshot.preserve import preserved
from diag.snapshot.snapshot import Snapshot
from diag.snapshot.state.host import on_host

L = TypeVar("L", bound=PassListener)


@dataclass(frozen=True)
class Looked:
    """What one call of a model and of the loss showed on one batch.

    value: the loss, None where there is none or it cannot be computed. calls: of loss functions of torch that led
    to it. comparison: of logits with labels, or why there is none.
    """

    outputs: Any
    value: Tensor | None
    calls: tuple[LossFunctionCall, ...]
    comparison: Comparison | str | DiagError

    def compared(self) -> Comparison:
        """The comparison. Raises MissingQuantity with the reason where there is none."""
        if isinstance(self.comparison, DiagError):
            raise self.comparison
        if isinstance(self.comparison, str):
            raise MissingQuantity(self.comparison)
        return self.comparison


@dataclass(frozen=True)
class ForwardPass:
    """Everything that one pass gives; features and the final layer are None where the model has no final layer."""

    looked: tuple[Looked, ...]
    features: Tensor | None
    final_layer: nn.Linear | None


def forward_pass(snapshot: Snapshot) -> ForwardPass:
    """The one pass of the snapshot's model over its data."""
    return snapshot.once("forward pass", lambda: _run(snapshot))


def comparisons(snapshot: Snapshot) -> list[Comparison]:
    """What the loss compares in each batch. Raises MissingQuantity where that is not known or not of classes."""
    looked = forward_pass(snapshot).looked
    found = [seen.compared() for seen in looked]
    snapshot.once("coupled labels", lambda: _refuse_coupled(snapshot, looked[0], snapshot.batches[0]))
    return found


def look(snapshot: Snapshot, model: nn.Module | Callable[..., Any], batch: Batch) -> Looked:
    """Call `model` and the snapshot's loss on a batch, and observe both. The caller is inside `preserved`."""
    spy = LossSpy()
    with spy:
        outputs = batch.forward(model)
    return look_at(snapshot, outputs, batch.targets, spy)


def look_at(
    snapshot: Snapshot, outputs: Any, targets: Any, spy: LossSpy | None = None, tries: bool = True
) -> Looked:
    """Call the snapshot's loss on outputs of the model, and observe it.

    spy: what saw the model's call. tries: whether to try what the loss compares where no call shows it.
    """
    spy, loss_fn = spy or LossSpy(), snapshot.loss_fn
    inside = len(spy.calls)
    whole = getattr(loss_fn, "part", None) or snapshot.batch_loss  # what is known of a loss that is not known whole
    value: Tensor | None = None
    try:
        with spy:
            value = whole(outputs, targets)
    except MissingQuantity as error:
        reason = str(error) if loss_fn is not None else by_shape(outputs, targets)
        return Looked(outputs, None, (), reason)
    except DiagError as error:
        return Looked(outputs, None, (), error)
    calls = tuple(spy.calls if loss_fn is None or is_models_own(loss_fn) else spy.calls[inside:])
    found = compared(calls, value, float(getattr(loss_fn, "factor", 1.0)))
    if isinstance(found, str | None) and tries and loss_fn is not None:
        seen = tried(outputs, targets, whole)
        found = seen if isinstance(seen, Comparison) or found is None else found
    value = value if whole == snapshot.batch_loss else None
    return Looked(outputs, value, calls, NO_CLASSES if found is None else found)


def heard(snapshot: Snapshot, name: str, kind: type[L]) -> L:
    """A listener of this kind that has heard the model called on the data: in the pass above where `name` is among
    those that share it, else in one of its own, in evaluation mode."""
    if name in snapshot.listeners:
        forward_pass(snapshot)
        if (listener := snapshot.listeners[name]).complete:
            return cast(L, listener)
    listener = kind(snapshot.model)
    batches = snapshot.batches  # which may call the model, before anything listens
    try:
        with preserved(snapshot.model), torch.no_grad(), listener.throughout():
            for batch in batches:
                snapshot.deadline.check()
                if not listener.enough:
                    _call_heard(snapshot.model, [listener], batch)
    except CALL_ERRORS as error:
        raise explained(snapshot.model, snapshot.batches, error) from error
    return listener


def _call_heard(model: nn.Module, listeners: Sequence[PassListener], batch: Batch) -> Any:
    with on_host():  # what the listeners compute; the model is called with the program's default device
        with ExitStack() as stack:
            for listener in listeners:
                stack.enter_context(listener.during(batch))
            outputs = batch.forward(model)
        for listener in listeners:
            listener.called(batch, outputs)
    return outputs


def _run(snapshot: Snapshot) -> ForwardPass:
    sharing = list(snapshot.listeners.values())
    if sharing:
        try:
            return _passed(snapshot, sharing)
        except Exception:  # what breaks in one of them concerns no other
            return _passed(snapshot, [])
    return _passed(snapshot, [])


def _passed(snapshot: Snapshot, listeners: Sequence[PassListener]) -> ForwardPass:
    linear: list[tuple[nn.Linear, Tensor, Tensor]] = []
    batches = snapshot.batches  # which may call the model, before anything listens

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if args and isinstance(args[0], Tensor):
            linear.append((module, args[0], output))  # type: ignore[arg-type]

    hooks = [m.register_forward_hook(keep) for m in snapshot.model.modules() if isinstance(m, nn.Linear)]
    looked, features, final = [], [], None
    try:
        with preserved(snapshot.model), torch.no_grad(), ExitStack() as stack:
            for listener in listeners:
                stack.enter_context(listener.throughout())
            for batch in batches:
                snapshot.deadline.check()
                linear.clear()
                looked.append(_explained(snapshot, batch, listeners))
                final, feature = _final_layer(linear, looked[-1])
                features.append(feature)
    finally:
        for hook in hooks:
            hook.remove()
    for listener in listeners:
        listener.complete = True
    found = [f for f in features if f is not None]
    return ForwardPass(tuple(looked), torch.cat(found) if len(found) == len(features) else None, final)


def _explained(snapshot: Snapshot, batch: Batch, listeners: Sequence[PassListener]) -> Looked:
    hearing = [listener for listener in listeners if not listener.enough]
    try:
        if not hearing:
            return look(snapshot, snapshot.model, batch)
        return look(snapshot, lambda *_, **__: _call_heard(snapshot.model, hearing, batch), batch)
    except CALL_ERRORS as error:
        if isinstance(error, DiagError):
            raise
        raise explained(snapshot.model, snapshot.batches, error) from error


def _final_layer(linear: list[Any], seen: Looked) -> tuple[nn.Linear | None, Tensor | None]:
    """The last Linear whose outputs are, row by row, what enters the loss; and its inputs for the counted rows.

    What the model returns may be changed on its way into the loss, as by a temperature.
    """
    found = seen.comparison
    if not isinstance(found, Comparison):
        return None, None
    returned = {(t.data_ptr(), t.numel()) for t in tensors_in(seen.outputs)}
    for module, x, y in reversed(linear):
        if y.shape[-1] != found.logits.shape[1]:
            continue
        rows = matching_rows(found.logits, y, changed=(y.data_ptr(), y.numel()) in returned)
        if rows is not None:
            return module, x.reshape(-1, x.shape[-1])[rows[found.counted]]
    return None, None


def _refuse_coupled(snapshot: Snapshot, looked: Looked, batch: Batch) -> None:
    """Raises MissingQuantity where a batch of half the examples is compared with other classes, or other labels."""
    whole = looked.compared()
    rows, classes = len(whole.labels), whole.logits.shape[1]
    arange = torch.equal(whole.labels, torch.arange(rows, device=whole.labels.device))
    if whole.call is None or batch.size < 2 or not (arange or classes in (rows, rows - 1, batch.size)):
        return
    half = batch.slice(0, batch.size // 2)
    cut = lambda t: t[: half.size] if t.ndim and t.shape[0] == batch.size else t  # noqa: E731
    with preserved(snapshot.model), torch.no_grad():
        try:
            if snapshot.loss_fn is None or is_models_own(snapshot.loss_fn):
                part = look(snapshot, snapshot.model, half).compared()
            else:
                part = look_at(snapshot, map_tensors(cut, looked.outputs), half.targets).compared()
        except (DiagError, *CALL_ERRORS):
            raise MissingQuantity(COMPARES_EXAMPLES) from None
    if part.logits.shape[1] != classes or not torch.equal(part.labels, whole.labels[: len(part.labels)]):
        raise MissingQuantity(COMPARES_EXAMPLES)
