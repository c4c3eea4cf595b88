"""What a run consists of: outcomes at a step, events, costs, and the findings that it makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from diag.result import Outcome, Result, Verdict


class Unread(NamedTuple):
    """An outcome that is still the line of the file that holds it; `kind` is result, skipped or failed."""

    kind: str
    line: bytes


class Record(NamedTuple):
    """An outcome at a step, and the seconds that it took."""

    step: int
    instrument: str
    outcome: Outcome | Unread
    seconds: float | None = None

    @property
    def is_result(self) -> bool:
        """Whether the instrument measured, whatever it found; not where it was skipped or failed."""
        outcome = self.outcome
        return outcome.kind == "result" if isinstance(outcome, Unread) else isinstance(outcome, Result)


class Event(NamedTuple):
    """Something that happened at a step, in one sentence."""

    step: int
    kind: str
    text: str


class Cost(NamedTuple):
    """Time spent at a step: `seconds` on an instrument, or the wall time that passed since the last such cost
    and the part of it that the watch took (of that, what ran at every step, and the checks' looks at the probe)."""

    step: int
    instrument: str = ""
    seconds: float = 0.0
    wall_seconds: float = 0.0
    watch_seconds: float = 0.0
    always_on_seconds: float = 0.0
    check_seconds: float = 0.0


@dataclass(frozen=True)
class Finding:
    """What one instrument says about the whole run: the verdict on its series from `first_step` to `last_step`.

    computed: whether the series is one result, computed of the run's steps when it was opened.
    """

    instrument: str
    title: str
    source: str
    verdict: Verdict
    series: Sequence[tuple[int, Result]]
    first_step: int
    last_step: int
    began: int | None = None
    computed: bool = False
