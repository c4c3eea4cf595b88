"""A dict of what came last: what is followed over a training must not grow with its length."""

from __future__ import annotations


class Recent:
    """Remembers numbers by numbers: the last `most` that were set, and never more than twice as many."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._now: dict[int, int] = {}
        self._before: dict[int, int] = {}

    def get(self, key: int) -> int | None:
        """What was set last for this key; None where it was forgotten or never set."""
        found = self._now.get(key)
        return self._before.get(key) if found is None else found

    def set(self, key: int, value: int) -> None:
        """Remember `value` for `key`."""
        self._now[key] = value
        if len(self._now) >= self._most:
            self._before, self._now = self._now, {}

    def clear(self) -> None:
        """Forget everything."""
        self._now, self._before = {}, {}

    def __len__(self) -> int:
        return len(self._now) + len(self._before)
