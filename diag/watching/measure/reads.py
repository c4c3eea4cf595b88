"""What each check has read of the facts of the loop, so that it is asked again only where some of that has changed.

An instrument is a pure function: where all that it read is as it was, so is what it says. The number of the step
alone does not count as a change, as every check quotes it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from diag.snapshot.loop.facts import Loop

ALWAYS_CHANGES = "step"
NOTED = "_noted"  # where facts keep the names of those that were read


class NotedLoop(Loop):
    """Facts that note which of them are read."""

    def __getattribute__(self, name: str) -> Any:
        known: dict[str, Any] = object.__getattribute__(self, "__dict__")
        if name in known:
            known[NOTED].add(name)
            return known[name]
        return object.__getattribute__(self, name)


class Reads:
    """Which facts each check read at its last judgement, and at which judgement each of them changed last."""

    def __init__(self) -> None:
        self._facts: dict[str, Any] = {}
        self._judgement = 0
        self._changed: dict[str, int] = {}
        self._read: dict[str, tuple[int, set[str]]] = {}

    def begin(self, facts: Loop) -> None:
        """A judgement on these facts begins."""
        before, self._facts = self._facts, vars(facts)
        self._judgement += 1
        for name, value in self._facts.items():
            if name != ALWAYS_CHANGES and not _same(before.get(name), value):
                self._changed[name] = self._judgement

    def has_news(self, check: str, about: Collection[str] = ()) -> bool:
        """Whether something that the check read at its last judgement has changed since, or it had none; where
        `about` names facts, whether it read one of these besides."""
        if check not in self._read:
            return True
        judgement, names = self._read[check]
        if about and names.isdisjoint(about):
            return False
        return any(self._changed.get(name, 0) > judgement for name in names)

    def facts_for(self, check: str) -> Loop:
        """The facts, which note for this check what it reads of them."""
        names: set[str] = set()
        noted = object.__new__(NotedLoop)
        vars(noted).update(self._facts)
        vars(noted)[NOTED] = names
        self._read[check] = (self._judgement, names)
        return noted


def _same(one: Any, other: Any) -> bool:
    try:
        return one is other or bool(one == other)
    except Exception:  # arrays of another shape, or that are compared number by number
        return False
