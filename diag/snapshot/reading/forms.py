"""Batches in the normal form, whatever form the user's data has.

A batch comes as `(inputs, targets)`, as a dict (Hugging Face style: the key "labels" or "label" holds
the targets and the rest are keyword arguments of the model), or as what the user's `unpack=` makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from diag.errors import InvalidInput, type_of
from diag.snapshot.batch import LABEL_KEYS, Batch, like_mapping, tensors_in


def as_batch(item: Any, unpack: Callable[[Any], tuple[Any, Any]] | None = None, own_loss: bool = False) -> Batch:
    """Bring one item of a data loader into the normal form.

    own_loss: the model computes the loss by itself, so that a dict may have no labels: all of it is the model's.
    Raises InvalidInput where `item` has none of the known forms or holds no example.
    """
    if isinstance(item, Batch):
        return item
    if own_loss and not unpack and isinstance(item, Mapping) and not any(key in item for key in LABEL_KEYS):
        inputs, targets = as_tensors(item), None
    else:
        inputs, targets = map(as_tensors, _unpacked(item, unpack) if unpack else _split_item(item))
    several = isinstance(inputs, (tuple, list)) and not isinstance(inputs, PackedSequence)
    if isinstance(inputs, Mapping):
        args, kwargs = (), dict(inputs)
    else:
        args, kwargs = (tuple(inputs) if several else (inputs,)), {}
    size = batch_size(targets, (args, kwargs))
    if size == 0:
        raise InvalidInput("The data holds a batch with no examples; give at least one example.")
    keys = [] if unpack or not isinstance(item, Mapping) else [key for key in LABEL_KEYS if key in item]
    return Batch(args, kwargs, targets, size, label_key=keys[0] if keys else "")


def as_tensors(value: Any) -> Any:
    """NumPy arrays, in nested tuples, lists and dicts too, as tensors of their own types; all else stays.

    Raises InvalidInput for an array that is of no type of torch's.
    """
    if isinstance(value, numpy.ndarray):
        try:
            return torch.from_numpy(numpy.ascontiguousarray(value, value.dtype.newbyteorder("=")))
        except TypeError:
            raise InvalidInput(
                f"The data hold a NumPy array of dtype {value.dtype}; expected numbers, as torch.from_numpy takes."
            ) from None
    if isinstance(value, Mapping):
        items = {key: as_tensors(item) for key, item in value.items()}
        return value if all(items[key] is item for key, item in value.items()) else like_mapping(value, items)
    if type(value) in (tuple, list):
        made = type(value)(map(as_tensors, value))
        return value if all(a is b for a, b in zip(made, value, strict=True)) else made
    return value


def _unpacked(item: Any, unpack: Callable[[Any], tuple[Any, Any]]) -> tuple[Any, Any]:
    made = unpack(item)
    if not isinstance(made, (tuple, list)) or len(made) != 2:
        raise InvalidInput(f"unpack(batch) gave {type_of(made)}; expected a pair (inputs, targets).")
    return made[0], made[1]


def as_batches(
    data: Any, unpack: Callable[[Any], tuple[Any, Any]] | None = None, own_loss: bool = False
) -> Iterator[Batch]:
    """Iterate over `data`: one batch, or any iterable of batches (a DataLoader, a list)."""
    if _is_one_batch(data):
        yield as_batch(data, unpack, own_loss)
        return
    if not isinstance(data, Iterable):
        raise InvalidInput(
            f"The data is {type_of(data)}; expected a DataLoader, a list of batches, or one batch "
            "(inputs, targets)."
        )
    for item in data:
        yield as_batch(item, unpack, own_loss)


def _is_one_batch(data: Any) -> bool:
    if isinstance(data, (Batch, Mapping)):
        return True
    return (
        isinstance(data, (tuple, list))
        and len(data) == 2
        and _holds_tensor(data[0])
        and not (
            # A list of two batches looks like a pair at first sight; its second half is a batch itself.
            isinstance(data[1], (tuple, list, Mapping)) and isinstance(data, list)
        )
    )


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, PackedSequence):
        return True
    if isinstance(value, Mapping):
        return any(_holds_tensor(item) for item in value.values())
    if isinstance(value, (tuple, list)):
        return any(isinstance(item, Tensor | PackedSequence | numpy.ndarray) for item in value)
    return isinstance(value, (Tensor, numpy.ndarray))


def _split_item(item: Any) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        rest = dict(item)
        for key in LABEL_KEYS:
            if key in rest:
                return rest, rest.pop(key)
        raise InvalidInput(
            f"A batch is a dict with the keys {sorted(map(str, item))} and none of {list(LABEL_KEYS)}; "
            "name the targets so, or give unpack= to say how to split a batch into inputs and targets."
        )
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return item[0], item[1]
    found = type_of(item) + (f" of length {len(item)}" if hasattr(item, "__len__") else "")
    raise InvalidInput(
        f"A batch is {found}; expected (inputs, targets) or a dict with labels: give unpack= to say how to "
        "split it."
    )


def batch_size(targets: Any, inputs: Any) -> int:
    """The number of examples. Raises InvalidInput where there is no tensor."""
    packed = _packed_in((targets, inputs))
    if packed is not None:
        return int(packed.batch_sizes[0])
    for value in (targets, inputs):
        sizes = [t.shape[0] for t in tensors_in(value) if t.ndim]
        if sizes:
            return sizes[0]
    raise InvalidInput("A batch holds no tensor; expected tensors for the inputs and the targets.")


def _packed_in(value: Any) -> PackedSequence | None:
    """The first PackedSequence in nested tuples, lists and dicts."""
    if isinstance(value, PackedSequence):
        return value
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return next((found for item in inner if (found := _packed_in(item)) is not None), None)
