"""Several inputs told apart by their names, for checks of what the numbers of the inputs are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from diag.snapshot.batch import tensors_in

# What a batch holds besides data: answers, masks, places, times, lengths, weights.
NO_DATA = re.compile(
    r"(^|_)(labels?|targets?|masks?|ids?|idx|ind(ex|ices)|pos|positions?|t|time|steps?|times(tep)?s?|lens?|lengths?|weights?)$"
)


def named_inputs(inputs: Any) -> dict[str, Tensor]:
    """The tensors of a model's inputs by name, put together over batches: "" for the only one, else the key that it
    has in a dict, or "input 2" by its place."""
    if isinstance(inputs, Tensor):
        return {"": inputs}
    found: dict[str, list[Tensor]] = {}
    for batch in inputs if _are_batches(inputs) else (inputs,):
        for name, tensor in _named(batch if not _is_batch(batch) else (*batch[0], batch[1])):
            found.setdefault(name, []).append(tensor)
    return {name: _together(parts) for name, parts in found.items()}


def may_be_data(name: str, tensor: Tensor) -> bool:
    """Whether one of several inputs may hold the numbers of the examples: not by its name an answer, a mask, a
    place or a time, and with more than two values."""
    if NO_DATA.search(name.lower()) or not tensor.is_floating_point():
        return False
    return bool(tensor.numel()) and len(tensor.detach()[:16].unique()) > 2


def varies(tensor: Tensor) -> bool:
    """Whether not all examples have the same numbers."""
    return bool(tensor.ndim) and bool((tensor != tensor[:1]).any())


def _are_batches(inputs: Any) -> bool:
    return isinstance(inputs, tuple) and bool(inputs) and all(_is_batch(b) for b in inputs)


def _is_batch(value: Any) -> bool:
    """Arguments by position and by name, as the quantity of a snapshot has them."""
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], tuple) and type(value[1]) is dict


def _named(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _named(part, str(key))
    elif isinstance(value, (tuple, list)):
        for place, part in enumerate(value):
            yield from _named(part, name or f"input {place + 1}")
    else:
        yield from ((name, part) for part in tensors_in(value))


def _together(parts: list[Tensor]) -> Tensor:
    alike = [t for t in parts if t.shape[1:] == parts[0].shape[1:] and t.ndim]
    return torch.cat(alike) if len(alike) > 1 else parts[0]
