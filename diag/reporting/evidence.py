"""What a report is made of, whatever its source: a run, a run's folder, a snapshot or some results.

Nothing is judged here: a run brings its findings, a result its verdict.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diag.errors import InvalidInput, type_of
from diag.registry import instruments, measure_all
from diag.result import Failed, Outcome, Result, Skipped
from diag.run.entries import Cost, Event, Finding
from diag.run.reading import read_run
from diag.run.run import Run
from diag.snapshot.history import History
from diag.snapshot.snapshot import Snapshot

OLD = 0.75  # a verdict measured before this share of the run may not hold for the last step's network


def is_old(measured_at: int, last_step: int) -> bool:
    """Whether a verdict was measured so long before the run's last step that it may no longer hold."""
    return last_step > 0 and measured_at < OLD * last_step


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The findings of a report and all that it says about where they come from.

    kind: "run", or "moment" where everything was measured at one time and no step has a meaning.
    """

    kind: str
    title: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    findings: Sequence[Finding] = ()
    outcomes: Sequence[tuple[int, Skipped | Failed]] = ()
    history: History | None = None
    events: Sequence[Event] = ()
    costs: Sequence[Cost] = ()
    metrics: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    torn: int = 0
    on_disk: bool = False
    not_installed: Sequence[str] = ()
    last_step: int = 0


def gather(source: Any) -> Evidence:
    """The evidence in a Run, the path of one, a Snapshot (measured with every instrument) or name -> result.

    Raises InvalidInput for anything else, RunError where the path holds no run.
    """
    if isinstance(source, Evidence):
        return source
    if isinstance(source, (str, os.PathLike)):
        source = read_run(Path(source))
    if isinstance(source, Run):
        return _from_run(source)
    if isinstance(source, Snapshot):
        return _from_snapshot(source)
    if isinstance(source, Result):
        source = {source.provenance.instrument or type(source).__name__: source}
    if isinstance(source, Mapping) and all(isinstance(v, Outcome) for v in source.values()):
        return _from_outcomes(source, kind="moment", title="Results")
    raise InvalidInput(
        f"A report cannot be made of {type_of(source)}; give a run, the path of its folder, a "
        "diag.Snapshot, or a dict of results by instrument name."
    )


def _from_run(run: Run) -> Evidence:
    # A note of the history is also among the events; it is shown once.
    notes = run.history.notes if run.history is not None else ()
    name = run.metadata.get("name") or (run.path.resolve().name if run.path else "in memory")
    return Evidence(
        kind="run",
        title=str(name) if run.metadata.get("checkpoints") else f"Run {name}",
        metadata=run.metadata,
        findings=run.findings(),
        outcomes=run.outcomes,
        history=run.history or None,  # one without a step has no time course
        events=[event for event in run.events if event.text not in notes],
        costs=run.costs,
        metrics=run.metrics,
        torn=run.torn,
        on_disk=run.path is not None and run.history is not None,
        not_installed=tuple(run.unknown_instruments),
        last_step=run.last_step,
    )


def _from_snapshot(snapshot: Snapshot) -> Evidence:
    model, about = snapshot.model, snapshot.provenance()
    parameters = {name: p.numel() for name, p in model.named_parameters()}
    metadata = {
        "model": type(model).__name__,
        "parameters": sum(parameters.values()),
        "examples": about.get("num_examples"),
        "data_fingerprint": about.get("data_fingerprint"),
        "seed": snapshot.seed,
        "device": str(next((p.device for p in model.parameters()), "cpu")),
        "versions": _versions(),
    }
    known = {name: value for name, value in metadata.items() if value not in (None, "")}
    title = f"Snapshot of {type_of(model)}"
    outcomes = measure_all(snapshot)
    cut = [Event(0, "data", snapshot.cut_short)] if snapshot.cut_short else []
    return _from_outcomes(
        outcomes, kind="moment", title=title, metadata=known, history=snapshot.history or None, events=cut
    )


def _from_outcomes(outcomes: Mapping[str, Outcome], **about: Any) -> Evidence:
    findings: list[Finding] = []
    others: list[tuple[int, Skipped | Failed]] = []
    for name, outcome in outcomes.items():
        judged = _judge(str(name), outcome)
        if isinstance(judged, Finding):
            findings.append(judged)
        else:
            others.append((0, judged))
    findings.sort(key=lambda f: (f.verdict.level.severity, f.instrument))
    return Evidence(findings=findings, outcomes=others, **about)


def _judge(name: str, outcome: Outcome) -> Finding | Skipped | Failed:
    if not isinstance(outcome, Result):
        return outcome
    known = instruments().get(name)
    title = known.title if known else name.replace("_", " ").capitalize()
    try:
        verdict = outcome.verdict()
    except Exception as error:
        return Failed(name, f"Its verdict failed: {type(error).__name__}: {error}")
    return Finding(name, title, known.source if known else verdict.source, verdict, [(0, outcome)], 0, 0)


def _versions() -> dict[str, str]:
    import platform

    import numpy
    import torch

    import diag

    return {
        "diag": diag.__version__,
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }
