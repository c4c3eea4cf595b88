"""What stands for the objects of a pickle that is only followed, and what of them is refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

HEAVY = 1000  # parts of a key, counted as often as they would be hashed
# Storage classes by the bytes of an element.
ELEMENTS = {
    1: {"Untyped", "Byte", "Char", "Bool", "QUInt8", "QInt8", "QUInt4x2", "QUInt2x4"},
    2: {"Half", "BFloat16", "Short"},
    4: {"Float", "Int", "QInt32"},
    8: {"Double", "Long", "ComplexFloat"},
    16: {"ComplexDouble"},
}


class Refused(ValueError):
    """Why the pickle is not read, as the end of a sentence about its file."""


class Global(NamedTuple):
    """A class or function by its dotted name."""

    name: str


class Stored(NamedTuple):
    """A storage that lies elsewhere in the checkpoint: `itemsize` bytes each of `numel` elements."""

    key: str
    location: str
    itemsize: int
    numel: int


class Pack(tuple[Any, ...]):
    """A tuple, with the number of parts that hashing it would visit."""

    weight: int


class PickledCall(NamedTuple):
    """What a function or class would make of these arguments."""

    function: str
    arguments: Any
    weight: int


class Opaque:
    """A dict, a set, or an object whose state is not followed."""


def stored_named(identity: Any) -> Stored:
    """The storage that a persistent id names; raises Refused where it is none."""
    if not (isinstance(identity, Pack) and len(identity) in (5, 6) and plain_text(identity[0]) == "storage"):
        raise Refused("holds a pickle that names something outside it that is not a storage")
    kind, key, location, numel = identity[1:5]
    size = _itemsize(kind.name) if isinstance(kind, Global) else None
    if size is None or type(numel) is not int or numel < 0:
        raise Refused("names a storage of a kind or length that does not exist")
    return Stored(plain_text(key), plain_text(location), size, numel)


def _itemsize(storage: str) -> int | None:
    """Bytes an element of a storage class; None where there is no such class."""
    name = storage.rpartition(".")[2].removesuffix("Storage")
    return next((size for size, names in ELEMENTS.items() if name in names), None)


def check_view(storage: Any, view: Iterable[Any], dtype: Any) -> None:
    """Raise Refused where a tensor reaches beyond its storage."""
    offset, size, stride = (_sizes(v) if i else v for i, v in enumerate(view))
    if not isinstance(storage, Stored) or type(offset) is not int or size is None or stride is None:
        raise Refused("describes a tensor in a way that torch does not write")
    item = storage.itemsize
    if isinstance(dtype, Global):
        found = vars(torch).get(dtype.name.rpartition(".")[2])
        item = found.itemsize if isinstance(found, torch.dtype) else item
    if len(size) != len(stride) or min((offset, *size, *stride), default=0) < 0:
        raise Refused("describes a tensor of negative size")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if all(size) and (last + 1) * item > storage.numel * storage.itemsize:
        raise Refused("describes a tensor that reaches beyond its storage")


def _sizes(value: Any) -> tuple[int, ...] | None:
    if isinstance(value, PickledCall) and value.function == "torch.Size" and value.arguments:
        value = value.arguments[0]
    return value if isinstance(value, tuple | list) and all(type(n) is int for n in value) else None  # type: ignore


def hashed_keys(arguments: Pack) -> Iterable[Any]:
    """What a dict, a counter or a set made of these arguments would hash."""
    for argument in arguments:
        for item in argument if isinstance(argument, tuple | list) else ():
            yield item[0] if isinstance(item, tuple | list) and len(item) == 2 else item


def hashing_weight(value: Any) -> int:
    """How many parts hashing it would visit."""
    return value.weight if isinstance(value, Pack | PickledCall) else 1


def refuse_heavy(key: Any) -> None:
    """Raise Refused for a key that would take forever to hash."""
    if hashing_weight(key) > HEAVY:
        raise Refused("holds a dict whose keys would take forever to read")


def plain_text(value: Any) -> str:
    """A name of the pickle as text."""
    return value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)[:200]
