"""The calls of loss functions: shapes, types and reduction of all of them, and on a few a look at the numbers.

What made the loss function's input is read from the autograd graph ("softmax" of the outputs), which is certain and
costs nothing; whether its rows are probabilities is looked at besides, as a compiled model has no such graph.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diag.snapshot.autograd_graph import (
    COPYING,
    PASSING_ON,
    first_arguments,
    kind_of,
    made_last,
    signed,
)
from diag.snapshot.inside.padding import padding_of
from diag.snapshot.loop.data import OF_BINARY_TARGETS, OF_LOG_PROBABILITIES, LossFacts
from diag.snapshot.objective.loss_spy import input_and_target
from diag.watching.observe.loop.data.own import OwnDifference
from diag.watching.observe.loop.data.padding import sequences_of
from diag.watching.observe.loop.moment import Moment, due
from diag.watching.observe.loop.roots import LossInRoot, undivided

MOST_KINDS_OF_CALLS = 16  # kinds of calls that are distinguished
CALLS_CHECKED = 3  # calls whose numbers are looked at
ROOTS = 8
ROWS_CHECKED = 64
NODES_TO_INPUT = 24
OF_DISTRIBUTIONS = ("kl_div", "cross_entropy")
MOST_CLASSES = 4096  # whose weights are kept
FLAT = {"Round": "round()", "Sign": "sign()", "Floor": "floor()", "Ceil": "ceil()", "Trunc": "trunc()"}
MADE_BY = {"Softmax": "softmax", "LogSoftmax": "log_softmax", "Sigmoid": "sigmoid", "LogSigmoid": "log_sigmoid"}


@dataclass
class Roots:
    """What backward() was called on, looked at a few times."""

    calls: int = 0
    looked: int = 0
    undivided: int = 0

    def look(self, root: Tensor) -> None:
        """Is it the mean over the batch, or a fraction of it?"""
        self.calls += 1
        if self.calls <= ROOTS or due(self.calls):
            whole = undivided(root)
            self.looked += whole is not None
            self.undivided += whole is True


class Losses:
    """Follows the loss functions that training calls."""

    def __init__(self, model: nn.Module, moment: Moment) -> None:
        self._moment = moment
        self.kinds: dict[Any, LossFacts] = {}
        self._last: tuple[int, LossFacts] | None = None
        self._scaled: dict[int, Tensor] = {}
        self.roots = Roots()
        self._away: list[tuple[LossFacts, str, Tensor]] = []
        # By the number of an embedding's entries: targets are its tokens where the loss has as many classes.
        self._paddings = {
            m.num_embeddings: m.padding_idx
            for m in model.modules()
            if isinstance(m, nn.Embedding) and m.padding_idx is not None
        }
        self.raw: tuple[Tensor, ...] = ()  # floating tensors of the batch that a DataLoader last gave
        self.own: LossFacts | None = None
        self._expanded: tuple[tuple[int, ...], ...] = ()
        self._own_functions: set[str] = set()  # of torch, that the own loss amounts to
        self._called = 0  # since the last backward pass

    def called(self, function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], value: Tensor) -> None:
        """A loss function of torch returned `value`, which has a graph."""
        prediction, target = input_and_target(args, kwargs)
        if not isinstance(prediction, Tensor):
            return
        key: tuple[Any, ...] = (
            function.__name__,
            prediction.ndim,
            prediction.shape[1:],
            prediction.dtype,
            kwargs.get("reduction"),
        )
        key += (target.shape[1:], target.dtype) if isinstance(target, Tensor) else ()
        kind = self.kinds.get(key)
        if kind is None:
            if len(self.kinds) >= MOST_KINDS_OF_CALLS:
                return
            kind = self.kinds[key] = self._begun(function, prediction, args, kwargs)
            self._moment.news(("loss", function.__name__, len(self.kinds)), "losses")
        kind.calls += 1
        self._called += 1
        kind.input_shape, kind.input_dtype = _form(prediction)
        if isinstance(target, Tensor):
            kind.target_shape, kind.target_dtype = _form(target)
        self._last = (value.grad_fn._sequence_nr() if value.grad_fn is not None else -1, kind)
        if prediction.numel() and (kind.calls <= CALLS_CHECKED or due(kind.calls)):
            self._look(kind, prediction, target)

    def _look(self, kind: LossFacts, prediction: Tensor, target: Any) -> None:
        kind.came_from, kind.over_axis = made_by(prediction)
        last = made_last(prediction.grad_fn, NODES_TO_INPUT)
        kind.flat = FLAT.get(kind_of(last), "") if last is not None else ""
        if isinstance(target, Tensor):
            kind.broadcast |= expands_both(prediction, target) and kind.function not in OF_LOG_PROBABILITIES
            self._targets(kind, target)
            self._filling(kind, prediction, target)
        axis = 1 if kind.function in OF_LOG_PROBABILITIES and prediction.ndim > 1 else -1
        if prediction.ndim > 1 and prediction.shape[axis] > 1 and kind.checked < CALLS_CHECKED:
            rows = prediction.detach().movedim(axis, -1).reshape(-1, prediction.shape[axis])[:ROWS_CHECKED]
            self._read(kind, "rows", rows)
        news = (kind.came_from, kind.over_axis, kind.broadcast)
        self._moment.news(("loss input", id(kind), news), "losses")

    def _targets(self, kind: LossFacts, target: Tensor) -> None:
        if kind.padding is not None and not target.is_floating_point():
            self._read(kind, "padding", (target == kind.padding).float().mean())
        self._range(kind, target)
        if target.is_cpu:
            for raw in self.raw:
                if raw.shape == target.shape or raw.numel() == target.numel():
                    kind.truncated = max(kind.truncated, _truncation(raw.reshape(target.shape), target))
                    kind.constant += is_constant(target) and not is_constant(raw)

    def _filling(self, kind: LossFacts, prediction: Tensor, target: Tensor) -> None:
        """Does one number fill the ends of sequences, in each call that is looked at?"""
        rows = sequences_of(prediction, target) if kind.function in OF_LOG_PROBABILITIES else None
        if rows is None:
            return
        found = padding_of(rows)
        if kind.filler is not None and (rows == kind.filler).any() and (found is None or found[0] != kind.filler):
            kind.filler, kind.filled_calls = None, -1  # it stands for something
        elif found is not None and kind.filled_calls >= 0:
            kind.filler, kind.filled = found[0], max(kind.filled, found[1])
            kind.filled_calls += 1
            self._moment.news(("filled", id(kind), kind.filled_calls), "losses")

    def _range(self, kind: LossFacts, target: Tensor) -> None:
        if kind.function in OF_BINARY_TARGETS and target.numel():
            numbers = target.detach().float()
            self._read(kind, "range", torch.stack(numbers.aminmax()))
            columns = len(kind.positive_weights)
            if columns == 1 or (columns and target.ndim > 1 and target.shape[-1] == columns):
                rows = numbers.reshape(-1, columns)
                self._read(kind, "ones", nn.functional.pad(rows.sum(0), (0, 1), value=len(rows)))
        shares = kind.function == "cross_entropy" or (kind.function in OF_BINARY_TARGETS and kind.over_axis == 1)
        if shares and target.is_floating_point() and target.ndim > 1:
            ones = target.detach()
            binary = ((ones == 0) | (ones == 1)).all()
            self._read(kind, "several", ones.sum(1).max() * binary)
        soft = kind.function in OF_DISTRIBUTIONS and target.is_floating_point()
        if soft and target.ndim == 2 and target.shape[1] > 1:
            self._read(kind, "distributions", target.detach()[:ROWS_CHECKED])

    def _read(self, kind: LossFacts, what: str, values: Tensor) -> None:
        if values.is_cpu:
            self._note(kind, what, values)
        elif len(self._away) < 4 * MOST_KINDS_OF_CALLS:
            self._away.append((kind, what, values.clone()))

    def _note(self, kind: LossFacts, what: str, values: Tensor) -> None:
        if what == "padding":
            kind.padded = max(kind.padded, float(values))
            return
        if what in ("range", "several"):
            self._note_targets(kind, what, values)
            return
        if what == "distributions":
            self._note_distributions(kind, values)
            return
        if what == "ones":
            *ones, rows = values.tolist()  # counted as they are read: on a device some calls may not be
            kind.ones = tuple(b + v for b, v in zip(kind.ones or (0.0,) * len(ones), ones, strict=True))
            kind.entries += int(rows)
            return
        kind.checked += 1
        probabilities, logs = are_probabilities(values)
        kind.probabilities += probabilities
        kind.log_probabilities += logs
        if kind.checked == CALLS_CHECKED or probabilities:
            self._moment.news(("loss rows", id(kind), kind.checked, probabilities, logs), "losses")

    def _note_targets(self, kind: LossFacts, what: str, values: Tensor) -> None:
        if what == "several":
            kind.several = max(kind.several, int(values))
            return
        kind.lowest, kind.highest = min(kind.lowest, float(values[0])), max(kind.highest, float(values[1]))

    def _note_distributions(self, kind: LossFacts, rows: Tensor) -> None:
        if not are_probabilities(rows)[0]:
            return
        even = float(torch.special.entr(rows.double()).sum(1).mean()) / math.log(rows.shape[1])
        kind.evenness = min(kind.evenness, even) if kind.even_calls else even
        kind.even_calls += 1
        self._moment.news(("even targets", id(kind), min(kind.even_calls, CALLS_CHECKED)), "losses")

    # What the loss was multiplied with

    def scaled(self, losses: Any, scaled: Any) -> None:
        """A GradScaler made `scaled` of `losses`."""
        if isinstance(losses, Tensor) and isinstance(scaled, Tensor) and scaled.grad_fn is not None:
            self._scaled = {scaled.grad_fn._sequence_nr(): losses.detach() if losses.grad_fn is None else losses}

    def backward_called(self, roots: Any) -> None:
        """A backward pass begins; how its root came from the loss function's value is read on a few."""
        root = roots if isinstance(roots, Tensor) else next((r for r in roots or () if isinstance(r, Tensor)), None)
        scaled, self._scaled = self._scaled, {}
        if root is None or root.grad_fn is None:
            return
        unscaled = scaled.get(root.grad_fn._sequence_nr())
        root = root if unscaled is None or unscaled.grad_fn is None else unscaled
        self.roots.look(root)
        if self._last is None:
            self._own()
            return
        number, kind = self._last
        alone, self._last, self._called = self._called == 1, None, 0
        if kind.calls <= CALLS_CHECKED or due(kind.calls):
            value = LossInRoot(root, number)
            kind.averaged = kind.reduction == "none" and value.is_plain_mean
            kind.factor, kind.root = value.factor, value.factor is not None
            kind.ascended = alone and value.ascends

    @property
    def any_called(self) -> bool:
        """Whether a loss function of torch was called since the last backward pass."""
        return self._last is not None

    def own_difference(self, found: OwnDifference | None) -> None:
        """What a loss without a call of a loss function amounts to; None where that is not known."""
        self._own_functions.add("" if found is None or found.expanded else found.function)
        self._expanded = self._expanded or (found.expanded if found is not None else ())

    def _own(self) -> None:
        """No loss function of torch was called: the loss is the user's own arithmetic."""
        if self.own is None:
            self.own = LossFacts("", first_step=self._moment.step)
        if self.own.calls >= CALLS_CHECKED:
            return
        self.own.calls += 1
        if self._expanded:
            self.own.input_shape, self.own.target_shape = self._expanded
            self.own.broadcast = True
            self._moment.news("own loss broadcasts", "losses")

    # Facts

    def facts(self) -> tuple[LossFacts, ...]:
        """Each kind of call as plain data; what is on a device is read now."""
        waiting, self._away = self._away, []
        for kind, what, values in waiting:
            self._note(kind, what, values.cpu())
        if self.own is not None:
            self.own.like = next(iter(self._own_functions)) if len(self._own_functions) == 1 else ""
        kinds = list(self.kinds.values()) + ([self.own] if self.own is not None else [])
        return tuple(map(replace, kinds))

    def _begun(
        self, function: Callable[..., Any], compared: Tensor, args: Any, kwargs: Mapping[str, Any]
    ) -> LossFacts:
        """What the arguments of the first call say; `compared` is the loss function's input."""
        arguments = _arguments(function, args, kwargs)
        smoothing, ignored = arguments.get("label_smoothing"), arguments.get("ignore_index")
        tokens = function.__name__ in OF_LOG_PROBABILITIES and compared.ndim > 1
        return LossFacts(
            function.__name__,
            str(arguments.get("reduction", "")),
            first_step=self._moment.step,
            ignored=ignored if isinstance(ignored, int) else None,
            padding=self._paddings.get(compared.shape[1]) if tokens else None,
            weighted=arguments.get("weight") is not None or arguments.get("pos_weight") is not None,
            class_weights=_numbers(arguments.get("weight")) if function.__name__ in OF_LOG_PROBABILITIES else (),
            positive_weights=_numbers(arguments.get("pos_weight")),
            label_smoothing=float(smoothing) if isinstance(smoothing, (int, float)) else 0.0,
        )


