"""Messages between the watches of one training: sums over ranks and what each has, in the background.

It has process groups of its own (gloo, on the CPU), so that its messages never come between those of the training,
and one group for each kind of message, so that all messages of a group have one size: ranks that send in different
orders get wrong numbers, which the number in each message reveals, and never a crash of gloo. Whatever fails breaks
the link, with the reason; then every message is lost and the training continues.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diag.distributed.meeting import Meeting, group_timeout

CONNECT = 20.0  # seconds
SHARE_OF_TIMEOUT, LONGEST_TIMEOUT = 0.5, 300.0  # of the training's own timeout, and at most so many seconds
LEAVE = 5.0  # seconds that a rank which ends waits for its last messages


class Message:
    """A message under way; `result()` is None where it was lost."""

    def __init__(self, link: Link, work: Any, found: Callable[[], Tensor]) -> None:
        self._link, self._work, self._found = link, work, found

    def ready(self) -> bool:
        """Whether `result` would not wait."""
        return self._work is None or bool(self._link.reason) or self._work.is_completed()

    def done(self) -> bool:
        """Whether it has come or failed."""
        return self._work is None or bool(self._work.is_completed())

    def result(self, seconds: float | None = None) -> Tensor | None:
        """What came; waits for it, at most so many seconds."""
        if self._work is None or self._link.reason:
            return None
        try:
            self._work.wait() if seconds is None else self._work.wait(timedelta(seconds=seconds))
        except Exception as error:
            self._link.broke(error)
            return None
        return self._found()


class Link:
    """What connects this rank's watch to the others'. `reason`: why it is broken, "" while it holds."""

    def __init__(self, meeting: Meeting) -> None:
        self.rank, self.world, self.reason = meeting.rank, meeting.world, ""
        self._store, self._groups = meeting.shared, dict[str, Any]()
        self._timeout = min(SHARE_OF_TIMEOUT * group_timeout(), LONGEST_TIMEOUT)
        self._last: dict[str, Message] = {}

    def connect(self, kind: str) -> None:
        """Make the group for messages of this kind; all ranks must do so in the same order."""
        if self.reason:
            return
        try:
            place = dist.PrefixStore(kind, self._store)
            group = dist.ProcessGroupGloo(place, self.rank, self.world, timedelta(seconds=CONNECT))
            group.set_timeout(timedelta(seconds=self._timeout))
            self._groups[kind] = group
        except Exception as error:
            self.broke(error)

    def group(self, kind: str) -> Any:
        """The group of this kind, for what waits for its messages itself; None where the link does not hold."""
        return self._groups.get(kind)

    def drop(self, kind: str) -> None:
        """This rank sends nothing more of this kind, which those that wait for it see at once."""
        group = self._groups.pop(kind, None)
        threading.Thread(target=lambda held: held.clear(), args=([group],), name="diag: last messages").start()

    def tell(self, what: str) -> None:
        """Leave a sentence about this rank for the others."""
        with contextlib.suppress(Exception):
            self._store.set(f"told/{self.rank}", what[:300])

    def told(self, rank: int) -> str:
        """The last such sentence of a rank, "" where there is none."""
        with contextlib.suppress(Exception):
            key = f"told/{rank}"
            return self._store.get(key).decode() if self._store.check([key]) else ""
        return ""

    def sum(self, kind: str, vector: Tensor) -> Message:
        """The sum of the ranks' vectors, which must have one size; the vector is overwritten."""
        return self._send(kind, lambda group: (group.allreduce([vector]), lambda: vector))

    def gather(self, kind: str, vector: Tensor) -> Message:
        """The ranks' vectors, (world, size), which must have one size."""
        table = torch.empty(self.world, len(vector), dtype=vector.dtype)
        return self._send(kind, lambda group: (group.allgather([list(table)], [vector]), lambda: table))

    def from_first(self, kind: str, vector: Tensor) -> Message:
        """Rank 0's vector; that of the others is overwritten."""
        return self._send(kind, lambda group: (group.broadcast(vector, 0), lambda: vector))

    def _send(self, kind: str, begin: Callable[[Any], tuple[Any, Callable[[], Tensor]]]) -> Message:
        if self.reason:
            return Message(self, None, lambda: torch.empty(0))
        try:
            message = Message(self, *begin(self._groups[kind]))
        except Exception as error:
            self.broke(error)
            return Message(self, None, lambda: torch.empty(0))
        self._last[kind] = message
        return message

    # How it ends

    def broke(self, error: Exception | str) -> None:
        """The link is broken: what the rank that left said is the reason, where one left; else this error."""
        if self.reason:
            return
        text = str(error) if isinstance(error, str) else plain_reason(error)
        self.reason = "; ".join(self._farewells()) or text
        self._farewell(self.reason if self.rank == 0 else f"lost the others ({text})")
        self._drop_groups()

    def leave(self, why: str) -> None:
        """This rank's watch ends: its last messages are given a little time, and the others can read why."""
        if not self.reason:
            for message in list(self._last.values()):
                message.result(LEAVE)
            self._farewell(why)
            self.reason = self.reason or why
            self._drop_groups()

    def _farewell(self, why: str) -> None:
        with contextlib.suppress(Exception):
            self._store.set(f"left/{self.rank}", why[:300])

    def _farewells(self) -> list[str]:
        found = []
        with contextlib.suppress(Exception):
            for r in range(self.world):
                if r != self.rank and self._store.check([f"left/{r}"]):
                    found.append(f"rank {r}: {self._store.get(f'left/{r}').decode()}")
        return found[:3]

    def _drop_groups(self) -> None:
        """A group waits for its messages when it goes, which must not keep the training waiting."""
        idle = all(message.done() for message in self._last.values())
        groups, self._groups, self._last = list(self._groups.values()), {}, {}
        if idle:
            groups.clear()
        else:  # no daemon: it would be cut off inside C++ when the process ends, and abort it
            threading.Thread(target=groups.clear, name="diag: last messages").start()


def plain_reason(error: Exception) -> str:
    """What became of a message, in a few words."""
    text = " ".join(str(error).split())
    if "closed by peer" in text or "reset by peer" in text:
        return "another rank has gone"
    return "another rank did not answer in time" if "imed out" in text else f"{type(error).__name__}: {text[:160]}"
