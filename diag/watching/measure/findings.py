"""What a watch has found so far: each finding is said once, when it is first seen.

It goes to `watcher.findings`, to the run's events, to the `diag` logger and to the user's own function. An
instrument finds something again where its verdict's level or cause has changed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from diag.errors import text_of
from diag.registry import Instrument
from diag.result import Level, Result, Verdict
from diag.run.run import Finding
from diag.snapshot import pause

TOLD = (Level.ALARM, Level.WARNING)
MOST = 1000  # findings that are kept
LOGGER = logging.getLogger("diag")


class Findings:
    """Says what instruments find. event(step, kind, sentence) and note(key, sentence): keep in the record."""

    def __init__(
        self,
        on_finding: Callable[[Finding], object] | None,
        event: Callable[[int, str, str], None],
        note: Callable[[str, str], None],
    ) -> None:
        self.found: list[Finding] = []
        self._on_finding, self._event, self._note = on_finding, event, note
        self._last: dict[str, tuple[str, str]] = {}

    def result(self, instrument: Instrument, result: Result, step: int) -> None:
        """A measurement has given this; where its verdict breaks, opening the run says so."""
        try:
            verdict = result.verdict()
        except Exception:
            return
        self.verdict(instrument, verdict, step)

    def verdict(self, instrument: Instrument, verdict: Verdict, step: int) -> None:
        """An instrument judges so at `step`: say it where it is bad and new."""
        state = (str(verdict.level), verdict.cause)
        known, self._last[instrument.name] = self._last.get(instrument.name), state
        if verdict.level not in TOLD or state == known or len(self.found) >= MOST:
            return
        finding = Finding(instrument.name, instrument.title, instrument.source, verdict, (), step, step)
        self.found.append(finding)
        self._event(step, "finding", f"{instrument.title}: {verdict.sentence}")
        text = f"Step {step:,}: {verdict.sentence}" + (f" {verdict.advice}" if verdict.advice else "")
        LOGGER.log(logging.ERROR if verdict.level is Level.ALARM else logging.WARNING, "%s", text)
        self._call(finding)

    def _call(self, finding: Finding) -> None:
        if self._on_finding is None:
            return
        try:
            with pause.measuring():  # what the user's function does is no training
                self._on_finding(finding)
        except Exception as error:
            what = f"{type(error).__name__}: {text_of(error)}"
            self._note("on_finding", f"The function given as on_finding= raised {what}.")
