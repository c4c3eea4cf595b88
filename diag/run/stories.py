"""A story is a finding with the findings that follow from it, reported once.

A learning rate that is too high makes the loss diverge, then units die, then gradients vanish. Four checks see it
and the reader needs one sentence. Which finding can follow from which is said by the verdicts themselves
(`Verdict.explained_by`); nothing here knows a check by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from diag.result import Confidence, Level, Verdict

# A finding that follows from arithmetic needs no threshold, so it comes before one that rests on a calibration.
CERTAINTY = list(Confidence)


class Flagged(Protocol):
    """One item of a story: a verdict, and the steps that it was measured at."""

    @property
    def verdict(self) -> Verdict:
        """What was judged last."""

    @property
    def first_step(self) -> int:
        """Where it was first measured."""

    @property
    def began(self) -> int | None:
        """Where it began, if that is known."""

    @property
    def instrument(self) -> str:
        """The name of the instrument that judged."""


F = TypeVar("F", bound=Flagged)


@dataclass(frozen=True)
class Story(Generic[F]):
    """Something that went wrong (`finding`) and what else was found that follows from it, the earliest first."""

    finding: F
    consequences: tuple[F, ...] = ()

    @property
    def level(self) -> Level:
        """The worst level in the story."""
        return min((f.verdict.level for f in (self.finding, *self.consequences)), key=lambda level: level.severity)


def stories(findings: Iterable[F]) -> list[Story[F]]:
    """The stories that alarms and warnings tell: the worst first, then the most certain, then the earliest.

    A finding is a consequence of another where its verdict names the other's cause in `explained_by` and did not
    begin before it; chains are followed to their root, and of two that explain each other the first is the root.
    """
    flagged = sorted((f for f in findings if f.verdict.level.is_finding), key=_order)
    roots = {id(f): _root(f, flagged) for f in flagged}
    made = [
        Story(root, tuple(sorted((f for f in flagged if roots[id(f)] is root and f is not root), key=_began)))
        for root in flagged
        if roots[id(root)] is root
    ]
    return sorted(made, key=lambda story: (story.level.severity, *_order(story.finding)[1:]))


def _root(finding: F, flagged: Sequence[F]) -> F:
    """What it follows from in the end. Of findings that explain each other, and that nothing else explains, the
    first in order."""
    before = {id(f): _before(f, flagged) for f in _before(finding, flagged)}
    own = {key: {id(g) for g in all_of} for key, all_of in before.items()}
    ends = [f for f in before[id(finding)] if all(id(f) in own[id(g)] for g in before[id(f)])]
    return min(ends, key=_order)


def _before(finding: F, flagged: Sequence[F]) -> list[F]:
    """The finding and all that it can follow from, directly or through others."""
    found = [finding]
    for f in found:  # grows while it is gone through
        found += [g for g in flagged if explains(g, f) and not any(g is known for known in found)]
    return found


def explains(cause: Flagged, finding: Flagged) -> bool:
    """Whether `finding` can follow from `cause`: its verdict names it, and it did not begin before."""
    named = cause is not finding and cause.verdict.cause and cause.verdict.cause in finding.verdict.explained_by
    return bool(named) and _began(cause) <= _began(finding)


def _began(finding: Flagged) -> int:
    """The step at which it began, as far as that is known: said by the verdict, seen in the course, or the
    first."""
    known = (finding.verdict.step, finding.began, finding.first_step)
    return next(step for step in known if step is not None)


def _order(finding: Flagged) -> tuple[int, int, int, str]:
    verdict = finding.verdict
    certainty = CERTAINTY.index(verdict.confidence)
    return verdict.level.severity, certainty, _began(finding), finding.instrument
