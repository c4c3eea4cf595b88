"""From what was seen of one micro-batch to a loss that can be measured again: `loss_fn(outputs, targets)`.

An observed loss is used only after it has given, from the model's outputs and the targets, the number that
training saw. Otherwise the reason is recorded, and the user can give `loss_fn=` and `probe=`. What is descended is
a constant multiple of it, by the `factor`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diag.errors import MissingQuantity, type_of
from diag.snapshot.batch import map_tensors, tensors_in
from diag.snapshot.objective.comparison import IGNORED_LABEL
from diag.watching.observe.norms import HALF_PRECISION
from diag.watching.observe.route import Node, Route, chain_of, route_between, selecting, source_of

NUMBERS_OF_SETTING = 1024  # numbers of a setting of a loss (our choice)


@dataclass(frozen=True)
class ForwardCall:
    """One call of the model in training, and the tensors of its outputs without their graph.

    sources: of each tensor of the outputs the number of the graph node that made it.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Any
    tensors: tuple[Tensor, ...]
    sources: tuple[int | None, ...]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> ForwardCall:
        """Raises MissingQuantity where the outputs hold no tensor."""
        found = tensors_in(outputs)
        if not found:
            raise MissingQuantity(
                f"the model returns {type_of(outputs)} without a tensor in it; let it return tensors in "
                "tuples, lists or dicts"
            )
        kept = tuple(t.detach() for t in found)
        return cls(args, kwargs, detached(outputs), kept, tuple(source_of(t) for t in found))

    def leads_to(self, call: SeenLossCall) -> list[int]:
        """The places of the tensors that the loss function was called on, or on what was made of them."""
        numbers, memory = {node.sequence for node in call.nodes}, call.prediction.data_ptr()
        pairs = enumerate(zip(self.tensors, self.sources, strict=True))
        return [i for i, (t, source) in pairs if source in numbers or (t.data_ptr() == memory and t.numel())]


@dataclass(frozen=True)
class SeenLossCall:
    """One call of a loss function: what it was given, how that came about, and what it returned."""

    function: Callable[..., Tensor]
    settings: dict[str, Any]
    prediction: Tensor
    targets: Any
    nodes: list[Node]
    value: Tensor
    moving_targets: bool = False

    @classmethod
    def of(cls, function: Callable[..., Tensor], args: Any, kwargs: Any, value: Tensor) -> SeenLossCall:
        """The call `function(input, target, ...)`."""
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        settings = dict(bound.arguments)
        prediction, targets = settings.pop("input"), settings.pop("target")
        moving = isinstance(targets, Tensor) and targets.requires_grad
        targets = detached(targets) if moving else targets
        return cls(function, settings, prediction.detach(), targets, chain_of(prediction), value.detach(), moving)


@dataclass(frozen=True)
class SeenBackward:
    """One backward pass from a multiple of one loss function's value: that function's call, and the model's."""

    call: SeenLossCall
    forward: ForwardCall


