"""The check of a run, for CI: which verdicts and limits fail, given the user's policy and runs that were accepted.

With a baseline a verdict fails only where it is worse than in every run of the baseline; what was there before is
listed as known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diag.display import format_number
from diag.errors import InvalidInput, RunError
from diag.reporting.machines.findings import finding_entry, findings_document, json_number, run_entry, run_name
from diag.reporting.machines.policy import FAIL_ON, IGNORE, Limit, Policy
from diag.reporting.plain import clean, listed
from diag.result import Failed, Level
from diag.run.entries import Finding
from diag.run.reading import read_run
from diag.run.run import Run

UNJUDGED = "no verdict"  # the outcome of a check that judged nothing

CHECK_FORMAT, CHECK_VERSION = "diag-check", 1


def check(run: Run, policy: Policy | None = None, baseline: Sequence[Run] = ()) -> dict[str, Any]:
    """The document of a check: every verdict and limit with its outcome, and whether the run passed.

    Outcomes: "failed"; "known" (as bad in the baseline); "ignored" (the user's choice); "passed"; "tolerated" (a
    finding milder than what fails); "no verdict". Raises InvalidInput where nothing was measured, or where a limit
    is on a number that the run does not have.
    """
    policy = policy or Policy()
    run = with_settings(run, policy.settings)
    baseline = [with_settings(b, policy.settings) for b in baseline]
    if not run.findings():
        raise InvalidInput(
            f"Nothing was measured in {run.path or run_name(run)}, so there is nothing to check; give a run of a "
            "watched training."
        )
    known = _worst([b.findings() for b in baseline], policy)
    checks = [_check_entry(f, run.last_step, policy, known) for f in run.findings()]
    limits = list(_limit_entries(run, policy))
    failed = any(row["outcome"] == "failed" for row in (*checks, *limits))
    return {
        "format": CHECK_FORMAT,
        "format_version": CHECK_VERSION,
        "run": run_entry(run),
        "fail_on": policy.fail_on,
        "passed": not failed,
        "exit_code": int(failed),
        "policy": None if policy.path is None else clean(policy.path),
        "baseline": [clean(run_name(b)) for b in baseline],
        "checks": checks,
        "limits": limits,
        "broken": sorted({clean(o.instrument) for _, o in run.outcomes if isinstance(o, Failed)}),
        "problems": findings_document(run)["problems"],
    }


def with_settings(run: Run, settings: Mapping[str, Mapping[str, Any]]) -> Run:
    """The run, judged with other settings by the checks that are computed from its record."""
    if not settings:
        return run
    before = dict(run.metadata.get("settings", {}))
    merged = {name: {**before.get(name, {}), **settings.get(name, {})} for name in {*before, *settings}}
    return dataclasses.replace(run, metadata=dict(run.metadata) | {"settings": merged})


def last_healthy(run: Run, count: int) -> list[Run]:
    """The `count` latest runs beside `run` that were made before it and have no finding, the latest last.

    Raises InvalidInput where there are fewer.
    """
    if run.path is None:
        raise InvalidInput("A run in memory lies beside no others; give the baseline by hand.")
    made = str(run.metadata.get("created", ""))
    others = [r for r in _runs_beside(run.path) if str(r.metadata.get("created", "")) <= made]
    others.sort(key=lambda r: str(r.metadata.get("created", "")))
    healthy = [r for r in others if not any(f.verdict.level.is_finding for f in r.findings())]
    if len(healthy) < count:
        raise InvalidInput(
            f"{len(healthy)} of the {len(others)} earlier runs beside {run.path} are without a finding; expected "
            f"{count}. Give fewer, or a baseline."
        )
    return healthy[len(healthy) - count :]


def _runs_beside(path: Path) -> Iterable[Run]:
    here = path.resolve()
    for folder in sorted(here.parent.iterdir()):
        if folder != here and (folder / "run.json").is_file():
            try:
                yield read_run(folder)
            except RunError:  # of another version, or damaged: it is not a baseline
                continue


def _worst(baseline: Sequence[Sequence[Finding]], policy: Policy) -> dict[str, int]:
    """The severity of each instrument's worst level in the baseline (0 is the worst)."""
    worst: dict[str, int] = {}
    for finding in (f for findings in baseline for f in findings):
        level = policy.level(finding.instrument, str(finding.verdict.level))
        if level in FAIL_ON:
            severity = Level(level).severity
            worst[finding.instrument] = min(severity, worst.get(finding.instrument, severity))
    return worst


def _check_entry(finding: Finding, last_step: int, policy: Policy, known: Mapping[str, int]) -> dict[str, Any]:
    entry = finding_entry(finding, last_step)
    counts_as = policy.level(finding.instrument, entry["level"])
    return entry | {"counts_as": counts_as, "outcome": _outcome(finding, counts_as, policy, known)}


def _outcome(finding: Finding, counts_as: str, policy: Policy, known: Mapping[str, int]) -> str:
    if counts_as == IGNORE:
        return "ignored"
    if counts_as not in FAIL_ON:
        return "passed" if finding.verdict.level is Level.OK else UNJUDGED
    if FAIL_ON.index(counts_as) > FAIL_ON.index(policy.fail_on):
        return "tolerated"
    worst = known.get(finding.instrument)
    return "known" if worst is not None and worst <= Level(counts_as).severity else "failed"


def _limit_entries(run: Run, policy: Policy) -> Iterable[dict[str, Any]]:
    values = run.last_values()
    for limit in policy.limits:
        if limit.name not in values:
            near = [name for name in values if name.rpartition(".")[2] == limit.name.rpartition(".")[2]]
            known = listed((near or sorted(values))[:8]) or "none"
            raise InvalidInput(f"There is a limit on {limit.name}, which the run did not record; it has {known}.")
        kept = limit.is_kept_by(values[limit.name])
        fails = FAIL_ON.index(limit.level) <= FAIL_ON.index(policy.fail_on)
        yield {
            "name": clean(limit.name),
            "value": json_number(values[limit.name]),
            "min": json_number(limit.min),
            "max": json_number(limit.max),
            "level": limit.level,
            "outcome": "passed" if kept else "failed" if fails else "tolerated",
            "sentence": _limit_sentence(limit, values[limit.name], kept),
        }


def _limit_sentence(limit: Limit, value: float, kept: bool) -> str:
    bound = " and ".join(
        part
        for part in (
            f"at least {format_number(limit.min)}" if limit.min > -float("inf") else "",
            f"at most {format_number(limit.max)}" if limit.max < float("inf") else "",
        )
        if part
    )
    return clean(f"{limit.name} is {format_number(value)}; {'' if kept else 'the limit is '}{bound}.")
