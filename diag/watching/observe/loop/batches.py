"""Which batches training sees: a hash of a few numbers of each, in the order in which they come.

On the host the numbers are hashed at once. On another device they stay there as they are, and are compared when the
facts are asked for.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler

from diag.snapshot.batch import tensors_in
from diag.snapshot.loop.parts import BatchFacts
from diag.watching.observe.loop.moment import Moment, due
from diag.watching.observe.loop.recent import Recent

NUMBERS_HASHED = 64  # of a batch that are hashed
DISTINCT_NUMBERS = 16  # of them at least, else (pixels that are mostly zero, few words) the whole batch is hashed
WHOLE = 1 << 19  # bytes of a batch up to which that is done
BATCHES_LOOKED_AT = 4  # batches by which it is decided
BATCHES_REMEMBERED = 1 << 14  # batches that were looked at, an eighth of all in a long training
AWAY = 256  # batches on a device that wait to be hashed
TELL = (2, 3, 4, 5, 6, 8, 12)  # the same order for so many batches is news
COUNTED_ALWAYS = 16  # batches whose labels are counted, then ever fewer
CLASSES_NEWS = (6, 12, 16)  # batches counted after which checks look at the classes
ROWS = ("RandomSampler", "SequentialSampler", "DistributedSampler", "WeightedRandomSampler")  # order rows
CLASSES = 4096  # more distinct targets than these are no classes


class Batches:
    """Follows the inputs of training calls, the labels of loss calls and the DataLoaders."""

    def __init__(self, moment: Moment) -> None:
        self._moment = moment
        self._calls = self._hashed = 0
        self._at = Recent(BATCHES_REMEMBERED)  # calls by batch
        self._keys = Recent(BATCHES_REMEMBERED)  # batches by call
        self._whole, self._looked = False, 0
        self._early: list[tuple[int, int, Any, bool]] = []  # the first batches, by all of their numbers
        self._away: deque[tuple[int, Tensor, bool]] = deque(maxlen=AWAY)
        self._lag = self._repeats = self._since = self._fetched = 0
        self.fetched = False  # a DataLoader gave a batch since the last call
        self._loaders = self._loader_batches = 0
        self._shuffled: bool | None = None
        self._begun: int | None = None  # the loader whose epoch began last, until a training call
        self._epochs: dict[int, int] = {}  # by loader, those with training calls
        self._batches_each = self._again = 0
        self._by_rows = self._begun_by_rows = False
        self._labels: dict[int, int] = {}
        self._counted = self._distinct = self._targets = 0
        self._labels_away: list[Tensor] = []
        self._label_calls = self._continued = self._followed = 0
        self._last_classes: tuple[int, set[int]] = (-1, set())

    # Inputs

    def training_call(self, args: Any, kwargs: Mapping[str, Any]) -> None:
        """The model was called in training."""
        self._calls += 1
        if not self._moment.attentive:
            return
        if self._begun is not None:
            epochs = self._epochs[self._begun] = self._epochs.get(self._begun, 0) + 1
            self._again = self._moment.step if epochs > 1 else self._again
            self._by_rows = self._begun_by_rows
            self._batches_each, self._begun = self._loader_batches, None
        tensor = next((a for a in args if isinstance(a, Tensor)), None)
        if tensor is None:
            tensor = next((t for t in tensors_in((args, dict(kwargs)))), None)
        if tensor is None or type(tensor) is not Tensor or not tensor.numel() or tensor.layout is not torch.strided:
            return
        if tensor.device.type != "cpu":
            if self._calls < AWAY:
                fetched, self.fetched = self.fetched, False
                self._away.append((self._calls, sampled(tensor).clone(), fetched))
            return
        if self._whole and tensor.numel() * tensor.element_size() > WHOLE:
            return
        if self._looked < BATCHES_LOOKED_AT and not self._whole:
            self._look(tensor)
        sample = bytes_of(tensor if self._whole else sampled(tensor))
        fetched, self.fetched = self.fetched, False
        self._add(self._calls, zlib.crc32(sample), tensor.shape, fetched)

    def _look(self, tensor: Tensor) -> None:
        """Are the few numbers enough to tell batches apart? Where not, all numbers count, of those before too."""
        self._looked += 1
        sample = bytes_of(sampled(tensor))
        size = 4 if tensor.dtype is torch.bfloat16 else tensor.element_size()
        if len({sample[i : i + size] for i in range(0, len(sample), size)}) < DISTINCT_NUMBERS:
            self._whole, self._hashed, self._lag, self._repeats = True, 0, 0, 0
            self._at.clear()
            self._keys.clear()
            for early in self._early:
                self._add(*early)
        elif tensor.numel() * tensor.element_size() <= WHOLE:
            self._early.append((self._calls, zlib.crc32(bytes_of(tensor)), tensor.shape, self.fetched))

    def _add(self, call: int, sample: int, shape: Any, fetched: bool) -> None:
        key = hash((sample, *shape))
        self._hashed += 1
        before = self._at.get(key)
        self._at.set(key, call)
        self._keys.set(call, key)
        self._compare(call, key, before, fetched)
        if self._repeats in TELL or (self._lag and self._repeats == self._lag):
            self._moment.news(("same batches", self._lag, self._repeats))

    def _compare(self, call: int, key: int, before: int | None, fetched: bool) -> None:
        """Is this the batch of `lag` calls before? Not all calls are looked at, so often nobody knows."""
        there = self._keys.get(call - self._lag) if self._lag else None
        if there is not None and there == key:
            self._repeats += 1
            self._fetched += fetched
        elif there is not None or (not self._lag and before is not None):
            self._lag = 0 if before is None else call - before
            self._repeats, self._since = int(before is not None), self._moment.step
            self._fetched = int(fetched)

    # DataLoaders

    def loader_started(self, loader: Any) -> None:
        """An epoch of a DataLoader begins."""
        self._loaders += 1
        self._begun = id(loader)
        try:
            self._loader_batches = len(loader)
        except TypeError:  # of a stream nobody knows the length
            self._loader_batches = 0
        sampler = type(getattr(loader, "sampler", None)).__name__
        whole = type(getattr(loader, "batch_sampler", None)) is BatchSampler and loader.batch_size > 1
        self._begun_by_rows = whole and sampler in ROWS
        self._shuffled = {"RandomSampler": True, "SequentialSampler": False}.get(sampler)

    @property
    def loader_batches(self) -> int:
        """How many batches the loader has whose epoch began last, 0 where that is not known."""
        return self._loader_batches

    # Labels

    def targets(self, targets: Any) -> None:
        """A loss of a training call was computed with these targets, if they are class numbers."""
        self._label_calls += 1
        if self._label_calls > COUNTED_ALWAYS and not due(self._label_calls // COUNTED_ALWAYS):
            return
        if self._label_calls > COUNTED_ALWAYS and self._label_calls % COUNTED_ALWAYS:
            return
        if not isinstance(targets, Tensor) or targets.dtype.is_floating_point or targets.dtype.is_complex:
            return
        if targets.device.type == "cpu":
            self._count(targets)
        elif len(self._labels_away) < COUNTED_ALWAYS:
            self._labels_away.append(targets.detach().reshape(-1)[:CLASSES].clone())

    def _count(self, targets: Tensor) -> None:
        values, counts = targets.detach().reshape(-1)[:CLASSES].unique(return_counts=True)
        self._counted += 1
        self._distinct += len(values)
        self._targets += int(counts.sum())
        call, before = self._last_classes
        now = set(values.tolist())
        if self._label_calls == call + 1 and targets.is_cpu:
            self._followed += 1
            self._continued += bool(now & before)
        self._last_classes = (self._label_calls, now)
        if self._counted in CLASSES_NEWS:
            self._moment.news(("classes", self._counted))
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            if value in self._labels or len(self._labels) < CLASSES:
                self._labels[value] = self._labels.get(value, 0) + count

    # Facts

    def facts(self) -> BatchFacts:
        """As plain data; what is on a device is read now."""
        while self._away:
            call, sample, fetched = self._away.popleft()
            if len(sample.unique()) >= DISTINCT_NUMBERS:
                self._add(call, zlib.crc32(bytes_of(sample.cpu())), sample.shape, fetched)
        waiting, self._labels_away = self._labels_away, []
        for targets in waiting:
            self._count(targets.cpu())
        n = max(self._counted, 1)
        return BatchFacts(
            calls=self._hashed,
            lag=self._lag,
            repeats=self._repeats,
            since=self._since,
            fetched=self._fetched,
            loaders=self._loaders,
            epochs=max(self._epochs.values(), default=0),
            again=self._again,
            loader_batches=self._batches_each or self._loader_batches,
            by_rows=self._by_rows,
            shuffled=self._shuffled,
            label_counts=dict(sorted(self._labels.items())),
            counted=self._counted,
            distinct=self._distinct / n,
            batch_size=self._targets / n,
            continued=self._continued / max(self._followed, 1),
        )


def sampled(tensor: Tensor) -> Tensor:
    """Some entries of the tensor, spread over it and over its columns, as a view where it can be one."""
    detached = tensor.detach()
    flat = detached.view(-1) if detached.is_contiguous() else detached.reshape(-1)
    return flat[:: stride_of(len(flat))]


@functools.lru_cache(maxsize=256)
def stride_of(length: int) -> int:
    """A step that shares no factor with the length, so that not always the same column is met."""
    stride = max(length // NUMBERS_HASHED, 1)
    while math.gcd(stride, length) > 1:
        stride += 1
    return stride


def bytes_of(sample: Tensor) -> bytes:
    """The bytes of a tensor on the host."""
    detached = sample.detach()
    return (detached.float() if sample.dtype is torch.bfloat16 else detached).numpy().tobytes()