@dataclass(frozen=True)
class ObservedLoss:
    """The loss that training was seen to use, as a mean over examples: `loss_fn(outputs, targets)`.

    tensor: which of the tensors in the outputs it is called on.
    """

    function: Callable[..., Tensor]
    settings: dict[str, Any]
    route: Route
    target_tail: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    factor: float = 1.0
    tensor: int = 0

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        loss = self.called(outputs, targets)
        loss = loss.mean() if self.settings.get("reduction") == "none" else loss
        return loss if self.factor == 1 else self.factor * loss

    def called(self, outputs: Any, targets: Any) -> Tensor:
        """What the loss function itself gives."""
        if self.route.flatten and isinstance(targets, Tensor):
            targets = targets.reshape(-1, *self.target_tail)
        prediction = outputs if isinstance(outputs, Tensor) else tensors_in(outputs)[self.tensor]
        return self.function(self.route(prediction), targets, **self.settings)

    def is_like(self, other: Any) -> bool:
        """Whether `other` is the same loss function of the same part of the outputs, with the same settings."""
        return (
            isinstance(other, ObservedLoss)
            and other.function is self.function
            and other.tensor == self.tensor
            and selecting(other.route.steps) == selecting(self.route.steps)
            and other.settings.keys() == self.settings.keys()
            and all(_equal(value, other.settings[name]) for name, value in self.settings.items())
        )

    def targets(self, forward: ForwardCall, call: SeenLossCall) -> Any:
        """The targets of `call` with the examples along the first axis, as `loss_fn` expects them."""
        targets = call.targets
        prediction = forward.tensors[self.tensor]
        if not isinstance(targets, Tensor) or not self.route.flatten or len(targets) == len(prediction):
            return targets
        lead = self.route.unflattened(prediction).shape
        lead = lead[: len(lead) - len(self.route.tail)]
        if self.route.positions is None:
            return targets.reshape(*lead, *self.target_tail)
        ignored = self.settings.get("ignore_index", IGNORED_LABEL)
        return F.pad(targets.reshape(lead[0], -1), (0, lead[1] - self.route.positions), value=ignored)

    def describe(self) -> str:
        """The loss in words, with the settings that are not the defaults."""
        defaults = {n: p.default for n, p in inspect.signature(self.function).parameters.items()}
        changed = [f"{n}={_short(v)}" for n, v in self.settings.items() if not _same(v, defaults.get(n))]
        return f"{self.function.__name__}({', '.join(changed)})"


@dataclass(frozen=True)
class ModelLoss:
    """The loss that a model returns with its outputs, times a factor: `loss_fn(outputs, targets)`.

    place: where it stands among the outputs, a name or an index. in_parts: each micro-batch's is a part of the mean
    over the whole step.
    """

    place: str | int
    factor: float = 1.0
    in_parts: bool = False

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        loss = outputs[self.place] if _is_indexed(outputs) else getattr(outputs, str(self.place))
        return loss if self.factor == 1 else self.factor * loss

    def is_like(self, other: Any) -> bool:
        """Whether `other` stands in the same place."""
        return isinstance(other, ModelLoss) and other.place == self.place

    def describe(self) -> str:
        """The loss in words."""
        return "the one that the model returns with its outputs"


@dataclass(frozen=True)
class UnknownLoss:
    """Stands in for a loss that is not known, so that nothing is measured with another: it raises the reason.

    part: the loss of torch that is a part of it, if one was seen.
    """

    reason: str
    part: ObservedLoss | None = None

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        raise MissingQuantity(f"{self.reason}; give loss_fn=, the whole of what is descended.")


def settings_now(args: Any, kwargs: Any) -> tuple[Any, ...]:
    """What a call of a loss function was given beside input and target, to compare calls by; of tensors that lie on
    a device, or are large, the shape."""
    others = list(args[2:])
    for name, value in kwargs.items():  # no generator: this is asked of every loss
        if name not in ("input", "target"):
            others.append(value)
    for i, value in enumerate(others):
        if isinstance(value, Tensor):
            others[i] = _comparable(value)
    return tuple(others)


def _comparable(t: Tensor) -> Any:
    if t.device.type != "cpu" or t.numel() > NUMBERS_OF_SETTING:
        return tuple(t.shape)
    return tuple(t.shape), tuple(t.detach().reshape(-1).tolist())


def units_of(function: Callable[..., Any], args: Any, kwargs: Any) -> Tensor | int:
    """What the mean of this loss function divides by: labels that count, by their weights, or elements."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    settings = bound.arguments
    prediction, targets = settings["input"], settings["target"]
    if function.__name__ not in ("cross_entropy", "nll_loss"):
        return int(prediction.numel())
    if targets.is_floating_point():  # probabilities of the classes
        return int(prediction.numel() // prediction.shape[min(1, prediction.ndim - 1)])
    counted = targets != settings["ignore_index"]
    if settings["weight"] is None:
        return counted.sum()
    return (settings["weight"][torch.where(counted, targets, 0)] * counted).sum()


def losses_among(outputs: Any) -> list[tuple[str | int, Tensor]]:
    """The numbers with a graph among a model's outputs, with their places: what may be its own loss."""
    if isinstance(outputs, Mapping):
        items: Any = outputs.items()
    elif isinstance(outputs, (tuple, list)):
        items = enumerate(outputs)
    else:
        items = [("loss", getattr(outputs, "loss", None))]
    return [(place, t) for place, t in items if isinstance(t, Tensor) and t.numel() == 1 and t.grad_fn is not None]


