"""From what was seen of one micro-batch to a loss that can be measured again: `loss_fn(outputs, targets)`.

An observed loss is used only after it has given, from the model's outputs and the targets, the number that
training saw. Otherwise the reason is recorded, and the user can give `loss_fn=` and `probe=`.
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

from diag.snapshot.batch import map_tensors
from diag.snapshot.forward import IGNORED_LABEL, output_tensor
from diag.watching.observe.route import Node, Route, chain_of, route_between, source_of

LOW_PRECISION = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class ForwardCall:
    """One call of the model in training, and the tensor of its outputs without its graph."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Any
    tensor: Tensor
    source: int | None

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> ForwardCall:
        """Raises MissingQuantity where the outputs hold no tensor of logits."""
        tensor = output_tensor(outputs)
        return cls(args, kwargs, detached(outputs), tensor.detach(), source_of(tensor))


@dataclass(frozen=True)
class LossCall:
    """One call of a loss function: what it was given, how that came about, and what it returned."""

    function: Callable[..., Tensor]
    settings: dict[str, Any]
    given: Tensor
    targets: Any
    nodes: list[Node]
    value: Tensor

    @classmethod
    def of(cls, function: Callable[..., Tensor], args: Any, kwargs: Any, value: Tensor) -> LossCall:
        """The call `function(input, target, ...)`."""
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        settings = dict(bound.arguments)
        given = settings.pop("input")
        return cls(function, settings, given.detach(), settings.pop("target"), chain_of(given), value.detach())


@dataclass(frozen=True)
class ObservedLoss:
    """The loss that training was seen to use, as a mean over examples: `loss_fn(outputs, targets)`."""

    function: Callable[..., Tensor]
    settings: dict[str, Any]
    route: Route
    target_tail: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        if self.route.flatten and isinstance(targets, Tensor):
            targets = targets.reshape(-1, *self.target_tail)
        return self.function(self.route(output_tensor(outputs)), targets, **self.settings)

    def targets(self, forward: ForwardCall, call: LossCall) -> Any:
        """The targets of `call` with the examples along the first axis, as `loss_fn` expects them."""
        targets = call.targets
        if not isinstance(targets, Tensor) or not self.route.flatten or len(targets) == len(forward.tensor):
            return targets
        lead = self.route.unflattened(forward.tensor).shape
        lead = lead[: len(lead) - len(self.route.tail)]
        if self.route.positions is None:
            return targets.reshape(*lead, *self.target_tail)
        ignored = self.settings.get("ignore_index", IGNORED_LABEL)
        return F.pad(targets.reshape(lead[0], -1), (0, lead[1] - self.route.positions), value=ignored)

    def describe(self) -> str:
        """The loss in words, with the settings that are not the defaults."""
        defaults = {n: p.default for n, p in inspect.signature(self.function).parameters.items()}
        shown = [f"{n}={_short(v)}" for n, v in self.settings.items() if not _same(v, defaults.get(n))]
        return f"{self.function.__name__}({', '.join(shown)})"


def observed_loss(forward: ForwardCall, call: LossCall) -> ObservedLoss | str:
    """The loss behind `call`, checked against the value that training saw, or why it cannot be had."""
    name = call.function.__name__
    try:
        route = route_between(forward.tensor, forward.source, call.given, call.nodes)
    except Exception as error:
        return f"how {name} is called on the model's outputs could not be read ({error})"
    if route is None:
        return (
            f"{name} is called on something that was computed from the model's outputs in a way diag cannot repeat"
        )
    tail = tuple(call.targets.shape[1:]) if isinstance(call.targets, Tensor) else ()
    loss = ObservedLoss(call.function, _kept(call.settings), route, tail)
    try:
        with torch.no_grad():
            got = loss(forward.outputs, loss.targets(forward, call))
    except Exception as error:
        return f"{name} could not be repeated on the model's outputs ({error})"
    if not _agrees(got, call):
        return f"{name} gives another value on the model's outputs and the targets than training saw"
    return _mean_reduced(loss)


def _mean_reduced(loss: ObservedLoss) -> ObservedLoss:
    reduction = loss.settings.get("reduction", "mean")
    if reduction in ("mean", "batchmean"):
        return loss
    note = f"training reduces {loss.function.__name__} by {reduction!r}; measurements use the mean over examples"
    return dataclasses.replace(loss, settings=loss.settings | {"reduction": "mean"}, notes=(note,))


def _agrees(got: Tensor, call: LossCall) -> bool:
    rough = call.given.dtype in LOW_PRECISION or call.value.dtype in LOW_PRECISION
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


def _same(value: Any, default: Any) -> bool:
    return value is default or (not isinstance(value, Tensor) and value == default)


def _short(value: Any) -> str:
    return f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