def _numbers(weights: Any) -> tuple[float, ...]:
    """Weights of classes as plain numbers, read from a device once."""
    known = isinstance(weights, Tensor) and weights.ndim < 2 and 0 < weights.numel() <= MOST_CLASSES
    return tuple(weights.detach().reshape(-1).tolist()) if known else ()


def _arguments(function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return kwargs
    bound.apply_defaults()
    return bound.arguments


def _form(tensor: Tensor) -> tuple[tuple[int, ...], str]:
    """Shape and dtype."""
    return tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")


def made_by(prediction: Tensor) -> tuple[str, int | None]:
    """The function that made the tensor, and its axis from the front where nothing was rearranged since."""
    moved = False
    for node in first_arguments(prediction.grad_fn, NODES_TO_INPUT):
        name = kind_of(node)
        if name in MADE_BY:
            axis = getattr(node, "_saved_dim", None)
            return MADE_BY[name], None if axis is None or moved else _from_front(axis, prediction)
        if name not in PASSING_ON:
            return "", None
        moved |= name not in COPYING
    return "", None


def _from_front(axis: int, prediction: Tensor) -> int:
    return signed(axis) + prediction.ndim if signed(axis) < 0 else signed(axis)


def expands_both(a: Tensor, b: Tensor) -> bool:
    """Whether the two are broadcast to a shape that has more entries than either."""
    if a.shape == b.shape:
        return False
    try:
        return torch.broadcast_shapes(a.shape, b.shape).numel() > max(a.numel(), b.numel())
    except RuntimeError:
        return False


def are_probabilities(rows: Tensor) -> tuple[bool, bool]:
    """Whether every row (n, K) is a distribution, and whether every row is the logarithm of one."""
    if not rows.is_floating_point():
        return False, False
    values = rows.double()
    # K roundings of numbers up to one, in the type that they were computed in.
    slack = 4 * values.shape[1] ** 0.5 * torch.finfo(rows.dtype).eps
    inside = bool((values >= 0).all() and (values <= 1 + slack).all())
    probabilities = inside and bool(((values.sum(1) - 1).abs() <= slack).all())
    logs = bool((values <= slack).all()) and bool((values.logsumexp(1).abs() <= 64 * slack).all())
    return probabilities, logs


def is_constant(tensor: Tensor) -> bool:
    """Whether all numbers of it are one, and there are several."""
    return tensor.numel() > 1 and bool((tensor == tensor.reshape(-1)[0]).all())


def _truncation(raw: Tensor, target: Tensor) -> float:
    """The largest change where `target` is `raw` cut to whole numbers, 0 where it is not."""
    if target.dtype == raw.dtype and not bool((target == target.trunc()).all()):
        return 0.0
    change = (raw - raw.trunc()).abs()
    cut = bool((raw.trunc().to(torch.float64) == target.detach().to(torch.float64)).all())
    return float(change.max()) if cut else 0.0
