"""When to measure: at geometrically spaced steps and every N steps, as far as the budget of time allows.

Time spent is measured; time to be spent is estimated before anything runs. What training time earns for measuring
(`budget` times the time that passes) goes half to whatever is due and affordable at once, those measured least
often first, and half into savings for the first of those that are too expensive for that; so the cheap ones do not
wait and the expensive ones are measured in the end. A measurement that takes twice its estimate is stopped and
planned with a larger one. An infinite budget measures at every scheduled step and stops nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, inf

SPACING_RATIO = 1.1
SAFETY = 1.1
SIMILAR_COST = 4.0
STEPS_WITH_NORMS, OFTEN_SHARE = 10, 0.02  # norms are measured often at first, then while they have taken so little,
SELDOM_SPACING = 1.5  # else each so many times the step before
EXPENSIVE_NORM_SECONDS = 2e-3  # norms that take longer are measured at fewer steps from the start:
EXPENSIVE_NORM_SPACING = 2.0  # each this many times the one before
OVERRUN = 2.0  # a measurement is stopped at so many times its estimate,
LEAST_LIMIT_SECONDS = 0.25  # and not before so many seconds, as the first estimates of short ones are rough
MOST_STOPS = 3  # times that a measurement may be stopped before it is given up


def next_due(step: int, every: int | None, ratio: float = SPACING_RATIO) -> int:
    """The next scheduled step after `step`: geometric with the given ratio, or a multiple of `every`."""
    geometric = max(step + 1, ceil(step * ratio - 1e-9))
    return geometric if every is None else min(geometric, (step // every + 1) * every)


@dataclass
class Account:
    """One measurement's place in the schedule: what it takes, when it is due, and how often it was made."""

    name: str
    estimate: float
    due: float = 1
    times: int = 0
    stops: int = 0

    @property
    def limit(self) -> float:
        """Seconds after which it is stopped."""
        return max(OVERRUN * self.estimate, LEAST_LIMIT_SECONDS)


class MeasurementSchedule:
    """Which measurements run after a step. Times are in seconds."""

    def __init__(self, names: Iterable[str], budget: float, every: int | None = None) -> None:
        self.accounts = {name: Account(name, inf) for name in names}
        self.budget, self.every = budget, every
        self._earned = self._quick = self._saved = 0.0
        self._from_savings: set[str] = set()

    def estimate(self, name: str, seconds: float) -> None:
        """What a first measurement is expected to take."""
        self.accounts[name].estimate = seconds

    def earn(self, elapsed: float) -> None:
        """`elapsed` seconds have passed since the start."""
        if self.budget == inf:
            return
        total = self.budget * elapsed
        gained, self._earned = total - self._earned, total
        self._quick += gained / 2
        self._saved += gained / 2

    def affordable(self, step: int) -> list[str]:
        """The measurements that are due and paid for, the cheapest first."""
        waiting = sorted((a for a in self.accounts.values() if step >= a.due), key=lambda a: (a.times, a.estimate))
        if self.budget == inf:
            return [a.name for a in waiting]
        chosen, left, kept_for = [], self._quick, inf
        for account in waiting:
            # One that was made less often and takes about as long goes first, also where it has to wait for it.
            if account.estimate <= left and account.estimate * SIMILAR_COST <= kept_for:
                chosen.append(account)
                left -= account.estimate
            else:
                kept_for = min(kept_for, account.estimate)
        first = next((a for a in waiting if a not in chosen), None)
        self._from_savings = {first.name} if first is not None and first.estimate <= self._saved else set()
        chosen += [a for a in waiting if a.name in self._from_savings]
        return [a.name for a in sorted(chosen, key=lambda a: a.estimate)]

    def spent(self, name: str, step: int, seconds: float) -> None:
        """A measurement took `seconds`; its next turn is set."""
        account = self.accounts[name]
        self._charge(name, seconds)
        account.estimate, account.times = SAFETY * seconds, account.times + 1
        account.due = next_due(step, self.every)

    def stopped(self, name: str, step: int, seconds: float, limit: float) -> None:
        """A measurement was stopped at its limit: it takes longer than that, nobody knows how much."""
        account = self.accounts[name]
        self._charge(name, seconds)
        account.stops += 1
        account.estimate = max(account.estimate, OVERRUN * limit)
        account.due = next_due(step, self.every) if account.stops < MOST_STOPS else inf

    def _charge(self, name: str, seconds: float) -> None:
        if name in self._from_savings:
            self._saved -= seconds
        else:
            self._quick -= seconds

    def pay(self, seconds: float) -> None:
        """Part of a measurement that is made over several steps took `seconds`: the larger of the two halves
        pays."""
        if self._saved >= self._quick:
            self._saved -= seconds
        else:
            self._quick -= seconds

    def postpone(self, name: str, step: float) -> None:
        """Do not try again before `step` (infinity: never)."""
        self.accounts[name].due = step

    def estimated(self, name: str) -> float:
        """Seconds that a measurement is expected to take; infinity where that is not known."""
        return self.accounts[name].estimate if name in self.accounts else inf

    def limit(self, name: str) -> float:
        """Seconds after which a measurement is stopped; an infinite budget stops nothing."""
        return self.accounts[name].limit if name in self.accounts and self.budget < inf else inf

    @property
    def left(self) -> float:
        """All the time that has been earned and not been spent."""
        return inf if self.budget == inf else self._quick + self._saved


class Thinning:
    """Which steps get norms that take time: geometric ones, and others up to a share of the time.

    The geometric ones come whatever they cost, and closer to each other (by `ratio`) while all so far have taken at
    most `OFTEN_SHARE` of the time. free: seconds a step that are not counted, so that small models have them at
    every step.
    """

    def __init__(self, share: float, ratio: float = 1.1, free: float = 0.0) -> None:
        self.share, self.free, self._ratio = share, free, ratio
        self._due, self._spent = 1, 0.0
        self._costs: deque[float] = deque(maxlen=3)  # a single one may hold a pause of the machine's
        self._affordable = 0.0  # seconds after the start from which on the share pays for the next ones

    def take(self, step: int, elapsed: float) -> bool:
        """Whether to measure them at `step`, `elapsed` seconds after the start."""
        if step < self._due:
            return elapsed >= self._affordable
        self._due = next_due(step, None, self._spacing(step, elapsed))
        return True

    @property
    def _cost(self) -> float:
        return min(self._costs) if len(self._costs) == self._costs.maxlen else 0.0

    def _spacing(self, step: int, elapsed: float) -> float:
        cost = self._cost
        if cost > EXPENSIVE_NORM_SECONDS:
            return EXPENSIVE_NORM_SPACING
        often = step < STEPS_WITH_NORMS or self._spent + cost <= OFTEN_SHARE * elapsed
        return self._ratio if often else SELDOM_SPACING

    def spent(self, seconds: float) -> None:
        """What one step's norms took."""
        self._spent += seconds
        self._costs.append(seconds)
        cost, share = self._cost, self.share
        self._affordable = 0.0 if cost <= self.free else (self._spent + cost) / share if share else inf


class Regular:
    """Steps that are the same on all ranks: the first three and every so many."""

    def __init__(self, every: int) -> None:
        self._every = every

    def take(self, step: int, elapsed: float) -> bool:
        """Whether to measure at `step`, however long it takes."""
        return step % self._every == 0 or step <= 3

    def spent(self, seconds: float) -> None:
        """Nothing: the steps do not depend on what one took."""
