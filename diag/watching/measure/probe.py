"""The probe set: the fixed examples on which every measurement of a run is made, so that curves compare.

By default these are the first examples that training saw, each once, as it saw them (augmented where it augments).
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from diag.errors import InvalidInput
from diag.snapshot.batch import Batch, map_tensors, tensors_in
from diag.snapshot.reading.data import dense
from diag.snapshot.reading.forms import batch_size

PROBE_EXAMPLES = 512
# Inputs and outputs are held for all examples at once, so a language model's vocabulary bounds their number.
PROBE_BYTES = 1 << 28


class Probe:
    """Collects up to `limit` examples, fewer where inputs and outputs would take more than `limit_bytes`."""

    def __init__(self, limit: int = PROBE_EXAMPLES, limit_bytes: int = PROBE_BYTES) -> None:
        self.batches: list[Batch] = []
        self.complete = False
        self._limit, self._limit_bytes = limit, limit_bytes
        self._seen: set[bytes] = set()
        self._form: Any = None  # of the first call without targets

    @property
    def size(self) -> int:
        """The number of examples so far."""
        return sum(b.size for b in self.batches)

    def add(self, args: tuple[Any, ...], kwargs: dict[str, Any], targets: Any, outputs: Any) -> None:
        """Add copies of the examples of one micro-batch that are not in the set yet, as far as there is room.

        Raises Unsupported for sparse inputs.
        """
        size = _examples(args, kwargs, targets)
        if size is None or self.complete:
            return
        batch = dense(Batch(args, dict(kwargs), targets, size))
        if not _may_be_cut(batch):
            self._add_whole(batch)
            return
        each = sum(t.numel() * t.element_size() for t in tensors_in((args, kwargs, targets, outputs))) / size
        limit = min(self._limit, max(1, int(self._limit_bytes / max(each, 1))))
        rows = self._new_rows(batch)
        # Nothing new: the data has been seen once. Too much: the set is full.
        self.complete = not rows or self.size + len(rows) >= limit
        rows = rows[: max(limit - self.size, 0)]
        if rows:
            self.batches.append(_selected(batch, rows))

    def add_call(self, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        """The same of a call of which the targets are not known; calls of another form than the first are left out.

        That the first axis holds the examples must be seen by itself: some output is as long, and some input has
        more axes than that one.
        """
        inputs = tensors_in((args, kwargs))
        size = _examples(args, kwargs, None)
        form = [(t.dtype, t.ndim, t.shape[2:]) for t in inputs]
        rows = any(t.ndim > 1 for t in inputs) and any(t.ndim and t.shape[0] == size for t in tensors_in(outputs))
        if rows and (self._form is None or form == self._form):
            self._form = form
            self.add(args, kwargs, None, outputs)

    def take_over(self, other: Probe) -> None:
        """Be the set that `other` has become."""
        self.batches, self.complete = other.batches, True

    def _add_whole(self, batch: Batch) -> None:
        """Of batches that may not be cut one is enough, of whatever size."""
        held = tensors_in((batch.args, batch.kwargs, batch.targets))
        self.complete = True
        if not self.batches and sum(t.nbytes for t in held) <= self._limit_bytes:
            args, kwargs, targets = (
                map_tensors(lambda t: t.detach().clone(), x) for x in (batch.args, batch.kwargs, batch.targets)
            )
            self.batches.append(replace(batch, args=args, kwargs=kwargs, targets=targets))

    def _new_rows(self, batch: Batch) -> list[int]:
        # A small data set comes round again while the set is being filled; an example is taken once.
        columns = [
            t.detach().cpu() for t in tensors_in((batch.args, batch.kwargs, batch.targets)) if _by_row(t, batch)
        ]
        new = []
        for row in range(batch.size):
            digest = hashlib.blake2b(digest_size=12)
            for column in columns:
                digest.update(column[row].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            if digest.digest() not in self._seen:
                self._seen.add(digest.digest())
                new.append(row)
        return new


def _by_row(t: Tensor, batch: Batch) -> bool:
    return t.ndim > 0 and t.shape[0] == batch.size


def _may_be_cut(batch: Batch) -> bool:
    """Whether the shapes leave no doubt that the first axis of the inputs holds the examples, and of which."""
    inputs = tensors_in((batch.args, batch.kwargs))
    rows = [t for t in inputs if _by_row(t, batch)]
    square = any(t.ndim > 1 and t.shape[1] == batch.size for t in rows)
    packed = any(isinstance(value, PackedSequence) for value in (*batch.args, *batch.kwargs.values()))
    return bool(rows) and not packed and (not square or len(inputs) == 1 == sum(map(_is_flat, inputs)))


def _is_flat(t: Tensor) -> bool:
    return t.ndim == 2


def _selected(batch: Batch, rows: list[int]) -> Batch:
    def take(t: Tensor) -> Tensor:
        return t.detach()[rows] if _by_row(t, batch) else t.detach().clone()

    args, kwargs, targets = (map_tensors(take, x) for x in (batch.args, batch.kwargs, batch.targets))
    return Batch(args, kwargs, targets, len(rows))


def _examples(args: Any, kwargs: Any, targets: Any) -> int | None:
    try:
        return batch_size(targets, (args, kwargs)) or None
    except InvalidInput:
        return None
