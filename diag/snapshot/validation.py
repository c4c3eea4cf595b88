"""Convert and validate at the door, once, so that nothing behind it has to: the arguments of a snapshot, and the
quantities of instruments.

Arrays and lists become tensors; a wrong type, shape or range, an empty or non-finite tensor, or axes that do
not match between quantities give one sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diag.door import brought_to
from diag.errors import InvalidInput, first_line, named, type_of
from diag.linalg.deadline import NEVER, Deadline
from diag.ranges import Count
from diag.snapshot.glossary import HELD_OUT, lookup

BY_LAYER = "by_layer"  # of ranks=
AXES = {"m": "examples", "n": "examples", "K": "classes", "d": "features"}


def check_model_and_loss(model: Any, loss_fn: Any) -> None:
    """Raise InvalidInput where these are not of their kinds."""
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"The model is {type_of(model)}; expected a torch.nn.Module.")
    if isinstance(loss_fn, type) and issubclass(loss_fn, nn.Module):
        raise InvalidInput(f"loss_fn is {type_of(loss_fn)}; expected one that is made: {loss_fn.__name__}().")
    if loss_fn is not None and not callable(loss_fn):
        raise InvalidInput(f"loss_fn is {type_of(loss_fn)}; expected loss_fn(outputs, targets).")


def checked_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers among the arguments of a snapshot, converted; raises InvalidInput where one of all is unfit."""
    check_model_and_loss(arguments["model"], arguments["loss_fn"])
    numbers = {
        "seed": brought_to(arguments["seed"], int, f"seed is {arguments['seed']!r}; expected a whole number.")
    }
    for name in ("micro_batch", "max_examples"):
        count = f"{name} is {arguments[name]!r}; expected a number of examples, 1 or more."
        numbers[name] = brought_to(arguments[name], Count | None, count)
    if arguments["unpack"] is not None and not callable(arguments["unpack"]):
        raise InvalidInput(
            f"unpack is {type_of(arguments['unpack'])}; expected unpack(batch) -> (inputs, targets)."
        )
    _check_device(arguments["device"])
    if not isinstance(arguments["deadline"], Deadline):
        raise InvalidInput(f"deadline is {type_of(arguments['deadline'])}; expected a Deadline, or none.")
    if isinstance(arguments["ranks"], str) and arguments["ranks"] != BY_LAYER:
        raise InvalidInput(f"ranks is {arguments['ranks']!r}; expected True, False or {BY_LAYER!r}.")
    if arguments["ranks"] and arguments["deadline"] is not NEVER:
        raise InvalidInput(
            "A snapshot over ranks= takes no deadline=, which ranks would reach at other times; leave it out."
        )
    return numbers


def _check_device(device: Any) -> None:
    try:
        made = torch.device(device or "cpu")
    except (RuntimeError, TypeError):
        raise InvalidInput(f"device is {device!r}; expected one such as 'cpu' or 'cuda:0'.") from None
    try:
        torch.empty(0, device=made)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InvalidInput(
            f"device is {device!r}, which is not on this machine ({first_line(error)}); give another, or none."
        ) from None


def checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as tensors and objects of the kinds that the glossary states.

    Raises InvalidInput: see the module's text. Axes named alike must have equal lengths; held-out data has
    its own number of examples. Labels must lie in [0, K) where K is known.
    """
    lengths: dict[str, tuple[int, str]] = {}
    result = {}
    for name, value in values.items():
        row = lookup(name)
        if value is None or row.kind == "object":
            result[name] = value
            continue
        tensor = _tensor(name, value, row.kind)
        _check_axes(name, tensor, (row.shape or "").split(), lengths)
        _check_finite(name, tensor, allow_minus_infinity=row.name in ("logits", "previous_logits"))
        result[name] = tensor
    _check_labels(result, lengths)
    return result


def _tensor(name: str, value: Any, kind: str) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"{name} is {type_of(value)}; expected a tensor or an array.") from error
    if kind == "floating" and not tensor.is_floating_point():
        raise InvalidInput(f"{name} have dtype {tensor.dtype}; expected a floating type: convert with .float().")
    if kind == "integer" and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool):
        raise InvalidInput(f"{name} have dtype {tensor.dtype}; expected class numbers of an integer type.")
    return tensor.detach()


def _check_axes(name: str, tensor: Tensor, axes: list[str], lengths: dict[str, tuple[int, str]]) -> None:
    if tensor.ndim != len(axes):
        expected = f"{len(axes)} {'axis' if len(axes) == 1 else 'axes'} ({', '.join(AXES[a] for a in axes)})"
        raise InvalidInput(f"{name} have shape {tuple(tensor.shape)}; expected {expected}.")
    for axis, length in zip(axes, tensor.shape, strict=True):
        if length == 0:
            raise InvalidInput(f"{name} have no {AXES[axis]} (shape {tuple(tensor.shape)}); give at least one.")
        if axis == "K" and length < 2:
            raise InvalidInput(f"{name} have {length} class; expected at least 2.")
        key = HELD_OUT + axis if axis in ("m", "n") and name.startswith(HELD_OUT) else axis
        known, owner = lengths.setdefault(key, (length, name))
        if known != length:
            raise InvalidInput(
                f"{name} have {length} {AXES[axis]} and {owner} have {known}; expected equal numbers."
            )


def _check_finite(name: str, tensor: Tensor, allow_minus_infinity: bool) -> None:
    if not tensor.is_floating_point():
        return
    if tensor.itemsize < 2:  # torch has no such test for the 8-bit types
        tensor = tensor.float()
    # A logit of minus infinity is how a model rules a class out (a padded vocabulary), so it is legal.
    bad = torch.isnan(tensor) | torch.isposinf(tensor) if allow_minus_infinity else ~torch.isfinite(tensor)
    rows = bad.reshape(len(tensor), -1).any(1).nonzero().flatten().tolist()
    if rows:
        raise InvalidInput(
            f"{name} are not finite in {len(rows)} of {len(tensor)} rows (rows {named(rows, 5)}); expected "
            "finite numbers: leave these rows out or look for the step at which training broke."
        )


def _check_labels(values: Mapping[str, Any], lengths: Mapping[str, tuple[int, str]]) -> None:
    for name in ("labels", HELD_OUT + "labels"):
        labels = values.get(name)
        if labels is None:
            continue
        low, high = int(labels.min()), int(labels.max())
        classes, owner = lengths.get("K", (None, ""))
        if low < 0 or (classes is not None and high >= classes):
            bound = f"0 to {classes - 1} ({owner} have {classes} classes)" if classes else "0 or more"
            raise InvalidInput(f"{name} range from {low} to {high}; expected class numbers from {bound}.")
