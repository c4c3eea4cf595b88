"""Healthy kinds: changes that leave a training sound, and look unusual to a reader who expects the ordinary.

Each is judged like a fault, only that nothing should be said: an alarm or a warning on one of these runs is false.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from calibration.program import Program


@dataclass(frozen=True)
class Healthy:
    """One healthy kind; `needs` and `without` are tags of the program."""

    name: str
    apply: Callable[[Program], None] = field(repr=False)
    needs: frozenset[str]
    without: frozenset[str]
    held_out: bool

    @property
    def text(self) -> str:
        """What was done, in one sentence."""
        return (self.apply.__doc__ or "").strip()

    def fits(self, program: type[Program]) -> bool:
        return self.needs <= program.tags and not self.without & program.tags


HEALTHY: dict[str, Healthy] = {}


def healthy(
    *, needs: str = "", without: str = "distributed", held_out: bool = False
) -> Callable[[Callable[[Program], None]], Callable[[Program], None]]:
    """Declare a healthy kind."""

    def declare(apply: Callable[[Program], None]) -> Callable[[Program], None]:
        name = apply.__name__
        if name in HEALTHY:
            raise ValueError(f"There are two healthy kinds {name}; give one of them another name.")
        HEALTHY[name] = Healthy(name, apply, frozenset(needs.split()), frozenset(without.split()), held_out)
        return apply

    return declare


@healthy(without="")
def plain(p: Program) -> None:
    "The program as it is."
