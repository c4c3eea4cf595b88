"""Where the training is, and whether something happened that no check has judged; counting in steps."""

from __future__ import annotations

from diag.snapshot.loop.steps import Tally

ANY_FACT = ""  # news for every check that has read facts which have changed


def due(times: int) -> bool:
    """Whether the look number `times` is one at which everything is looked at: 1, 2, 3, 10, 30, 100, 300, ..."""
    if times <= 3:
        return True
    digits = str(times)
    return digits[0] in "13" and digits.strip("0") in ("1", "3")


def next_look(times: int) -> int:
    """The first look after `times` that is due."""
    if times < 3:
        return times + 1
    power = 10 ** (len(str(times)) - 1)
    return next(n for n in (power, 3 * power, 10 * power) if n > times)


class Moment:
    """The step under way, from 1; `changed` names the facts of the loop in which there is news.

    attentive: this step is looked at closely. The first steps are, then four in a row of every 32, and those
    after something unusual (`attend`), so that a step costs an eighth of that.
    """

    FIRST, EVERY, IN_A_ROW = 32, 32, 4

    def __init__(self, step: int = 0) -> None:
        self._began = step
        self.step = step + 1
        self.changed: set[str] = set()
        self.attentive = True
        self._until = 0
        self._known: set[object] = set()

    def ended(self, step: int) -> bool:
        """The step with this number is over; whether attention begins with the next."""
        self.step = step + 1
        n, before = step - self._began, self.attentive
        self.attentive = n < self.FIRST or n % self.EVERY < self.IN_A_ROW or step < self._until
        return self.attentive and not before

    def attend(self, steps: int) -> bool:
        """Look closely at the rest of this step and at so many after it; whether attention begins."""
        self._until = max(self._until, self.step + steps)
        before, self.attentive = self.attentive, True
        return not before

    def news(self, kind: object, fact: str = ANY_FACT) -> None:
        """Something happened that checks may judge, those that read this fact of the loop; only its first time
        counts."""
        if kind not in self._known:
            self._known.add(kind)
            self.changed.add(fact)


class Counter:
    """A tally under way. `hit(step)`, or `miss()` where it could have happened and did not."""

    __slots__ = ("first", "last", "longest", "running", "since", "times")

    def __init__(self) -> None:
        self.times = self.first = self.last = self.running = self.longest = self.since = 0

    def hit(self, step: int) -> int:
        """It happened at `step`; the number of times in a row."""
        self.times += 1
        self.first = self.first or step
        self.last = step
        self.running += 1
        self.since = step if self.running == 1 else self.since
        self.longest = max(self.longest, self.running)
        return self.running

    def miss(self) -> None:
        """It did not happen where it could have."""
        self.running = 0

    def tally(self) -> Tally:
        """What was counted."""
        return Tally(self.times, self.first, self.last, self.running, self.longest, self.since)
