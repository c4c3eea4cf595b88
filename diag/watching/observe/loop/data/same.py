"""Is a data set that is made again each epoch the one that was there before? Place for place the same rows are."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset

ENTRIES_COMPARED = 64  # of tensors that lie elsewhere in memory
NESTED_AT_MOST = 8  # data sets in data sets, lists in lists


def same_rows(one: Any, other: Any) -> bool:
    """Whether two data sets are of one class and length and hold the same rows, as far as that can be told:
    tensors, arrays and lists by some of their entries, numbers by their values. What is called (a transform) may
    differ. Of two that hold no rows (they read or make them) nothing is known."""
    if one is other:
        return True
    try:
        alike = type(one) is type(other) and len(one) == len(other)
        return alike and _holds_rows(one, NESTED_AT_MOST) and _same(one, other, NESTED_AT_MOST)
    except Exception:  # a length or a comparison of the user's own
        return False


def _holds_rows(one: Any, depth: int) -> bool:
    if isinstance(one, Dataset) and depth:
        return any(_holds_rows(part, depth - 1) for part in vars(one).values())
    if isinstance(one, tuple) and depth:
        return any(_holds_rows(part, depth - 1) for part in one)
    if isinstance(one, (Tensor, numpy.ndarray)) and not one.ndim:
        return False  # a number, as a mean to take off, has no length
    return isinstance(one, (Tensor, numpy.ndarray, list)) and len(one) > 1


def _same(one: Any, other: Any, depth: int) -> bool:
    if one is other:
        return True
    if type(one) is not type(other) or not depth:
        return False
    if isinstance(one, Tensor):
        return _same_tensors(one, other)
    if isinstance(one, numpy.ndarray):
        rows: Any = _spread(len(one)) if one.ndim else ...
        return one.shape == other.shape and bool(numpy.array_equal(one[rows], other[rows]))
    if isinstance(one, Dataset):
        return _same(vars(one), vars(other), depth - 1)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k], depth - 1) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(_same(one[i], other[i], depth - 1) for i in _spread(len(one)))
    plain = isinstance(one, (int, float, str, bytes, range, slice))
    return bool(one == other) if plain else callable(one)


def _same_tensors(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    if one.data_ptr() == other.data_ptr() and one.stride() == other.stride():
        return True
    rows: Any = _spread(len(one)) if one.ndim else ...
    return one.is_cpu and bool(torch.equal(one[rows], other[rows]))


def _spread(n: int) -> list[int]:
    """Some of n places, from the first to the last."""
    return sorted({i * (n - 1) // max(min(n, ENTRIES_COMPARED) - 1, 1) for i in range(min(n, ENTRIES_COMPARED))})
