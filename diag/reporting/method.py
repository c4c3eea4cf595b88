"""How it was measured: the schedule and its cost, settings and thresholds, versions and seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy

from diag.display import format_number, format_seconds, format_share
from diag.reporting.caveats import spent
from diag.reporting.evidence import Evidence
from diag.reporting.plain import as_text, clean

# A seed that nobody chose is a random number of twenty digits: it stands in the metadata only.
DRAWN_SEED = 10**10

# What a run's metadata hold besides facts about the training.
SHOWN_ELSEWHERE = (
    "layers",
    "row",
    "settings",
    "versions",
    "format",
    "sessions",
    "instruments",
    "parameters_by_layer",
)


def facts(evidence: Evidence) -> list[dict[str, str]]:
    """What the network and its training are, as pairs for the top of the page."""
    return [{"name": name, "text": clean(text)} for name, text in _facts(evidence) if text]


def _facts(evidence: Evidence) -> Iterable[tuple[str, str]]:
    about, history = evidence.metadata, evidence.history
    if about.get("model"):
        yield "Model", as_text(about["model"])
    if isinstance(about.get("parameters"), int):
        yield "Parameters", format_number(about["parameters"])
    optimizer = (history.optimizer if history is not None else {}) or about.get("optimizer")
    if optimizer:
        yield "Optimizer", _optimizer(optimizer)
    if evidence.kind == "run":
        yield "Steps", f"{evidence.last_step:,}"
    if history is not None and numpy.isfinite(history.loss).any():
        losses = numpy.asarray(history.loss)
        yield "Last loss", format_number(float(losses[numpy.isfinite(losses)][-1]), 4)
    yield "Probe", _probe(evidence)
    for name in ("examples", "device"):
        if about.get(name) not in (None, "", {}):
            yield name.capitalize(), as_text(about[name])
    if isinstance(about.get("seed"), int) and abs(about["seed"]) < DRAWN_SEED:
        yield "Seed", str(about["seed"])
    wall, _ = spent(evidence)
    if wall and math.isfinite(wall):
        yield "Training time", format_seconds(wall)
    if about.get("created"):
        yield "Began", str(about["created"])[:16].replace("T", " ")


def _probe(evidence: Evidence) -> str:
    """What the curves of a run are measured on: as its metadata or its events have it."""
    about = evidence.metadata.get("probe")
    if about in (None, "", {}):
        return next((e.text.rstrip(".") for e in evidence.events if e.kind == "probe"), "")
    size = about.get("examples", about.get("size")) if isinstance(about, Mapping) else about
    return f"{size:,} examples" if isinstance(size, int) else as_text(about)


def _optimizer(about: Any) -> str:
    if not isinstance(about, Mapping):
        return as_text(about)
    kind = about.get("kind") or about.get("name") or about.get("class")
    rate = about.get("lr", about.get("learning_rate"))
    if kind is None:
        return as_text(about)
    return f"{kind}, learning rate {as_text(rate)}" if isinstance(rate, (int, float)) else str(kind)


def method(evidence: Evidence, audits: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The tables of the last section."""
    about = evidence.metadata
    wall, watch = spent(evidence)
    return {
        "observed": list(dict.fromkeys(clean(e.text) for e in evidence.events if e.kind == "info")),
        "schedule": list(_schedule(evidence)),
        "wall": format_seconds(wall) if wall else "",
        "watch": format_seconds(watch) if wall else "",
        "share": format_share(watch / wall) if wall else "",
        "budget": format_share(about["budget"]) if isinstance(about.get("budget"), (int, float)) else "",
        "settings": [
            {"audit": a["id"], "check": a["name"], "source": a["threshold_source"], **row}
            for a in audits
            for row in a.get("settings", ())
        ],
        "thresholds": [
            {
                "audit": a["id"],
                "name": a["name"],
                "threshold": a["threshold"],
                "source": a["threshold_source"],
                "uncalibrated": a["uncalibrated"],
            }
            for a in audits
            if a.get("threshold")
        ],
        "versions": _pairs(about.get("versions") or {}),
        "run": _pairs({k: v for k, v in about.items() if k not in SHOWN_ELSEWHERE and v not in (None, "", {}, [])}),
    }


def _pairs(values: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"name": clean(k).replace("_", " "), "text": as_text(v)} for k, v in values.items()]


def _schedule(evidence: Evidence) -> Iterable[dict[str, Any]]:
    """Of each instrument: when it measured, how long that took, on how many examples, with which seed."""
    in_time, seconds = evidence.kind == "run", dict[str, list[float]]()
    for cost in evidence.costs:
        if cost.instrument:
            seconds.setdefault(cost.instrument, []).append(cost.seconds)
    for finding in evidence.findings:
        about = finding.series[-1][1].provenance
        own = [r.provenance.seconds for _, r in finding.series if r.provenance.seconds is not None]
        # What is computed from the record when the run is opened takes a different time at each opening.
        times = [] if finding.computed else seconds.get(finding.instrument) or own
        steps = [step for step, _ in finding.series]
        yield {
            "audit": finding.instrument,
            "name": clean(finding.title),
            "measurements": len(finding.series),
            "steps": "from the record of every step" if finding.computed else steps_text(steps) if in_time else "",
            "total": format_seconds(sum(times)) if times else "",
            "mean": format_seconds(sum(times) / len(times)) if times else "",
            "examples": "" if about.num_examples is None else f"{about.num_examples:,}",
            "seed": "" if about.seed is None else str(about.seed),
        }


def steps_text(steps: Sequence[int]) -> str:
    """ "every 50 from 50 to 900", or "12, 30, 77", or "19 steps from 3 to 900"."""
    if len(steps) == 1:
        return f"{steps[0]:,}"
    gaps = {b - a for a, b in itertools.pairwise(steps)}
    if len(steps) > 2 and len(gaps) == 1:
        return f"every {next(iter(gaps)):,} from {steps[0]:,} to {steps[-1]:,}"
    if len(steps) <= 5:
        return ", ".join(f"{s:,}" for s in steps)
    return f"{len(steps):,} steps from {steps[0]:,} to {steps[-1]:,}"
