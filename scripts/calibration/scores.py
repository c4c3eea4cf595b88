"""Counts: what was detected and named, how soon, what was false, and what was said of healthy runs.

Everything is computed from rows, so that a rule here can change without a run. A *told* finding is an alarm or a
warning. What a program draws as it is (its control: kind "plain", the same seed) is not counted as detecting a
fault in it; it counts as a false alarm, once, on the control.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from calibration.fault import Fault
from calibration.kinds import faults

Row = dict[str, Any]
TOLD = ("alarm", "warning")
SOON = 3  # steps within which a silent fault of the loop should be named
# Checks whose "ok" is contradicted by a loss that left for good.
OF_THE_COURSE = ("gradient_flow", "divergence", "loss_course")
WORSE, SLIGHTLY = 0.05, 0.02


def told(row: Row) -> list[Row]:
    """The alarms and warnings of a row, in the order of its stories."""
    return [f for f in row.get("findings", []) if f["level"] in TOLD]


def numbers(values: Iterable[Any]) -> list[float]:
    return [float(v) if v is not None else math.nan for v in values]


@dataclass
class Judged:
    """One run of a fault, judged.

    counted: it is to be detected. detected, named, first: told anything true, a right cause, a right cause first.
    steps, shown: steps from the fault's onset until the first finding that names it (else the first finding), and
    until the loss curve shows that something is wrong; None where never. false: findings that say what is not so.
    unsaid: told findings without a cause.
    """

    row: Row
    fault: Fault
    counted: bool
    why_not: str = ""
    detected: bool = False
    named: bool = False
    first: bool = False
    steps: int | None = None
    shown: int | None = None
    false: list[Row] = field(default_factory=list)
    unsaid: list[Row] = field(default_factory=list)


def judge(row: Row, control: Row | None) -> Judged:
    """A fault's row beside the row of the program as it is."""
    fault = faults()[row["kind"]]
    shown = shown_at(row, control)
    why_not = _why_not(row, control, fault, shown)
    known = {(f["check"], f["cause"]) for f in told(control or {})}
    heard = known | {(f["check"], f["cause"]) for f in withdrawn(control or {})}
    new = [f for f in told(row) if (f["check"], f["cause"]) not in known]
    lost = [f for f in withdrawn(row) if (f["check"], f["cause"]) not in heard]
    right = [f for f in new if f["cause"] in fault.names]
    steps = min((f["told"] for f in right or new if f["told"] is not None), default=None)
    return Judged(
        row,
        fault,
        counted=not why_not,
        why_not=why_not,
        detected=any(f["cause"] in fault.names | fault.follows for f in new),
        named=bool(right),
        first=bool(right) and new[0] in right,
        steps=None if steps is None else max(0, steps - row["onset"] + 1),
        shown=None if shown is None else max(0, shown - row["onset"] + 1),
        false=[f for f in [*new, *lost] if f["cause"] and f["cause"] not in fault.names | fault.follows]
        + _passed(row),
        unsaid=[f for f in new if not f["cause"]],
    )


def _why_not(row: Row, control: Row | None, fault: Fault, shown: int | None) -> str:
    if "error" in row:
        return f"it did not run: {row['error']}"
    if fault.unknowable:
        return fault.unknowable
    if fault.needs_harm and shown is None and not worse(row, control):
        return "it did this program no harm"
    return ""


def _passed(row: Row) -> list[Row]:
    """Checks of the course of training that pass a run whose loss left for good."""
    left = row.get("losses") and diverged(numbers(row["losses"]))
    passed = [f for f in row.get("findings", []) if f["check"] in OF_THE_COURSE and f["level"] == "ok"]
    return passed if left else []


def diverged(losses: Sequence[float]) -> bool:
    """Whether the loss ends without a number, or far above where it began."""
    return not math.isfinite(losses[-1]) or (losses[0] > 0 and losses[-1] > 5 * losses[0])


def worse(row: Row, control: Row | None) -> bool:
    """Whether the script's own metric ended lower than on the program as it is."""
    if control is None or not row["metrics"] or not control["metrics"]:
        return False
    here, there = numbers(row["metrics"])[-1], numbers(control["metrics"])[-1]
    return not here >= there - WORSE * abs(there) - SLIGHTLY


def shown_at(row: Row, control: Row | None) -> int | None:
    """The step from which the loss differs from the control's by half of what the control gains, and goes on to.

    This is the earliest that a person could see it who knows the loss of the healthy training.
    """
    if control is None or not row.get("losses") or not control.get("losses"):
        return None
    ours, theirs = numbers(row["losses"]), numbers(control["losses"])
    gain = abs(theirs[0] - min(theirs))
    off = [not abs(loss - _at(theirs, i * row["block"] / control["block"])) <= 0.5 * gain
           for i, loss in enumerate(ours)]  # fmt: skip
    for i in range(len(off)):
        if off[i] and (i + 1 == len(off) or off[i + 1]):
            return int((i + 1) * row["block"])
    return None


