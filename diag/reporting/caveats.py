"""What a reader must know of the run before trusting what the report says of the network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy

from diag.display import format_share
from diag.reporting.evidence import Evidence
from diag.reporting.plain import clean, count_in_words, listed
from diag.reporting.timeline import broken_steps
from diag.run.entries import Event
from diag.snapshot.history import History

# Events that give no reason for caution; "info" is shown in the method section, and a finding has its own card.
ROUTINE_EVENTS = ("resume", "start", "end", "info", "schedule", "probe", "finding")
MOST_EVENTS_LISTED = 8
SHORT = 60.0  # seconds of training, in which the looks that do not ask for the budget count


def caveats(evidence: Evidence, counts: Mapping[str, int]) -> list[dict[str, str]]:
    """Warnings about the run itself: kind, text, and the section that says more."""
    found = [
        *_of_checks(counts, evidence.not_installed),
        *_of_history(evidence),
        *_of_events(evidence.events),
        *_of_cost(evidence),
        *_of_files(evidence.torn),
        *_of_the_end(evidence),
    ]
    return [{"kind": kind, "text": clean(text), "section": section} for kind, text, section in found]


Caveats = Iterable[tuple[str, str, str]]


def _of_checks(counts: Mapping[str, int], not_installed: Sequence[str]) -> Caveats:
    if counts["skipped"]:
        text = (
            f"{count_in_words(counts['skipped'], 'check was', 'checks were').capitalize()} skipped; each says why."
        )
        yield "skipped", text, "checks-skipped"
    if counts["failed"]:
        text = f"{count_in_words(counts['failed'], 'check').capitalize()} failed with an error and gave no verdict."
        yield "failed", text, "checks-failed"
    if not_installed:
        names = listed(list(not_installed))
        yield "not installed", f"Measured by instruments that are not installed here: {names}.", ""


def _of_history(evidence: Evidence) -> Caveats:
    history = evidence.history
    if history is None:
        if evidence.kind == "run" and not evidence.metadata.get("checkpoints"):
            yield "missing data", "No optimizer step was recorded, so there is no time course.", ""
        return
    if history.total_steps > len(history):
        text = (
            f"{len(history):,} of {history.total_steps:,} steps were recorded; what happened in between is unknown."
        )
        yield "sampled steps", text, "timeline"
    yield from _of_losses(history)
    yield from _of_gradients(history)
    for note in history.notes:
        yield "note", note, ""


def _of_losses(history: History) -> Caveats:
    steps, seen, bad = numpy.asarray(history.steps), numpy.isfinite(history.loss), ~history.loss_finite
    if bad.any():
        text = f"At {count_in_words(int(bad.sum()), 'step')} the training loss was infinite or not a number"
        yield "non-finite steps", f"{text}, {_range(steps[bad])}.", "timeline"
    missing = ~(seen | bad)
    if missing.all():
        yield "missing data", "The training loss was not observed.", ""
    elif missing.any():
        text = f"The training loss was not observed at {count_in_words(int(missing.sum()), 'step')}"
        yield "missing data", f"{text}, {_range(steps[missing])}.", "timeline"


def _of_gradients(history: History) -> Caveats:
    bad = broken_steps(history)
    if bad.any():
        where = numpy.asarray(history.steps)[bad]
        row = int(numpy.flatnonzero(bad)[0])
        layer = history.layers[int(numpy.flatnonzero(~history.gradient_finite[row])[0])]
        text = f"At {count_in_words(len(where), 'step')} a gradient had infinite or NaN entries, {_range(where)}"
        yield "non-finite steps", f"{text}; the first was in {layer}.", "layers"
    skipped = numpy.asarray(history.skipped)
    if skipped.any():
        where = numpy.asarray(history.steps)[skipped]
        yield (
            "skipped steps",
            f"The GradScaler left out {count_in_words(len(where), 'step')}, {_range(where)}.",
            "timeline",
        )


def _range(steps: Any) -> str:
    return f"at step {steps[0]:,}" if len(steps) == 1 else f"from step {steps[0]:,} to {steps[-1]:,}"


def _of_events(events: Sequence[Event]) -> Caveats:
    """What happened, the repetitions of one kind and text together."""
    noted = [e for e in events if e.kind not in ROUTINE_EVENTS]
    times = Counter((e.kind, e.text) for e in noted)
    first = {(e.kind, e.text): e.step for e in reversed(noted)}
    for key, count in list(times.items())[:MOST_EVENTS_LISTED]:
        kind, text = key
        when = f"step {first[key]:,}" + (f" and {count_in_words(count - 1, 'more time')}" if count > 1 else "")
        yield kind, f"{text.rstrip('.')} ({when}).", ""
    if len(times) > MOST_EVENTS_LISTED:
        yield (
            "events",
            f"{count_in_words(len(times) - MOST_EVENTS_LISTED, 'more event')} of other kinds; see the data.",
            "data",
        )


def _of_cost(evidence: Evidence) -> Caveats:
    wall, watch = spent(evidence)
    budget = evidence.metadata.get("budget")
    if wall and isinstance(budget, (int, float)) and watch > budget * wall:
        text = f"Measuring took {format_share(watch / wall)} of the wall time, more than its budget of "
        why = (
            "; the looks at the first steps, which every run gets, weigh most in a short one"
            if wall < SHORT
            else ""
        )
        yield "over budget", f"{text}{format_share(budget)}{why}.", "method"


def spent(evidence: Evidence) -> tuple[float, float]:
    """(wall time, time spent in the watch) in seconds."""
    return sum(c.wall_seconds for c in evidence.costs), sum(c.watch_seconds for c in evidence.costs)


def _of_files(torn: int) -> Caveats:
    if torn:
        dropped = count_in_words(torn, "record was", "records were").capitalize()
        yield "torn records", f"{dropped} torn and dropped: the writer was killed.", ""


def _of_the_end(evidence: Evidence) -> Caveats:
    """A run on disk is closed when its watch ends; one that was killed, or goes on, is not."""
    if evidence.on_disk and not evidence.metadata.get("closed"):
        text = f"No end was recorded: training goes on, or was killed after step {evidence.last_step:,}."
        yield "unfinished", text, ""
