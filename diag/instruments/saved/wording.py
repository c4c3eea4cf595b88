"""How the checks of checkpoint files name a few of many."""

from __future__ import annotations

from collections.abc import Sequence

NAMED = 3


def first_named(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    left = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {left:,} more" if left > 0 else "")
