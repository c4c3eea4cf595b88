"""A verdict: how bad it is, how well that is supported, one sentence with its numbers, and where it comes from."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Self

from diag import display
from diag.door import class_at_the_door
from diag.encoding import decode, encode
from diag.errors import InvalidInput, one_of

OUR_CHOICE = "our choice, uncalibrated"  # of a threshold: who chose it


class Level(enum.StrEnum):
    """How bad it is.

    `unknown`: the uncertainty straddles the threshold. `description`: measured, and no paper or calibration
    licenses a judgement; never counted as passed, never shown as a finding. `not_applicable`: a precondition fails.

    >>> Level("warning").is_finding, Level.UNKNOWN.is_finding
    (True, False)
    >>> sorted([Level.OK, Level.ALARM, Level.WARNING], key=lambda level: level.severity)[0].value
    'alarm'
    """

    ALARM = "alarm"
    WARNING = "warning"
    UNKNOWN = "unknown"
    OK = "ok"
    DESCRIPTION = "description"
    NOT_APPLICABLE = "not_applicable"

    @classmethod
    def _missing_(cls, value: object) -> Self:
        raise InvalidInput(one_of(cls, value))

    @property
    def is_finding(self) -> bool:
        """Whether something is wrong: an alarm or a warning."""
        return self in (Level.ALARM, Level.WARNING)

    @property
    def severity(self) -> int:
        """0 is the worst; sort by it to have the worst first."""
        return list(Level).index(self)


class Confidence(enum.StrEnum):
    """What kind of support a verdict has."""

    ARITHMETIC = "arithmetic"
    THEOREM = "theorem"
    CALIBRATED = "calibrated"
    STRONG_EMPIRICAL = "strong_empirical"
    WEAK_EMPIRICAL = "weak_empirical"
    CONTESTED = "contested"

    @classmethod
    def _missing_(cls, value: object) -> Self:
        raise InvalidInput(one_of(cls, value))


@class_at_the_door(convert=False)
@dataclass(frozen=True)
class Verdict:
    """One sentence with its numbers, what to try, what would refute it, and where it comes from.

    `value` and `threshold` are the number that decided and what it was compared with, `unit` theirs where no field
    of the result is the value ("share": read as a percentage); `layers` names the parts of the network that it
    speaks of; `threshold_source` says who chose the threshold.

    `cause` names what happened, from the closed list of causes (`diag.instruments.causes`), where the verdict says
    why; `explained_by` names causes of which this would be a consequence, so that one story is told once. `step` is
    where it began, if that is known; `examples` are rows of the data that it speaks of, by their index there.
    """

    level: Level
    sentence: str
    _: KW_ONLY
    advice: str = ""
    source: str = ""
    confidence: Confidence = Confidence.WEAK_EMPIRICAL
    refutation: str = ""
    value: float | None = None
    threshold: float | None = None
    threshold_source: str = ""
    unit: str = ""
    layers: tuple[str, ...] = ()
    cause: str = ""
    explained_by: tuple[str, ...] = ()
    step: int | None = None
    examples: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "level", Level(self.level))
        object.__setattr__(self, "confidence", Confidence(self.confidence))
        for name in ("layers", "examples"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "cause", str(self.cause))
        object.__setattr__(self, "explained_by", tuple(map(str, self.explained_by)))
        if not isinstance(self.sentence, str) or not self.sentence.strip():
            raise InvalidInput("A verdict has an empty sentence; say what was found, with its numbers.")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-safe dict; `from_dict` brings the verdict back."""
        data: dict[str, Any] = encode(dataclasses.asdict(self))
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Verdict:
        """The verdict that `to_dict` gave."""
        return cls(**decode(data))

    def __str__(self) -> str:
        return self.sentence

    def _repr_html_(self) -> str:
        return display.verdict_html(self.level, self.sentence, self.advice, self.refutation, self.source)


@dataclass(frozen=True)
class Precondition:
    """Something that must hold for the verdict to mean anything, and whether it does.

    detail: why it does not, in a clause. Where it holds the detail is left out, so that it cannot be read as a
    failure.
    """

    name: str
    holds: bool
    detail: str = ""

    def __post_init__(self) -> None:
        if self.holds:
            object.__setattr__(self, "detail", "")

    def verdict(self, source: str, advice: str = "") -> Verdict:
        """The verdict on a result for which this does not hold: not applicable, and why."""
        return Verdict(Level.NOT_APPLICABLE, f"No verdict: {self.detail}", advice=advice, source=source)
