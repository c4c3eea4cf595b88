"""A run: everything that was recorded of one training, as plain data.

`diag.run.writer` writes the folder of a watched training and `diag.run.reading` opens it; `Run` can also be made
in memory, from the outcomes of some checkpoints, say. A run judges itself: `findings()` has the verdicts, worst
first.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy

from diag import display
from diag.door import class_at_the_door
from diag.encoding import decode
from diag.errors import InvalidInput
from diag.rates import with_rates
from diag.registry import Instrument, attempt, instruments
from diag.result import Failed, Result, Skipped, Verdict
from diag.run.decoding import DecodedOutcomes
from diag.run.entries import Cost, Event, Finding, Record
from diag.run.frames import frame_of
from diag.run.stories import Story, stories
from diag.snapshot.history import History

OPENED = "diag.load(path) opens the run in a folder"


@class_at_the_door(hint=OPENED)
@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """The record of one training.

    metadata: what the run is (format_version, created, model, layers, versions, ...); `settings` in it maps
        an instrument's name to its settings.
    history: the step-by-step record, memory-mapped where it was read from a file; None without a step.
    records, events, times: in the order in which they happened; `costs` has the records' times too.
    metrics: what the user logged, by name: (step, value), in the order in which it came.
    torn: how many records a killed writer left unfinished (at most one a file and session).
    """

    path: Path | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    history: History | None = None
    records: Sequence[Record] = ()
    events: Sequence[Event] = ()
    times: Sequence[Cost] = ()
    metrics: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    torn: int = 0

    def __post_init__(self) -> None:
        if self.path is not None and not self.metadata:
            raise InvalidInput(f"A Run was made of a path alone, and has no records; {OPENED}.")

    @cached_property
    def last_step(self) -> int:
        """The last step of which anything is known."""
        known: list[int] = [] if self.history is None else self.history.steps[-1:].tolist()
        return max([0, *known, *(r.step for r in self.records), *(e.step for e in self.events)])

    @cached_property
    def instruments(self) -> tuple[str, ...]:
        """The names of the instruments that have a series, in the order in which they first measured."""
        from_records = [r.instrument for r in self.records if r.is_result and r.instrument in instruments()]
        return tuple(dict.fromkeys([*self._computed[0], *from_records, *self._logged]))

    @cached_property
    def unknown_instruments(self) -> tuple[str, ...]:
        """Instruments that measured but are not installed here; their series hold raw dicts."""
        return tuple(dict.fromkeys(r.instrument for r in self.records if r.instrument not in instruments()))

    @cached_property
    def outcomes(self) -> tuple[tuple[int, Skipped | Failed], ...]:
        """What was skipped or failed, at which step; in step order."""
        without = [r for r in self.records if not r.is_result and r.instrument not in self._logged]
        recorded = [(r.step, self._decoded.of(r)) for r in without]
        found = [*recorded, *self._computed[1], *self._undecodable, *self._judged[1]]
        return tuple(sorted(found, key=lambda item: item[0]))

    def series(self, name: str) -> list[tuple[int, Result]]:
        """The results of the instrument `name`, by step; raw dicts for one that is not installed here."""
        return list(self._series.get(name, ()))

    def findings(self) -> list[Finding]:
        """One verdict an instrument, over its whole series; the worst first, then the earliest."""
        return list(self._judged[0])

    def stories(self) -> list[Story[Finding]]:
        """What went wrong, each with what follows from it; the worst first, then the most certain and earliest."""
        return stories(self.findings())

    def last_values(self) -> dict[str, float]:
        """The last value of every number: `loss`, `instrument.scalar`, and `logged.name` for the user's own."""
        values: dict[str, float] = {}
        if self.history is not None and len(self.history):
            values["loss"] = float(self.history.loss[-1])
        for name in self.instruments:
            for scalar, value in self.series(name)[-1][1].scalars().items():
                values[f"{name}.{scalar}"] = float(value)
        return values | {f"logged.{name}": float(course[-1][1]) for name, course in self.metrics.items() if course}

    @property
    def costs(self) -> list[Cost]:
        """Where time went: on the records' measurements, and the wall time and the watch's part of it."""
        measured = [Cost(r.step, r.instrument, r.seconds) for r in self.records if r.seconds is not None]
        return sorted([*measured, *self.times], key=lambda cost: cost.step)

    @property
    def wall_seconds(self) -> float:
        """The wall time that the watch has seen."""
        return sum(c.wall_seconds for c in self.times)

    @property
    def watch_seconds(self) -> float:
        """The part of the wall time that was spent in the watch."""
        return sum(c.watch_seconds for c in self.times)

    @property
    def always_on_seconds(self) -> float:
        """The part of the watch's time that went into what runs at every step."""
        return sum(c.always_on_seconds for c in self.times)

    @property
    def check_seconds(self) -> float:
        """The part of the watch's time that the checks took to look at the probe set."""
        return sum(c.check_seconds for c in self.times)

    def to_frame(self) -> Any:
        """A pandas DataFrame of every scalar: a row a step, the columns `loss`, `learning_rate`, the norms of
        the whole network, `instrument.scalar`, and `logged.name` for the user's own. What was not measured at a
        step is NaN."""
        return frame_of(self.history, {name: self.series(name) for name in self.instruments}, self.metrics)

    def computes(self, instrument: Instrument) -> bool:
        """Whether opening the run computes this instrument of its steps, so that other settings judge them again.

        So it is where the instrument needs nothing else; and where it uses what else is known of the loop, if
        nothing of it was recorded, as in an imported log.
        """
        recorded = instrument.name in self._recorded
        return instrument.from_history or (instrument.from_steps and not recorded)

    # How the parts come about: each is computed once, when it is first asked for.

    @cached_property
    def _decoded(self) -> DecodedOutcomes:
        return DecodedOutcomes(self.path, instruments())

    @cached_property
    def _recorded(self) -> set[str]:
        """The names of the instruments that have a result among the records."""
        return {r.instrument for r in self.records if r.is_result}

    @cached_property
    def _series(self) -> dict[str, list[tuple[int, Any]]]:
        series: dict[str, list[tuple[int, Any]]] = {name: [item] for name, item in self._computed[0].items()}
        recorded: dict[str, dict[int, Any]] = {}
        for record in self.records:
            if record.is_result:
                outcome = self._decoded.of(record)
                if not isinstance(outcome, Failed):
                    recorded.setdefault(record.instrument, {})[record.step] = outcome
        measured = {name: sorted(found.items()) for name, found in recorded.items() if name not in series}
        return self._logged | series | measured

    @cached_property
    def _logged(self) -> dict[str, list[tuple[int, Any]]]:
        """The courses that logged numbers give, of instruments that measured nothing."""
        if not self.metrics:
            return {}
        chosen = self.metadata.get("instruments")
        names = [n for n in instruments() if n not in self._recorded and (chosen is None or n in chosen)]
        made = {n: list(instruments()[n].result.from_logged(self.metrics, self.history)) for n in names}
        return {name: course for name, course in made.items() if course}

    @cached_property
    def _computed(self) -> tuple[dict[str, tuple[int, Result]], list[tuple[int, Skipped | Failed]]]:
        """Results of the instruments that the run computes of its steps, and those that gave none."""
        if self.history is None:
            return {}, []
        results, others = {}, []
        chosen = self.metadata.get("instruments")
        for name, instrument in instruments().items():
            if self.computes(instrument) and (chosen is None or name in chosen):
                outcome = attempt(None, instrument, history=self.history, **self._settings(instrument))
                if isinstance(outcome, Result):
                    results[name] = (self.last_step, outcome)
                else:
                    others.append((self.last_step, outcome))
        return results, others

    @cached_property
    def _undecodable(self) -> list[tuple[int, Failed]]:
        results = [(r.step, self._decoded.of(r)) for r in self.records if r.is_result]
        return [(step, outcome) for step, outcome in results if isinstance(outcome, Failed)]

    @cached_property
    def _judged(self) -> tuple[list[Finding], list[tuple[int, Failed]]]:
        findings, failures = [], []
        for name in self.instruments:
            series = self.series(name)
            if not series:
                continue
            first, last = self._range(name, series)
            instrument = instruments()[name]
            try:
                verdict = with_rates(name, instrument.result.trend(series))
            except Exception as error:
                failures.append((last, Failed(name, f"Its verdict failed: {type(error).__name__}: {error}")))
                continue
            began = _began(instrument, series, verdict) if series[0][0] < last else first
            about = (name, instrument.title, instrument.source, verdict, series, first, last, began)
            findings.append(Finding(*about, computed=name in self._computed[0]))
        findings.sort(key=lambda f: (f.verdict.level.severity, f.first_step, f.instrument))
        return findings, failures

    def _range(self, name: str, series: Sequence[tuple[int, Result]]) -> tuple[int, int]:
        if name in self._computed[0] and self.history is not None:
            return int(self.history.steps[0]), int(self.history.steps[-1])
        return series[0][0], series[-1][0]

    def _settings(self, instrument: Instrument) -> dict[str, Any]:
        own_settings = decode(self.metadata.get("settings", {})).get(instrument.name, {})
        return {s.name: own_settings[s.name] for s in instrument.settings if s.name in own_settings}

    # How it looks

    def facts(self) -> dict[str, str]:
        """What the run is, as texts to show: model, parameters, steps, last loss, time, versions."""
        return dict(_facts(self))

    def __repr__(self) -> str:
        where = f" {self.path}" if self.path else ""
        return f"<Run{where}: {self.last_step:,} steps, {', '.join(self.instruments) or 'nothing measured'}>"

    def _repr_html_(self) -> str:
        verdicts = "".join(
            f"<div style='font-size:.85em;opacity:.8;margin-top:.6em'>{html.escape(f.title)}</div>"
            + f.verdict._repr_html_()
            for f in self.findings()
        )
        facts = display.table_html({name: (text, "") for name, text in self.facts().items()}, "The run")
        return f"<div>{verdicts or '<div>Nothing was measured.</div>'}{facts}</div>"