def _at(curve: Sequence[float], place: float) -> float:
    return curve[min(len(curve) - 1, int(place))]


@dataclass
class Alarm:
    """Something said of a healthy run."""

    row: Row
    finding: Row


def withdrawn(row: Row) -> list[Row]:
    """What was spoken while training went on, and is not among the findings at its end: each once."""
    kept = {(f["check"], f["cause"]) for f in told(row)}
    gone = {(f["check"], f["cause"]): f for f in reversed(row.get("spoken", []))}
    return [f | {"sentence": f"(withdrawn) {f['sentence']}"} for key, f in gone.items() if key not in kept]


@dataclass
class Scores:
    """All that a set of rows says."""

    judged: list[Judged]
    healthy: list[Row]
    alarms: list[Alarm]
    broken: list[Row]

    @property
    def counted(self) -> list[Judged]:
        return [j for j in self.judged if j.counted]

    def share(self, what: str) -> float:
        """Of the counted runs, the share that is `detected`, `named` or `first`."""
        return _share(bool(getattr(j, what)) for j in self.counted)

    def kinds(self, what: str) -> float:
        """The mean over the kinds of fault of the share of their counted runs."""
        by_kind: dict[str, list[bool]] = {}
        for j in self.counted:
            by_kind.setdefault(j.fault.name, []).append(bool(getattr(j, what)))
        return sum(map(_share, by_kind.values())) / max(1, len(by_kind)) if by_kind else math.nan

    @property
    def soon(self) -> float:
        """Of the counted silent faults of the loop, the share that was named within `SOON` steps."""
        silent = [j for j in self.counted if j.fault.silent and j.fault.theme == "loop"]
        return _share(j.named and j.steps is not None and j.steps <= SOON for j in silent)

    def false_alarms(self, level: str) -> int:
        """Healthy runs of which something at this level was said."""
        return len({_key(a.row) for a in self.alarms if a.finding["level"] == level})

    @property
    def healthy_steps(self) -> int:
        return sum(r.get("steps", 0) for r in self.healthy)


def score(rows: Iterable[Row]) -> Scores:
    """Judge all rows; a control is one of them."""
    rows = list(rows)
    controls = {(r["program"], r["seed"]): r for r in rows if r["kind"] == "plain"}
    healthy = [r for r in rows if not r["fault"] and "error" not in r]
    return Scores(
        judged=[
            judge(r, controls.get((r["program"], r["seed"]))) for r in rows if r["fault"] and r["kind"] in faults()
        ],
        healthy=healthy,
        alarms=[Alarm(r, f) for r in healthy for f in [*told(r), *withdrawn(r)]],
        broken=[r for r in rows if "error" in r or (r.get("raised") and not r["fault"])],
    )


@dataclass
class CheckScores:
    """One check: on the faults that it can name, and on healthy runs."""

    check: str
    causes: set[str]
    targets: list[Judged]
    alarms: list[Alarm]
    scores: Scores

    @property
    def detected(self) -> float:
        return _share(any(f["check"] == self.check for f in told(j.row)) for j in self.targets)

    @property
    def named(self) -> float:
        return _share(bool(self._right(j)) for j in self.targets)

    @property
    def first(self) -> float:
        return _share(j.first and any(f["check"] == self.check for f in told(j.row)[:1]) for j in self.targets)

    @property
    def steps(self) -> float | None:
        """The median of the steps from onset until this check names the fault."""
        found = sorted(self._right(j)[0]["told"] - j.row["onset"] + 1 for j in self.targets if self._right(j))
        return float(max(0, found[len(found) // 2])) if found else None

    @property
    def false(self) -> int:
        """False statements about faulty runs."""
        return sum(f["check"] == self.check for j in self.scores.judged for f in j.false)

    def _right(self, j: Judged) -> list[Row]:
        return [f for f in told(j.row) if f["check"] == self.check and f["cause"] in j.fault.names]


def by_check(scores: Scores) -> list[CheckScores]:
    """The checks that told anything or passed a run, by name. A check's targets are the counted runs of the faults
    whose causes it has named anywhere."""
    causes: dict[str, set[str]] = {}
    for row in [*(j.row for j in scores.judged), *scores.healthy]:
        for f in row.get("findings", []):
            causes.setdefault(f["check"], set()).update([f["cause"]] if f["cause"] and f["level"] in TOLD else [])
    return [
        CheckScores(
            check,
            named,
            [j for j in scores.counted if j.fault.names & named],
            [a for a in scores.alarms if a.finding["check"] == check],
            scores,
        )
        for check, named in sorted(causes.items())
    ]


def _share(found: Iterable[bool]) -> float:
    found = list(found)
    return sum(found) / len(found) if found else math.nan


def _key(row: Row) -> tuple[Any, ...]:
    return row["kind"], row["program"], row["seed"]
