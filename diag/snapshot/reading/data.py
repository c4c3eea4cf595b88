"""The data of a snapshot, read once: in micro-batches, without a trace in the random states, and with an end."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from diag.distributed.checksums import checksum_of
from diag.distributed.placement import is_spread
from diag.distributed.together import Together
from diag.errors import InvalidInput, Unsupported
from diag.snapshot.batch import Batch, tensors_in
from diag.snapshot.preserve import generator_states, random_states, seed_generators
from diag.snapshot.reading.forms import as_batches
from diag.snapshot.state.host import as_the_program

NOT_DENSE = "The data hold {} tensors, which are not cut into examples here; give them as dense tensors."
# What is read of data that may never end: as many examples, or as many bytes.
MOST_EXAMPLES_READ, MOST_BYTES_READ = 8_192, 1 << 28
EXAMPLES_IN_PART = 8  # at least, of a batch that was cut: two of them may be alike
CUT = (
    "The data does not say where it ends, so only its first {:,} examples were read; give max_examples= for "
    "another number of them."
)


@dataclass(frozen=True)
class Cut:
    """How data was cut as it was read.

    short: a sentence where there may be more of it. part: the first examples of the first batch that was cut, by
    micro_batch= or between ranks, as one batch: as many as a micro-batch has, or a few more. first: the number of
    the first batch that holds them.
    """

    short: str = ""
    part: Batch | None = None
    first: int = 0


def read_batches(
    data: Any,
    unpack: Callable[[Any], tuple[Any, Any]] | None,
    limit: int | None,
    micro_batch: int | None,
    device: torch.device | str | None,
    seed: int,
    settled: Callable[[Batch], Batch] = lambda batch: batch,
    own_loss: bool = False,
) -> tuple[tuple[Batch, ...], Cut]:
    """The first `limit` examples of `data` as micro-batches, and how they were cut.

    own_loss: the model computes the loss. settled: says of a batch on the device how it is cut. Data without a
    length, or that goes on beyond it, may never end: where no limit is given, it is cut, with a warning. Raises
    InvalidInput where there is no batch, Unsupported for sparse data.
    """
    read = _Read(_length(data) if limit is None else None, limit)
    batches: list[Batch] = []
    part, first = None, 0
    # Iterating a DataLoader draws from the global random state, or from the loader's own generator.
    with random_states(), generator_states(data), as_the_program():
        seed_generators(seed)
        for batch in read.first_examples(settled(dense(b.to(device))) for b in as_batches(data, unpack, own_loss)):
            parts = list(batch.split(micro_batch))
            if part is None and len(parts) > 1:
                part, first = batch.few(max(parts[0].size, EXAMPLES_IN_PART)), len(batches)
            batches += parts
    if not batches:
        raise InvalidInput("The data holds no batch; give at least one example.")
    if read.cut:
        warnings.warn(read.cut, stacklevel=2)
    return tuple(batches), Cut(read.cut, part, first)


def dense(batch: Batch) -> Batch:
    """The batch itself. Raises Unsupported where one of its tensors is sparse, nested, of another layout, or spread
    over processes."""
    for t in tensors_in((batch.args, batch.kwargs, batch.targets)):
        if is_spread(t):
            raise Unsupported(NOT_DENSE.format("distributed"))
        if t.layout is not torch.strided or t.is_nested:
            kind = "nested" if t.is_nested else str(t.layout).removeprefix("torch.")
            raise Unsupported(NOT_DENSE.format(kind))
    return batch


def all_alike(batches: tuple[Batch, ...], ranks: Together) -> bool:
    """Whether every rank was given the same batches."""
    sums = [checksum_of(t).cpu() for b in batches for t in tensors_in((b.args, b.kwargs, b.targets))]
    own = sum((place * s for place, s in enumerate(sums, 1)), torch.zeros((), dtype=torch.int64))
    return bool(ranks.same(own.reshape(1)))


def shared_out(batches: tuple[Batch, ...], ranks: Together, cut: Cut) -> tuple[tuple[Batch, ...], Cut]:
    """This rank's share, and how it was cut: all of its batches, or its part of them where every rank was given the
    same ones.

    Raises InvalidInput where there are fewer examples than ranks.
    """
    if not all_alike(batches, ranks):
        return batches, cut
    size = sum(batch.size for batch in batches)
    if size < ranks.world:
        raise InvalidInput(f"There are {size} examples for {ranks.world} ranks; give at least one for each.")
    first, last = (size * r // ranks.world for r in (ranks.rank, ranks.rank + 1))
    found: list[Batch] = []
    start, own = 0, Cut(cut.short)
    if cut.part is not None and first == 0 and sum(b.size for b in batches[: cut.first]) + cut.part.size <= last:
        own = cut
    for batch in batches:
        a, b = max(first - start, 0), min(last - start, batch.size)
        if a < b and b - a < batch.size and own.part is None:
            own = Cut(cut.short, batch.slice(a, b).few(EXAMPLES_IN_PART), len(found))
        found += [batch.slice(a, b)] if a < b else []
        start += batch.size
    return tuple(found), own


def equally_many(batches: tuple[Batch, ...], ranks: Together) -> tuple[Batch, ...]:
    """The batches, cut further where another rank has more of them.

    Raises InvalidInput, on every rank, where one has fewer examples than another has batches.
    """
    most = int(ranks.most(len(batches)))
    fewest = int(ranks.least(sum(1 if batch.coupled else batch.size for batch in batches)))
    if fewest < most:
        raise InvalidInput(
            f"A rank can cut its data into {fewest} batches and another has {most}; give all ranks about as many "
            "examples, in batches of one size."
        )
    found = list(batches)
    while len(found) < most:
        largest = max(range(len(found)), key=lambda i: 0 if found[i].coupled else found[i].size)
        found[largest : largest + 1] = found[largest].split(-(-found[largest].size // 2))
    return tuple(found)


class _Read:
    """length: batches that the data says it has; None where it does not, or where it does not matter."""

    def __init__(self, length: int | None, limit: int | None) -> None:
        self._length, self._limit = length, limit
        self._batches = self._examples = self._bytes = 0
        self.cut = ""

    def first_examples(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if self._limit is None and self._is_endless():
                self.cut = CUT.format(self._examples)
                return
            if self._limit is not None and self._examples + batch.size > self._limit and not batch.coupled:
                batch = batch.slice(0, self._limit - self._examples)
            self._count(batch)
            yield batch
            if self._limit is not None and self._examples >= self._limit:
                return

    def _count(self, batch: Batch) -> None:
        self._batches += 1
        self._examples += batch.size
        self._bytes += sum(t.nbytes for t in tensors_in((batch.args, batch.kwargs, batch.targets)))

    def _is_endless(self) -> bool:
        beyond = self._length is None or self._batches >= self._length
        return beyond and (self._examples >= MOST_EXAMPLES_READ or self._bytes >= MOST_BYTES_READ)


def _length(data: Any) -> int | None:
    try:
        return operator.index(len(data))
    except Exception:  # a loader may fail in any way where its data set has no length
        return None
