"""Is the stored data written into while it is trained on? What batches are slices of, and what data sets keep.

A slice of a tensor shares its memory: `x = data[a:b]; x.add_(noise)` changes the data. Some rows are looked at
again where a later batch holds them, and some of a data set's arrays at each of its epochs, on the host.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.data import Dataset

from diag.snapshot.loop.inputs import StoredFacts
from diag.watching.observe.loop.data.stream import bytes_of
from diag.watching.observe.loop.modes import first_tensor, is_dense
from diag.watching.observe.loop.moment import Moment

ROWS_MARKED_EVERY, ROWS_REMEMBERED = 16, 1 << 12  # rows of a slice that are remembered
SAMPLED_ROWS, SAMPLED_NUMBERS = 64, 64  # of an array of a data set
ARRAYS_FOLLOWED, DATA_SETS_INSIDE = 4, 4
ARRAYS_REMEMBERED = 64  # of all data sets
STILL_ALIKE = 0.3  # correlation with what it was: below, the rows are others, as data made again is
WRITTEN_NEWS = (20, 40, 80)
EPOCHS_NEWS = (2, 3, 4)


class _Seen(NamedTuple):
    """Some numbers of an array, and whether the memory that it lies in is still its own."""

    numbers: NDArray[numpy.float64]
    is_there: Callable[[], bool]


class StoredData:
    """Follows the tensors that inputs are slices of, and the arrays of data sets."""

    def __init__(self, moment: Moment) -> None:
        self._moment = moment
        self._version = self._memory = -1
        self._slices = self._written = self._again = self._changed = 0
        self._rows: dict[int, bytes] = {}
        self._arrays: dict[tuple[int, tuple[int, ...]], _Seen] = {}  # by address and shape
        self._epochs = self._epochs_changed = 0
        self._spreads: list[float] = []

    # Slices

    def training_call(self, args: Any, kwargs: Mapping[str, Any]) -> None:
        """The model was called in training."""
        t = first_tensor(args, kwargs)
        plain = t is not None and t.is_cpu and is_dense(t) and t.ndim > 1 and not t.requires_grad
        base = t._base if t is not None and plain else None
        if t is None or base is None or base.numel() < 2 * t.numel() or not t.numel() or not t.stride(0):
            return
        if base.data_ptr() != self._memory:
            self._memory, self._version, self._rows = base.data_ptr(), t._version, {}
            self._slices = self._written = self._again = self._changed = 0
            return
        self._slices += 1
        self._written += t._version > self._version
        self._version = t._version
        self._look_again(t)
        if reached := sum(self._changed >= n for n in WRITTEN_NEWS):
            self._moment.news(("written", reached), "stored")

    def _look_again(self, t: Tensor) -> None:
        first = t.storage_offset() // t.stride(0)
        for row in range(-first % ROWS_MARKED_EVERY, len(t), ROWS_MARKED_EVERY):
            now = bytes_of(t[row].reshape(-1)[:SAMPLED_NUMBERS])
            before = self._rows.get(first + row)
            if before is not None:
                self._again += 1
                self._changed += before != now
            if before is not None or len(self._rows) < ROWS_REMEMBERED:
                self._rows[first + row] = now

    # Data sets

    def loader_started(self, dataset: Any) -> None:
        """An epoch of a DataLoader over this data set begins."""
        if not torch.is_grad_enabled():
            return
        found = {}
        for array in islice(_arrays(dataset, DATA_SETS_INSIDE), ARRAYS_FOLLOWED):
            where = array.data_ptr() if isinstance(array, Tensor) else array.ctypes.data
            found[where, tuple(array.shape)] = _Seen(_sample(array), _memory(array))
        # Another array may have come to lie where one was that is gone: data that is made again for each epoch.
        known = {key: seen for key, seen in self._arrays.items() if seen.is_there()}
        again = [(known.pop(key).numbers, now.numbers) for key, now in found.items() if key in known]
        self._arrays = dict(list((known | found).items())[-ARRAYS_REMEMBERED:])
        if again:
            changed = [(a, b) for a, b in again if _is_changed(a, b)]
            self._epochs += 1
            self._epochs_changed += bool(changed)
            if changed:
                self._spreads = [*(self._spreads or [float(changed[0][0].std())]), float(changed[0][1].std())]
            if self._epochs_changed in EPOCHS_NEWS:
                self._moment.news(("stored", self._epochs_changed), "stored")

    def facts(self) -> StoredFacts:
        """As plain data."""
        return StoredFacts(
            slices=self._slices,
            written=self._written,
            rows_again=self._again,
            rows_changed=self._changed,
            epochs=self._epochs,
            epochs_changed=self._epochs_changed,
            spread_before=self._spreads[0] if self._spreads else math.nan,
            spread=self._spreads[-1] if self._spreads else math.nan,
        )


def _arrays(dataset: Any, depth: int) -> Iterator[Tensor | NDArray[Any]]:
    """The floating tensors and arrays of a data set that have an entry an example."""
    if not isinstance(dataset, Dataset) or not depth:
        return
    for kept in vars(dataset).values():
        for value in kept if isinstance(kept, tuple) else (kept,):
            if isinstance(value, Dataset):
                yield from _arrays(value, depth - 1)
            elif _holds_examples(value):
                yield value


def _holds_examples(value: Any) -> bool:
    if isinstance(value, Tensor):
        floating = value.is_cpu and is_dense(value) and value.is_floating_point()
    else:
        floating = isinstance(value, numpy.ndarray) and value.dtype.kind == "f"
    return floating and value.ndim > 0 and len(value) >= SAMPLED_ROWS


def _memory(array: Tensor | NDArray[Any]) -> Callable[[], bool]:
    """A function that says whether the memory in which the array lies has not been freed since."""
    if isinstance(array, Tensor):
        storage = StorageWeakRef(array.untyped_storage())
        return lambda: not storage.expired()
    while isinstance(array.base, numpy.ndarray):
        array = array.base
    owner = weakref.ref(array)
    return lambda: owner() is not None


def _sample(array: Tensor | NDArray[Any]) -> NDArray[numpy.float64]:
    """Some numbers of some rows, (rows, numbers), as they are now."""
    whole = array.detach() if isinstance(array, Tensor) else array
    rows = whole[:: max(len(whole) // SAMPLED_ROWS, 1)][:SAMPLED_ROWS]
    flat = rows.reshape(len(rows), -1)
    some = flat[:, :: max(flat.shape[1] // SAMPLED_NUMBERS, 1)][:, :SAMPLED_NUMBERS]
    return numpy.array(some.double().numpy() if isinstance(some, Tensor) else some, numpy.float64)


def _is_changed(before: NDArray[numpy.float64], now: NDArray[numpy.float64]) -> bool:
    """Whether most rows have other numbers, which are still like those that they had."""
    if (before == now).all(1).mean() > 0.5 or not (numpy.isfinite(before).all() and numpy.isfinite(now).all()):
        return False
    a, b = before - before.mean(), now - now.mean()
    size = float(numpy.sqrt((a**2).sum() * (b**2).sum()))
    return size > 0 and float((a * b).sum()) / size >= STILL_ALIKE
