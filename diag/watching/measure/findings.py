"""What a watch has found so far: each finding is said once, when it is first seen.

It goes to `watcher.findings`, to the run's events, to the `diag` logger and to the user's own function. An
instrument finds something again where its verdict's level or cause has changed. What is found at one step is
reported together, the cause before what follows from it; on the logger only the cause is an error or a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from diag.errors import text_of
from diag.registry import Instrument
from diag.result import Level, Result, Verdict
from diag.run.entries import Finding
from diag.run.stories import explains, stories
from diag.snapshot import pause
from diag.watching.waiting import LOGGER

MOST_FINDINGS = 1000  # findings that are kept
RESULTS_KEPT = 64  # results of an instrument that its course is judged by
LARGE_RESULT = 1 << 17  # bytes in the arrays of a result that is not kept


class Findings:
    """Reports what instruments find. event(step, kind, sentence) and note(key, sentence): keep it in the record."""

    def __init__(
        self,
        on_finding: Callable[[Finding], object] | None,
        event: Callable[[int, str, str], None],
        note: Callable[[str, str], None],
    ) -> None:
        self.found: list[Finding] = []
        self._on_finding, self._event, self._note = on_finding, event, note
        self._last: dict[str, tuple[str, str]] = {}
        self._series: dict[str, list[tuple[int, Result]]] = {}
        self.new: list[Finding] = []  # that have not been told

    def result(self, instrument: Instrument, result: Result, step: int) -> None:
        """A measurement has given this; where its verdict breaks, opening the run says so."""
        try:
            verdict = self._judged(instrument, result, step)
        except Exception:
            return
        self.verdict(instrument, verdict, step)

    def _judged(self, instrument: Instrument, result: Result, step: int) -> Verdict:
        if _size(result) > LARGE_RESULT:
            return result.verdict()
        series = self._series.setdefault(instrument.name, [])
        series.append((step, result))
        if len(series) > RESULTS_KEPT:
            del series[1]  # the first is where the course began
        return instrument.result.trend(series)

    def verdict(self, instrument: Instrument, verdict: Verdict, step: int) -> None:
        """An instrument judges so at `step`: say it where it is bad and new."""
        state = (str(verdict.level), verdict.cause)
        known, self._last[instrument.name] = self._last.get(instrument.name), state
        if not verdict.level.is_finding or state == known or len(self.found) >= MOST_FINDINGS:
            return
        self.new.append(Finding(instrument.name, instrument.title, instrument.source, verdict, (), step, step))

    def tell(self) -> None:
        """Say what is new, the causes before what follows from them."""
        new, self.new = self.new, []
        for story in stories(new) if new else ():
            for finding in (story.finding, *story.consequences):
                follows = any(explains(f, finding) for f in self.found)
                self.found.append(finding)
                self._say(finding, follows)

    def _say(self, finding: Finding, follows: bool) -> None:
        verdict, step = finding.verdict, finding.first_step
        self._event(step, "finding", f"{finding.title}: {verdict.sentence}")
        text = f"Step {step:,}: {verdict.sentence}" + (
            f" {verdict.advice}" if verdict.advice and not follows else ""
        )
        level = logging.ERROR if verdict.level is Level.ALARM else logging.WARNING
        LOGGER.log(logging.INFO if follows else level, "%s", text)
        self._call(finding)

    def _call(self, finding: Finding) -> None:
        if self._on_finding is None:
            return
        try:
            with pause.measuring():  # what the user's function does is not training
                self._on_finding(finding)
        except Exception as error:
            what = f"{type(error).__name__}: {text_of(error)}"
            self._note("on_finding", f"The function given as on_finding= raised {what}.")


def _size(result: Result) -> int:
    return sum(getattr(getattr(result, f.name), "nbytes", 0) for f in result.measured_fields())
