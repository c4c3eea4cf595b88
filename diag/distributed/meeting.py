"""Whether all ranks watch the same model: they meet once, through the store that torch.distributed began with.

A rank that watches announces itself. Where all have done so within a short time, rank 0 says so and a link is
made; else each continues alone. No collective is entered before all are known to enter it, so that a script in
which rank 0 alone watches does not hang.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from diag.errors import named

GRACE = 3.0  # seconds that a rank waits for the others at its first step
STORE_EVERY = 2e-3
WATCHES_ALONE = "alone"


def initialized() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank_here() -> int:
    """The rank of this process; 0 where there is only one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", 0) or 0)


def signature_of(layers: Iterable[tuple[str, int]]) -> str:
    """What two ranks that watch the same model have in common: the names and sizes of its parameters."""
    return hashlib.sha256(repr(sorted(layers)).encode()).hexdigest()[:16]


def group_timeout() -> float:
    """Seconds after which the process group of the training gives up."""
    from torch.distributed.distributed_c10d import _get_default_group

    group = _get_default_group()
    try:
        return min(group._get_backend(d).options._timeout.total_seconds() for d in group._device_types)
    except Exception:
        return timedelta(minutes=10).total_seconds()


@dataclass
class Meeting:
    """One watch of this rank, at the place (the part of the store) where watches of its model meet.

    number: which of the watches that this rank has begun there. What another rank has begun is known by its number,
    and rank 0 remembers which it has used, so that a watch which found nobody puts no later one out of step.
    """

    place: Any
    rank: int
    world: int
    number: int

    def all_here(self, grace: float = GRACE) -> str:
        """Wait for the others and for rank 0's word; "" where all watch, else why this rank continues alone."""
        if self.rank == 0:
            return self._decide(grace)
        word = f"word/{self.rank}/{self.number}"
        # Rank 0 may have come later than this one, and then waits in turn.
        if not _until(lambda: self._there(word), 2 * grace + 1):
            self.place.set(f"gone/{self.rank}", str(self.number))
            return "rank 0 does not watch this model"
        said = self._read(word)
        if said != WATCHES_ALONE:
            self.number = int(said)
        return "" if said != WATCHES_ALONE else "not all ranks watch this model"

    def _decide(self, grace: float) -> str:
        others = range(1, self.world)
        _until(lambda: all(self._new(r) for r in others), grace)
        here = {r: number for r in others if (number := self._new(r))}
        word = str(self.number) if len(here) == len(others) else WATCHES_ALONE
        for r, number in here.items():
            self.place.set(f"used/{r}", number)
            self.place.set(f"word/{r}/{number}", word)
        return _not_watching([r for r in others if r not in here])

    def _new(self, rank: int) -> str:
        """The number of a watch of that rank which waits for rank 0's word; "" where there is none."""
        number = self._read(f"here/{rank}")
        return "" if number in (self._read(f"used/{rank}"), self._read(f"gone/{rank}")) else number

    def _there(self, key: str) -> bool:
        return bool(self.place.check([key]))

    def _read(self, key: str) -> str:
        return self.place.get(key).decode() if self._there(key) else ""

    @property
    def shared(self) -> Any:
        """The part of the store that is this meeting's own, once all are here."""
        return dist.PrefixStore(f"meeting {self.number}", self.place)


def announce(signature: str) -> Meeting:
    """Say that this rank watches a model with this signature. Raises what the store raises."""
    from torch.distributed.distributed_c10d import _get_default_store

    place, rank = dist.PrefixStore(f"diag/{signature}", _get_default_store()), dist.get_rank()
    number = place.add(f"begun/{rank}", 1)
    place.set(f"here/{rank}", str(number))
    return Meeting(place, rank, dist.get_world_size(), number)


def _until(holds: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(STORE_EVERY)
    return True


def _not_watching(missing: list[int]) -> str:
    if not missing:
        return ""
    ranks, do = ("ranks", "do") if len(missing) > 1 else ("rank", "does")
    return f"{ranks} {named(missing, 5)} {do} not watch it"
