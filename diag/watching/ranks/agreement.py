"""Measurements that all ranks enter, or none: rank 0 decides, at steps that every rank knows beforehand.

At such a step the ranks send one small message, in which each says whether it is ready and rank 0 what it wants. A
rank that fails in a measurement says so in its next sum (see `together`) or closes the group, so that the others
stop at once; a rank that is slow or has gone costs the group's timeout, which is below the training's. After each
measurement the ranks compare notes; where one of them has lost the others, a new group is made, a few times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch

from diag.distributed.link import Link
from diag.distributed.together import Together

ASK, END = "decisions", "ends of measurements"
HEAD = 5  # ranks that are ready; number of the question; ranks that have lost the others; whether to gather; names
GROUPS_AT_MOST = 3  # that are made, one after the other
NEVER_STOPS = 1e18  # seconds


@dataclass(frozen=True)
class Agreed:
    """What all ranks do now. gather: each takes its part in a whole copy of the model. limits: what to measure over
    the ranks, by name, with the seconds that each may take."""

    gather: bool
    limits: dict[str, float]


class Agreement:
    """names: of all that might be measured, in an order that all ranks share."""

    def __init__(self, link: Link, names: Sequence[str], device: torch.device) -> None:
        self._link, self._names, self._device = link, sorted(names), device
        self._asked = self._ended = self._groups = 0
        self.together: Together | None = None
        self.reason = ""  # why the ranks measure nothing together any more
        for kind in (ASK, END):
            link.connect(kind)
        self._make_group()

    def _make_group(self) -> None:
        """All ranks at the same time."""
        kind = f"measuring {self._groups}"
        self._groups += 1
        self._link.connect(kind)
        group = self._link.group(kind)
        tell, told = self._link.tell, self._link.told
        self.together = None if group is None else Together(self._device, group, True, tell=tell, told=told)

    @property
    def holds(self) -> bool:
        """Whether the ranks can still measure together."""
        return not self.reason and not self._link.reason and self.together is not None

    def settle(self, ready: bool, proposal: Agreed) -> Agreed | None:
        """Ask all ranks, and wait for their answers; what they do, None for nothing. wanted: by rank 0."""
        self._asked += 1
        lost = self.together is None or bool(self.together.lost)
        vector = torch.zeros(HEAD + len(self._names), dtype=torch.float64)
        vector[:3] = torch.tensor([float(ready and not lost), self._asked, float(lost)], dtype=torch.float64)
        if self._link.rank == 0:
            vector[3], vector[4] = float(proposal.gather), len(proposal.limits)
            for name, seconds in proposal.limits.items():
                vector[HEAD + self._names.index(name)] = min(seconds, NEVER_STOPS)
        total = self._link.sum(ASK, vector).result()
        if total is not None and total[1] != self._asked * self._link.world:
            self._link.broke("the ranks do not make the same steps")
            total = None
        if total is None:
            self.reason = self._link.reason
            return None
        if total[2]:
            self._renew()
        return self._read(total) if total[0] == self._link.world and (total[3] or total[4]) else None

    def _read(self, total: torch.Tensor) -> Agreed:
        limits = dict(zip(self._names, total[HEAD:].tolist(), strict=True))
        return Agreed(bool(total[3]), {n: inf if s >= NEVER_STOPS else s for n, s in limits.items() if s > 0})

    def _renew(self) -> None:
        """Some rank has lost the others in a measurement: all begin again with a new group."""
        why = self.together.lost if self.together is not None else ""
        if self._groups >= GROUPS_AT_MOST:
            self.reason = why or "another rank failed in a measurement"
        else:
            self._make_group()

    def ended(self, failed: str) -> bool:
        """A measurement is over on this rank, `failed` with the reason where it broke off alone; whether the ranks
        can go on with the next one."""
        if failed and self.together is not None:
            self.together.close(failed)
            self._link.drop(f"measuring {self._groups - 1}")
        self._ended += 1
        lost = self.together is None or bool(self.together.lost)
        total = self._link.sum(END, torch.tensor([float(lost), self._ended], dtype=torch.float64)).result()
        return total is not None and total.tolist() == [0.0, self._ended * self._link.world]
