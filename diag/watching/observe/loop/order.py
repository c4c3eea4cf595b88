"""The order of events in a step, as a string of letters (see `diag.snapshot.loop.steps.Pattern`)."""

from __future__ import annotations

import functools

from diag.snapshot.loop.steps import Pattern
from diag.watching.observe.loop.moment import Moment

LONGEST_ORDER = 96  # letters of one step that are kept
ORDERS_KEPT = 24  # distinct orders
ONCE = frozenset("SZLUCE")  # several in a row are written once: one for each optimizer, or for each parameter


class Order:
    """Follows the letters of the step under way."""

    def __init__(self, moment: Moment) -> None:
        self._moment = moment
        self._now: list[str] = []
        self._stepped = False
        self._patterns: dict[str, list[int]] = {}

    def add(self, letter: str) -> None:
        """Note one event in the order of the step."""
        now = self._now
        if letter in "FD" and self._stepped:
            self._close()
            now = self._now
        if now and now[-1] == letter and letter in ONCE:
            return
        if len(now) < LONGEST_ORDER:
            now.append(letter)
        if letter in "Ss":
            self._stepped = True

    def _close(self) -> None:
        letters, self._now, self._stepped = "".join(self._now), [], False
        step = self._moment.step - 1
        known = self._patterns.get(letters)
        if known is not None:
            known[1], known[2] = step, known[2] + 1
            return
        if len(self._patterns) >= ORDERS_KEPT:
            del self._patterns[min(self._patterns, key=lambda k: self._patterns[k][1])]
        self._patterns[letters] = [step, step, 1]
        if len(self._patterns) <= 4:
            self._moment.news(("order", letters), "order")

    def facts(self) -> tuple[Pattern, ...]:
        """The distinct orders so far, by their first step; the step under way counts where it has been taken."""
        patterns = {k: list(v) for k, v in self._patterns.items()}
        if self._stepped:
            step, letters = self._moment.step - 1, "".join(self._now)
            first, _, count = patterns.get(letters, [step, step, 0])
            patterns[letters] = [first, step, count + 1]
        return tuple(Pattern(compressed(k), *v) for k, v in sorted(patterns.items(), key=lambda item: item[1][0]))


@functools.lru_cache(maxsize=256)
def compressed(letters: str) -> str:
    """Parts that repeat at once are written once: "DFBDFBSZ" becomes "(DFB)2SZ"."""
    text, i = "", 0
    while i < len(letters):
        size, times = _repetition(letters, i)
        part = letters[i : i + size]
        text += part if times == 1 else f"({part}){times}" if size > 1 else f"{part}{times}"
        i += size * times
    return text


def _repetition(letters: str, start: int) -> tuple[int, int]:
    """The length of the part at `start` that repeats most, and how often it does."""
    best = (1, 1)
    for size in range(1, min(8, (len(letters) - start) // 2) + 1):
        part, times = letters[start : start + size], 1
        while letters.startswith(part, start + size * times):
            times += 1
        if times > 1 and size * times > best[0] * best[1]:
            best = (size, times)
    return best
