"""One case, run and watched as a user would, and what diag said of it as a row of plain data."""

from __future__ import annotations

import math
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

import diag
from calibration.program import Program
from calibration.programs import programs
from calibration.suite import Case

CURVE = 100  # points of the loss curve that a row keeps
TOLD = ("alarm", "warning")


def observe(case: Case) -> dict[str, Any]:
    """The row of a case; what breaks becomes its `error`."""
    program = programs()[case.program](case.seed)
    row: dict[str, Any] = {"kind": case.kind, "program": case.program, "seed": case.seed, "fault": case.fault}
    began = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.what.apply(program)
            program.build()
            row |= _watched(program, Path(folder) / "run", case.what.held_out)
    except Exception as error:
        row["error"] = _where(error)
    row["seconds"] = round(time.perf_counter() - began, 2)
    return row | _training(program)


def _watched(program: Program, folder: Path, held_out: bool) -> dict[str, Any]:
    given: dict[str, Any] = {"held_out": program.held_out_data()} if held_out else {}
    given["on_finding"] = (spoken := []).append
    closing, raised = 0.0, ""
    for number, life in enumerate(program.lives()):
        try:
            with diag.watch(program.watched, run=folder, resume=number > 0, **given):
                life()
                ended = time.perf_counter()
        except Exception as error:  # is part of a training: a policy whose logits are NaN cannot be sampled
            raised = _where(error)
            break
        closing += time.perf_counter() - ended
    if program.world > 1 and torch.distributed.get_rank() > 0:
        return {}
    run = diag.load(folder)
    row = said(run, spoken)
    return row | {
        "raised": raised,
        "steps": run.last_step,
        "wall": round(run.wall_seconds, 3),
        "watching": round(run.watch_seconds, 3),
        "closing": round(closing, 3),
    }


def _where(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"[:500]


def said(run: Any, spoken: list[Any]) -> dict[str, Any]:
    """What a run says: every verdict, the stories in their order, what was told when, what failed."""
    findings = run.findings()
    ordered = [part for story in run.stories() for part in (story.finding, *story.consequences)]
    told = [f.instrument for f in ordered]
    return {
        "findings": [_finding(f, spoken) for f in sorted(findings, key=lambda f: _place(told, f.instrument))],
        "stories": [
            [story.finding.instrument, *(f.instrument for f in story.consequences)] for story in run.stories()
        ],
        "spoken": [_finding(f, spoken) for f in spoken],
        "events": [[e.step, e.kind, e.text] for e in run.events if e.kind != "finding"][:20],
        "failed": [
            [step, o.instrument, str(getattr(o, "reason", o))[:300]]
            for step, o in run.outcomes
            if type(o).__name__ == "Failed"
        ],
    }


def _place(told: list[str], name: str) -> int:
    return told.index(name) if name in told else len(told)


def _finding(finding: Any, spoken: list[Any]) -> dict[str, Any]:
    verdict = finding.verdict
    return {
        "check": finding.instrument,
        "level": str(verdict.level),
        "cause": verdict.cause,
        "sentence": verdict.sentence,
        "confidence": str(verdict.confidence),
        "step": verdict.step,
        "told": _first_told(finding, spoken),
        "value": _number(verdict.value),
        "layers": list(verdict.layers)[:5],
        "examples": list(verdict.examples)[:10],
    }


def _first_told(finding: Any, spoken: list[Any]) -> int | None:
    """The step at which a user could first read it: when this check first named this cause, else the end."""
    if str(finding.verdict.level) not in TOLD:
        return None
    said = [f.first_step for f in spoken if _same(f, finding)]
    return min([*said, finding.last_step])


def _same(one: Any, other: Any) -> bool:
    return one.instrument == other.instrument and one.verdict.cause == other.verdict.cause


def _training(program: Program) -> dict[str, Any]:
    """What the script itself would have printed: its losses, thinned by means of blocks, and its metric."""
    size = max(1, math.ceil(len(program.losses) / CURVE))
    blocks = [program.losses[i : i + size] for i in range(0, len(program.losses), size)]
    return {
        "onset": program.onset or 1,
        "block": size / program.accumulate,
        "losses": [_number(sum(block) / len(block)) for block in blocks],
        "metrics": [_number(m) for m in program.metrics],
    }


def _number(value: Any) -> float | str | None:
    """A number with four digits, in JSON's terms: text where it is not finite."""
    if value is None:
        return None
    return float(f"{value:.4g}") if math.isfinite(value) else str(float(value))