def _began(instrument: Instrument, series: Sequence[tuple[int, Result]], verdict: Verdict) -> int:
    """The first step of the stretch, up to the last measurement, over which the instrument judged as it does
    now."""
    if not verdict.level.is_finding:
        return series[0][0]
    for k in range(len(series) - 1, 0, -1):
        if not instrument.result.trend(series[:k]).level.is_finding:
            return series[k][0]
    return series[0][0]


def _fact(name: str, value: Any) -> str:
    if name == "created":
        return str(value).replace("T", " ").replace("+00:00", " UTC")
    return f"{value:,}" if name == "parameters" and isinstance(value, int) else str(value)


def _facts(run: Run) -> Iterable[tuple[str, str]]:
    about = run.metadata
    if run.path is not None:
        yield "folder", str(run.path)
    for name in ("created", "model", "parameters", "device", "seed"):
        if about.get(name) is not None:
            yield name, _fact(name, about[name])
    yield "steps", f"{run.last_step:,}"
    if run.history is not None and numpy.isfinite(run.history.loss).any():
        losses = run.history.loss
        yield "last recorded loss", display.format_number(float(losses[numpy.isfinite(losses)][-1]))
    if run.wall_seconds and math.isfinite(run.wall_seconds):
        share = display.format_share(run.watch_seconds / run.wall_seconds)
        always = display.format_share(run.always_on_seconds / run.wall_seconds)
        time = f"{display.format_number(run.wall_seconds)} s, of which diag {share}"
        yield "time", time + (f" ({always} at every step)" if run.always_on_seconds else "")
    if run.outcomes:
        yield "skipped or failed", ", ".join(dict.fromkeys(o.instrument for _, o in run.outcomes))
    if run.unknown_instruments:
        yield "not installed here", ", ".join(run.unknown_instruments)
    if run.torn:
        yield "torn records dropped", f"{run.torn:,}"
    for name, version in (about.get("versions") or {}).items():
        yield f"{name} version", str(version)
