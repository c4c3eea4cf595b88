"""Which row of the data stands at each place of a batch: by the places that a DataLoader drew, else by a hash of
the inputs, with which a row is known again that is the same to the last bit.

A loop that takes its batches from tensors itself (`x[order[a:b]]`) shows no places; where it changes inputs at
random, too, no row is known again and nothing is said of rows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import TensorDataset

from diag.snapshot.batch import Batch, tensors_in

ROWS = 1 << 20  # rows that are followed; of a larger data set every second, third, ... one
HASHED = 1 << 18  # rows that are told apart by their hash
FULL = 1 << 12  # fewer than so many free: a batch may have no place any more
COLUMNS = 128  # numbers of a row that are hashed
INPUTS_HASHED = 3
UNSEEN_AFTER = 1 << 14  # rows without one that came again, after which inputs are taken to be always new
ALIKE = 0.02  # of a batch's rows that have another's hash: they are not told apart
NOT_AGAIN = "no row of the inputs came a second time as it was (they are changed at random, or are never repeated)"
NOT_APART = "many rows of a batch have the same inputs"

RowNumbers = NDArray[numpy.int64]


class Places:
    """Rows by their place in the data set that training's DataLoader reads."""

    counted_in = "data set"

    def __init__(self, dataset: Any, size: int) -> None:
        self.dataset, self.size = dataset, size
        self.every = max(1, -(-size // ROWS))
        self.reason = ""
        # Other data sets may read files or draw random numbers when they are asked for a row.
        self.inputs: tuple[Tensor, ...] = dataset.tensors[:1] if type(dataset) is TensorDataset else ()

    def rows(self, places: RowNumbers) -> RowNumbers:
        """The number of each row among those that are followed, -1 for the others."""
        if self.every == 1:
            return places
        return numpy.where(places % self.every == 0, places // self.every, -1)

    @property
    def capacity(self) -> int:
        """How many rows there can be."""
        return -(-self.size // self.every)

    @property
    def largest(self) -> int:
        """One more than the largest number so far."""
        return self.capacity

    @property
    def all_followed(self) -> bool:
        """Whether every row has a number."""
        return self.every == 1

    def numbers(self, n: int) -> RowNumbers:
        """The places of the rows."""
        return numpy.arange(n) * self.every


class Hashes:
    """Rows by a hash of their inputs, in the order in which they were first met; `known`: rows that come before, so
    that theirs are the first numbers."""

    every = 1

    def __init__(self, known: Iterable[Batch] = ()) -> None:
        self._rows: dict[int, int] = {}
        self._met = self._again = 0
        self._batches = list(known)
        self._told: RowNumbers | None = None  # the place of each known row, where there are such
        self.counted_in, self.reason = "", ""
        self.inputs: tuple[Tensor, ...] = ()

    def rows(self, hashes: RowNumbers) -> RowNumbers:
        """The number of each row."""
        if self._batches:
            self._begin()
        table = self._rows
        before = len(table)
        if before + len(hashes) > HASHED:
            found = [table.get(h, -1) for h in hashes.tolist()]
        else:
            found = [table.setdefault(h, len(table)) for h in hashes.tolist()]
        self._met += len(hashes)
        self._again += len(hashes) - (len(table) - before)
        if self._met > UNSEEN_AFTER and not self._again and not self.counted_in:
            self._give_up(NOT_AGAIN)
        return numpy.asarray(found, numpy.int64)

    def look(self, hashes: RowNumbers) -> None:
        """Are the rows of a batch told apart at all?"""
        if len(numpy.unique(hashes)) < (1 - ALIKE) * len(hashes) - 1:
            self._give_up(NOT_APART)

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        self._rows = {}

    def _begin(self) -> None:
        """The known rows get the first numbers; of two that are one the first counts."""
        batches, self._batches = self._batches, []
        every = [h for b in batches if (h := hashes_of(b.args, b.kwargs, b.size)) is not None]
        if len(every) != len(batches) or sum(map(len, every)) > HASHED:
            return
        flat = torch.cat(every).cpu().tolist()
        places: list[int] = []
        for place, h in enumerate(flat):
            if self._rows.setdefault(h, len(self._rows)) == len(places):
                places.append(place)
        self._told, self.counted_in = numpy.asarray(places, numpy.int64), "probe set"
        self.inputs = tuple(tensors_in((b.args, b.kwargs))[0] for b in batches)

    @property
    def capacity(self) -> int:
        """How many rows there can be."""
        return HASHED

    @property
    def largest(self) -> int:
        """One more than the largest number so far."""
        return max(len(self._rows), 1)

    @property
    def all_followed(self) -> bool:
        """Whether every row has a number."""
        return len(self._rows) < HASHED - FULL

    def numbers(self, n: int) -> RowNumbers:
        """The place of each row in the known ones, -1 for the others."""
        told = numpy.zeros(0, numpy.int64) if self._told is None else self._told
        return numpy.concatenate([told, numpy.full(max(n - len(told), 0), -1, numpy.int64)])[:n]


def hashes_of(args: Any, kwargs: Mapping[str, Any], size: int) -> Tensor | None:
    """A hash (size,) int64 of each row of the inputs, where they are; None where no tensor has so many rows.

    Bits are multiplied with fixed odd numbers and added up, in whole numbers, so that neither the batch around a
    row nor the order of summing matters.
    """
    tensors = [t for t in tensors_in((args, dict(kwargs))) if t.ndim and len(t) == size and not t.is_complex()]
    total: Tensor | None = None
    for i, t in enumerate(tensors[:INPUTS_HASHED]):
        if type(t) is not Tensor or t.layout is not torch.strided or not t.numel():
            return None
        own = _hash(t.detach(), i)
        total = own if total is None else total + own
    return total


def _hash(t: Tensor, seed: int) -> Tensor:
    flat = t.reshape(len(t), -1)
    if flat.shape[1] > COLUMNS:
        flat = flat[:, :: -(-flat.shape[1] // COLUMNS)]
    if flat.is_floating_point():
        flat = flat.float() if flat.element_size() == 2 else flat
        size, flat = flat.element_size(), flat.contiguous()
        # Two numbers of four bytes are one of eight: half as many products.
        paired = size == 4 and flat.shape[1] % 2 == 0
        flat = flat.clone() if paired and flat.storage_offset() % 2 else flat  # pairs begin at an even place
        flat = flat.view(torch.int64 if paired or size == 8 else torch.int32)
    factors = _factors(flat.shape[1], seed, flat.device)
    if flat.is_cpu:
        return torch.mv(flat.long(), factors)  # of whole numbers on the CPU alone
    return (flat.long() * factors).sum(1)


@functools.lru_cache(maxsize=64)
def _factors(columns: int, seed: int, device: torch.device) -> Tensor:
    drawn = numpy.random.default_rng(seed).integers(-(1 << 62), 1 << 62, columns) | 1
    return torch.from_numpy(drawn).to(device)
