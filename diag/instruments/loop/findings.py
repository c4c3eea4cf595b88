"""What the checks of the loop share: findings, of which the worst is reported, and the result that holds them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from diag.display import format_number
from diag.errors import named
from diag.instruments.causes import Cause
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured

SOURCE = "arithmetic on what the loop did"
TWICE, THRICE = 2, 3  # how often something must happen before it is a finding: once may be chance
STEP_OF_A_SUM = 0.5  # learning rate times examples of a batch, beyond which plain SGD is reported
NO_STEP = Precondition("an optimizer step", False, "no optimizer step on the model's parameters was seen.")


def reach(lower: float, upper: float) -> str:
    """Where outputs between two bounds, either of which may be infinite, can lie.

    >>> reach(0.0, 1.0), reach(0.0, math.inf), reach(-math.inf, 5.0)
    ('between 0 and 1', 'above 0', 'below 5')
    """
    if math.isinf(upper):
        return f"above {format_number(lower)}"
    if math.isinf(lower):
        return f"below {format_number(upper)}"
    return f"between {format_number(lower)} and {format_number(upper)}"


def parameters_named(names: Sequence[str]) -> str:
    """These parameters, as a sentence begins with them.

    >>> parameters_named(["fc.weight"]), parameters_named(["fc.weight", "fc.bias"])
    ('Parameter fc.weight', 'Parameters fc.weight and fc.bias')
    """
    return f"{'Parameters' if len(names) > 1 else 'Parameter'} {named(names)}"


@dataclass(frozen=True)
class LoopFinding:
    """One thing that is wrong: the fields of its verdict."""

    level: Level
    cause: Cause
    sentence: str
    advice: str
    refutation: str
    step: int | None = None
    layers: tuple[str, ...] = ()
    explained_by: tuple[Cause, ...] = ()
    confidence: Confidence = Confidence.ARITHMETIC
    threshold_source: str | None = None  # where a threshold of ours decided

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        kept = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return kept | {"level": str(self.level), "cause": str(self.cause), "confidence": str(self.confidence)}


@dataclass(frozen=True)
class FindingText:
    """What is said of something found; `{name}` in the sentence or the advice is a word that it is told with."""

    cause: Cause
    sentence: str
    advice: str
    refutation: str
    level: Level = Level.ALARM

    def finding(self, words: Mapping[str, str], step: int | None) -> LoopFinding:
        """The finding that these words make of it."""
        sentence, advice = self.sentence.format_map(words), self.advice.format_map(words)
        return LoopFinding(self.level, self.cause, sentence, advice, self.refutation, step=step)


@dataclass(frozen=True, kw_only=True, eq=False)
class LoopCheck(Result):
    """The findings of one check on the loop, the worst first."""

    cites: ClassVar[str] = SOURCE
    num_steps: int = measured("steps that the facts are of")
    num_findings: int = measured("things found wrong")
    found: tuple[Mapping[str, Any], ...] = measured("what was found wrong, the worst first")
    fine: str = measured("what is said where nothing was found")

    def verdict(self) -> Verdict:
        unmet = self.unmet()
        if unmet is not None:
            return unmet.verdict(self.cites)
        if not self.found:
            return Verdict(Level.OK, self.fine, source=self.cites, confidence=Confidence.ARITHMETIC)
        return Verdict(**self.found[0], source=self.cites)

    def plot(self, ax: Any = None) -> Any:
        """How many things were found, by cause."""
        causes = [str(f["cause"]).replace("_", " ") for f in self.found]
        ax.barh(
            list(dict.fromkeys(causes)) or ["nothing found"],
            [causes.count(c) for c in dict.fromkeys(causes)] or [0],
        )
        ax.set(xlabel="findings", ylabel="cause")


Check = TypeVar("Check", bound=LoopCheck)


def judged(kind: type[Check], steps: int, findings: Iterable[LoopFinding], fine: str, **about: Any) -> Check:
    """A result of this kind with the findings in the order of their severity."""
    ordered = sorted(findings, key=lambda f: f.level.severity)
    return kind(
        num_steps=steps,
        num_findings=len(ordered),
        found=tuple(f.plain() for f in ordered),
        fine=fine,
        notes=tuple(f.sentence for f in ordered[1:]),
        **about,
    )