def observed_loss(forward: ForwardCall, call: SeenLossCall) -> ObservedLoss | str:
    """The loss behind `call`, checked against the value that training saw, or why it is unavailable."""
    name = call.function.__name__
    if call.moving_targets:
        return f"the targets of {name} are themselves computed from parameters, through which it is differentiated"
    found: ObservedLoss | str = (
        f"{name} is called on something that was computed from the model's outputs in a way diag cannot repeat"
    )
    for tensor in forward.leads_to(call):
        found = _observed(forward, call, tensor, name)
        if isinstance(found, ObservedLoss):
            return found
    return found


def _observed(forward: ForwardCall, call: SeenLossCall, tensor: int, name: str) -> ObservedLoss | str:
    try:
        route = route_between(forward.tensors[tensor], forward.sources[tensor], call.prediction, call.nodes)
    except Exception as error:
        return f"how {name} is called on the model's outputs could not be read ({error})"
    if route is None:
        return (
            f"{name} is called on something that was computed from the model's outputs in a way diag cannot repeat"
        )
    tail = tuple(call.targets.shape[1:]) if isinstance(call.targets, Tensor) else ()
    loss = ObservedLoss(call.function, _kept(call.settings), route, tail, tensor=tensor)
    try:
        with torch.no_grad():
            got = loss.called(forward.outputs, loss.targets(forward, call))
    except Exception as error:
        return f"{name} could not be repeated on the model's outputs ({error})"
    if not _agrees(got, call):
        return f"{name} gives another value on the model's outputs and the targets than training saw"
    return _mean_reduced(loss)


def mean_of_its_rows(loss: ObservedLoss, call: SeenLossCall) -> ObservedLoss:
    """The loss where the loop takes the mean of what the call gave for each row, also over ignored rows."""
    if call.settings.get("reduction") != "none":
        return loss
    if call.function.__name__ not in ("cross_entropy", "nll_loss"):
        return dataclasses.replace(loss, notes=())
    return dataclasses.replace(loss, settings=loss.settings | {"reduction": "none"}, notes=())


def _mean_reduced(loss: ObservedLoss) -> ObservedLoss:
    reduction = loss.settings.get("reduction", "mean")
    if reduction in ("mean", "batchmean"):
        return loss
    note = (
        f"training reduces {loss.function.__name__} by {reduction!r}; measurements use the mean over examples, as "
        "many times as training descends it"
    )
    return dataclasses.replace(loss, settings=loss.settings | {"reduction": "mean"}, notes=(note,))


def _agrees(got: Tensor, call: SeenLossCall) -> bool:
    rough = call.prediction.dtype in HALF_PRECISION or call.value.dtype in HALF_PRECISION
    tolerance = 2e-2 if rough else 1e-4
    return got.shape == call.value.shape and torch.allclose(
        got.double(), call.value.double(), rtol=tolerance, atol=1e-7, equal_nan=True
    )


def _kept(settings: Mapping[str, Any]) -> dict[str, Any]:
    # `reduction` says all that the deprecated two would; given as None they are the defaults.
    return {n: v for n, v in settings.items() if not (n in ("size_average", "reduce") and v is None)}


def detached(value: Any) -> Any:
    """The same nest of tuples, lists and mappings with its tensors cut from their graphs."""
    return map_tensors(Tensor.detach, value)


def _is_indexed(outputs: Any) -> bool:
    return isinstance(outputs, (Mapping, tuple, list))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b))
    return bool(a == b)


def _same(value: Any, default: Any) -> bool:
    return value is default or (not isinstance(value, Tensor) and value == default)


def _short(value: Any) -> str:
    return f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
