"""Batches in the order in which they come: told apart by a hash of a few of their numbers, and whether they come
again.

On the host the numbers are hashed at once. On another device they stay there as they are, and are compared when the
facts are asked for.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections import deque
from typing import Any

import torch
from torch import Tensor

from diag.watching.observe.loop.moment import Moment
from diag.watching.observe.loop.recent import Recent

NUMBERS_HASHED = 64  # of a batch that are hashed
DISTINCT_NUMBERS = 16  # of them at least, else (pixels that are mostly zero, few words) the whole batch is hashed
WHOLE = 1 << 19  # bytes of a batch up to which that is done
BATCHES_LOOKED_AT = 4  # batches by which it is decided
BATCHES_REMEMBERED = 1 << 14  # batches that were looked at, an eighth of all in a long training
AWAY = 256  # batches on a device that wait to be hashed
GAPS = 64  # of the last batches that had come before, after how many they did
TELL = (2, 3, 4, 5, 6, 8, 12)  # the same order for so many batches is news


class Stream:
    """The batches of one kind. lag: after how many the same comes again, and steps_apart, after how many optimizer
    steps; repeats: how many in a row did, since the step `since`; fetched: before how many of these a DataLoader
    gave a batch; hashed: how many in all. pairs: neighbours that were compared, of which `equal` were one batch
    twice. gaps: after how many the last batches that came again did."""

    def __init__(self, moment: Moment) -> None:
        self._moment = moment
        self._at = Recent(BATCHES_REMEMBERED)  # places by batch
        self._keys = Recent(BATCHES_REMEMBERED)  # batches by place
        self._steps = Recent(BATCHES_REMEMBERED)  # steps by batch
        self._whole, self._looked = False, 0
        self._early: list[tuple[int, int, int]] = []  # places and steps of the first batches, by all their numbers
        self._were_fetched: set[int] = set()  # of these those for which a DataLoader gave one
        self._away: deque[tuple[int, Tensor, bool, int]] = deque(maxlen=AWAY)
        self.hashed = self.lag = self.steps_apart = self.repeats = self.since = self.fetched = 0
        self.pairs = self.equal = 0
        self.gaps: deque[int] = deque(maxlen=GAPS)

    def key(self, place: int, tensor: Tensor) -> int | Tensor | None:
        """What tells this batch from others; None where it is not to be told. Nothing is counted yet."""
        if type(tensor) is not Tensor or not tensor.numel() or tensor.layout is not torch.strided:
            return None
        if tensor.device.type != "cpu":
            return sampled(tensor).clone() if place < AWAY else None
        if self._whole and tensor.numel() * tensor.element_size() > WHOLE:
            return None
        if self._looked < BATCHES_LOOKED_AT and not self._whole:
            self._look(place, tensor)
        return key_of_batch(tensor if self._whole else sampled(tensor), tensor.shape)

    def add(self, place: int, key: int | Tensor, fetched: bool, step: int | None = None) -> None:
        """The batch with this key was used at this place in the order, at this step (else the one under way);
        fetched: a DataLoader gave one for it."""
        step = self._moment.step if step is None else step
        if isinstance(key, Tensor):
            self._away.append((place, key, fetched, step))
            return
        self.hashed += 1
        if fetched and self.hashed <= BATCHES_LOOKED_AT:
            self._were_fetched.add(place)
        before = self._at.get(key)
        self._at.set(key, place)
        self._keys.set(place, key)
        self._compare(place, key, before, fetched, step)
        self._steps.set(key, step)
        if self.repeats in TELL or (self.lag and self.repeats == self.lag):
            self._moment.news(("same batches", self.lag, self.repeats), "batches")

    def wait(self) -> None:
        """Read and count what is on a device."""
        while self._away:
            place, sample, fetched, step = self._away.popleft()
            if len(sample.unique()) >= DISTINCT_NUMBERS:
                self.add(place, key_of_batch(sample.cpu(), sample.shape), fetched, step)

    def _look(self, place: int, tensor: Tensor) -> None:
        """Are the few numbers enough to tell batches apart? Where not, all numbers count, of those before too."""
        self._looked += 1
        sample = bytes_of(sampled(tensor))
        size = 4 if tensor.dtype is torch.bfloat16 else tensor.element_size()
        if len({sample[i : i + size] for i in range(0, len(sample), size)}) < DISTINCT_NUMBERS:
            self._whole, self.hashed, self.lag, self.repeats = True, 0, 0, 0
            self.gaps.clear()
            for kept in (self._at, self._keys, self._steps):
                kept.clear()
            for before, step, key in self._early:
                self.add(before, key, fetched=before in self._were_fetched, step=step)
        elif tensor.numel() * tensor.element_size() <= WHOLE:
            self._early.append((place, self._moment.step, key_of_batch(tensor, tensor.shape)))

    def _compare(self, place: int, key: int, before: int | None, fetched: bool, step: int) -> None:
        """Is this the batch of `lag` places before? Not all are looked at, so often nobody knows."""
        neighbour = self._keys.get(place - 1)
        if neighbour is not None:
            self.pairs, self.equal = self.pairs + 1, self.equal + (neighbour == key)
        if before is not None:
            self.gaps.append(place - before)
        there = self._keys.get(place - self.lag) if self.lag else None
        if there is not None and there == key:
            self.repeats += 1
            self.fetched += fetched
        elif there is not None or (not self.lag and before is not None):
            self.lag = 0 if before is None else place - before
            self.steps_apart = 0 if before is None else step - (self._steps.get(key) or 0)
            self.repeats, self.since = int(before is not None), step
            self.fetched = int(fetched)


def out_of_order(stream: Stream) -> float:
    """Of the batches that came again, the share that did after another number of batches than whole rounds of
    `lag`: of many, the few different batches that there are come again by chance."""
    return (
        sum(gap % stream.lag != 0 for gap in stream.gaps) / len(stream.gaps) if stream.lag and stream.gaps else 0.0
    )


def key_of_batch(numbers: Tensor, shape: Any) -> int:
    """A number that differs between batches that differ in these numbers or in their shape."""
    return hash((zlib.crc32(bytes_of(numbers)), *shape))


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
