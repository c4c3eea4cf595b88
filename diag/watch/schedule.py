"""When to measure: at geometrically spaced steps and every N steps, as far as the budget of time allows.

Time spent is measured; time to be spent is estimated before anything runs. What training time earns for
measuring (`budget` times the time that passes) is shared equally by the measurements that are waiting, so that a
dear one is reached in the end and the cheap ones do not wait for it. Over a run the budget is exceeded by at most
what one measurement takes longer than was estimated. An infinite budget measures at every scheduled step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, inf

RATIO = 1.1
SAFETY = 1.1


def next_due(step: int, every: int | None, ratio: float = RATIO) -> int:
    """The next scheduled step after `step`: geometric with the given ratio, or a multiple of `every`."""
    geometric = max(step + 1, ceil(step * ratio - 1e-9))
    return geometric if every is None else min(geometric, (step // every + 1) * every)


@dataclass
class Account:
    """One measurement's place in the schedule: when it is due, and the time it has been allotted."""

    name: str
    estimate: float
    due: float = 1
    credit: float = 0.0
    times: int = 0

    def waiting(self, step: int) -> bool:
        """Whether it is due."""
        return step >= self.due


class Schedule:
    """Which measurements run after a step. Times are in seconds."""

    def __init__(self, names: Iterable[str], budget: float, every: int | None = None) -> None:
        self.accounts = {name: Account(name, inf) for name in names}
        self.budget, self.every = budget, every
        self._earned = 0.0
        self._idle = 0.0

    def estimate(self, name: str, seconds: float) -> None:
        """What a first measurement is expected to take."""
        self.accounts[name].estimate = seconds

    def earn(self, elapsed: float, overhead: float, step: int) -> None:
        """`elapsed` seconds have passed since the start, `overhead` of them in what runs at every step."""
        if self.budget == inf:
            return
        total = self.budget * elapsed - overhead
        gained, self._earned = total - self._earned, total
        waiting = [a for a in self.accounts.values() if a.waiting(step)]
        if not waiting:
            self._idle += gained
            return
        share, self._idle = (gained + self._idle) / len(waiting), 0.0
        for account in waiting:
            account.credit += share

    def affordable(self, step: int) -> list[str]:
        """The measurements that are due and paid for, the cheapest first."""
        waiting = [a for a in self.accounts.values() if a.waiting(step)]
        ready = [a for a in waiting if self.budget == inf or a.credit >= a.estimate]
        return [a.name for a in sorted(ready, key=lambda a: a.estimate)]

    def spent(self, name: str, step: int, seconds: float) -> None:
        """A measurement took `seconds`; its next turn is set."""
        account = self.accounts[name]
        left = account.credit - seconds
        # What it did not need goes back to all; what it lacks it has to earn first.
        account.credit, self._idle = min(left, 0.0), self._idle + max(left, 0.0)
        account.estimate, account.times = SAFETY * seconds, account.times + 1
        account.due = next_due(step, self.every)

    def postpone(self, name: str, step: float) -> None:
        """Do not try again before `step` (infinity: never)."""
        account = self.accounts[name]
        account.due = step
        if account.credit > 0:
            self._idle, account.credit = self._idle + account.credit, 0.0

    @property
    def left(self) -> float:
        """All the time that has been earned and not been spent."""
        if self.budget == inf:
            return inf
        return self._idle + sum(a.credit for a in self.accounts.values())


class Thinning:
    """Which steps get the norms that need a copy of the parameters: geometric ones, and others up to a share of
    the time. Small models so have them at every step."""

    def __init__(self, share: float, ratio: float = 1.1) -> None:
        self.share, self._ratio = share, ratio
        self._due, self._cost, self._spent = 1, 0.0, 0.0

    def take(self, step: int, elapsed: float) -> bool:
        """Whether to measure them at `step`, `elapsed` seconds after the start."""
        if step >= self._due:
            self._due = next_due(step, None, self._ratio)
            return True
        return self._spent + self._cost <= self.share * elapsed

    def spent(self, seconds: float) -> None:
        """What one step's norms took."""
        self._spent += seconds
        self._cost = seconds
