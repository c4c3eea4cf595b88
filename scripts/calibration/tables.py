"""Tables of the scores: for the terminal, and as the documentation's page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from calibration.scores import Judged, Scores, by_check, told


def summary(scores: Scores) -> list[tuple[str, str]]:
    """The figures of the whole, each with what it is."""
    per_thousand = 1000 * len(scores.alarms) / max(1, scores.healthy_steps)
    faulty, sound = {j.fault.name for j in scores.counted}, {r["kind"] for r in scores.healthy}
    both = lambda what: f"{percent(scores.share(what))}; {percent(scores.kinds(what))}"  # noqa: E731
    return [
        ("faulty runs that count (kinds)", f"{len(scores.counted)} ({len(faulty)})"),
        ("detected, of runs; mean over kinds", both("detected")),
        ("right cause named", both("named")),
        ("right cause first", both("first")),
        ("silent faults of the loop named within 3 steps", percent(scores.soon)),
        ("false statements on faulty runs", str(sum(len(j.false) for j in scores.judged))),
        ("healthy runs (kinds), steps", f"{len(scores.healthy)} ({len(sound)}), {scores.healthy_steps:,}"),
        ("healthy runs with an alarm", str(scores.false_alarms("alarm"))),
        ("healthy runs with a warning", str(scores.false_alarms("warning"))),
        ("findings on healthy runs, a thousand steps", f"{per_thousand:.2f}"),
        ("runs that broke", str(len(scores.broken))),
        ("share of wall time spent watching, median", percent(_median(_shares(scores)))),
        ("seconds that closing took, median; largest", _closing(scores)),
    ]


CHECKS = (
    "check",
    "runs",
    "detected",
    "right cause",
    "first",
    "steps",
    "false",
    "alarms",
    "warnings",
    "/1,000 steps",
)


def checks(scores: Scores) -> list[Sequence[str]]:
    """A row a check that judges: on the faults that it names, then on healthy runs."""
    found = []
    for c in by_check(scores):
        levels = [a.finding["level"] for a in c.alarms]
        if not c.targets and not levels and not c.false:
            continue
        per_thousand = 1000 * len(levels) / max(1, scores.healthy_steps)
        found.append([
            c.check, str(len(c.targets)), percent(c.detected), percent(c.named), percent(c.first), whole(c.steps),
            str(c.false), str(levels.count("alarm")), str(levels.count("warning")), f"{per_thousand:.2f}",
        ])  # fmt: skip
    return found


def rates(scores: Scores) -> dict[str, dict[str, int]]:
    """The counts of every check, by name (see `diag.rates`)."""
    found = {}
    for c in by_check(scores):
        disturbed = {(a.row["kind"], a.row["program"], a.row["seed"]) for a in c.alarms}
        named = sum(
            bool({f["cause"] for f in told(j.row) if f["check"] == c.check} & j.fault.names) for j in c.targets
        )
        found[c.check] = {
            "broken": len(c.targets),
            "named": named,
            "sound": len(scores.healthy),
            "disturbed": len(disturbed),
        }
    return found


KINDS = ("fault", "theme", "runs", "detected", "right cause", "first", "steps", "loss shows", "instead or besides")


def kinds(scores: Scores) -> list[Sequence[str]]:
    """A row a kind of fault."""
    by_kind: dict[str, list[Judged]] = {}
    for j in scores.counted:
        by_kind.setdefault(j.fault.name, []).append(j)
    return [_kind(name, group) for name, group in by_kind.items()]


def _kind(name: str, group: list[Judged]) -> Sequence[str]:
    others = {f["cause"] or f"({f['check']})" for j in group for f in told(j.row)} - group[0].fault.names
    return [
        name, str(group[0].fault.theme), str(len(group)), of(j.detected for j in group), of(j.named for j in group),
        of(j.first for j in group), _spread(j.steps for j in group), _spread(j.shown for j in group),
        ", ".join(sorted(others)),
    ]  # fmt: skip


def misses(scores: Scores) -> list[str]:
    """The counted runs that were not detected, or not named, by name."""
    return [
        f"{j.fault.name} on {j.row['program']}" + ("" if not j.detected else " (detected, not named)")
        for j in scores.counted
        if not j.named
    ]


def untrue(scores: Scores) -> list[str]:
    """False statements, and what was said of healthy runs, each with its sentence."""
    return [
        *(f"{j.fault.name} on {j.row['program']}: {_said(f)}" for j in scores.judged for f in j.false),
        *(
            f"healthy {a.row['kind']} on {a.row['program']}/{a.row['seed']}: {_said(a.finding)}"
            for a in scores.alarms
        ),
    ]


def not_counted(scores: Scores) -> list[str]:
    """The runs of faults that do not count, with the reason."""
    return [f"{j.fault.name} on {j.row['program']}: {j.why_not}" for j in scores.judged if not j.counted]


def broken(scores: Scores) -> list[str]:
    """The runs that did not get through, with what they raised."""
    return [f"{r['kind']} on {r['program']}: {r.get('error') or r['raised']}" for r in scores.broken]


def _said(f: Any) -> str:
    return f"[{f['level']}] {f['check']} ({f['cause'] or 'no cause'}): {f['sentence']}"


def text_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns padded to their widths."""
    lines = [head, *rows]
    widths = [max(len(str(line[i])) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(str(cell).ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The same as markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def percent(share: float | None) -> str:
    return "–" if share is None or math.isnan(share) else f"{share:.0%}".replace("%", " %")


def whole(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


def of(found: Iterable[bool]) -> str:
    found = list(found)
    return f"{sum(found)}/{len(found)}"


def _spread(values: Iterable[int | None]) -> str:
    known = sorted(v for v in values if v is not None)
    if not known:
        return "–"
    return str(known[0]) if known[0] == known[-1] else f"{known[0]}–{known[-1]}"


def _rows(scores: Scores) -> list[Any]:
    return [r for r in [*scores.healthy, *(j.row for j in scores.judged)] if r.get("wall")]


def _shares(scores: Scores) -> list[float]:
    return [r["watching"] / r["wall"] for r in _rows(scores)]


def _closing(scores: Scores) -> str:
    seconds = sorted(r["closing"] for r in _rows(scores))
    return f"{_median(seconds):.2f}; {seconds[-1]:.2f}" if seconds else "–"


def _median(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else math.nan


def page(sides: dict[str, Scores], versions: Any) -> str:
    """The documentation's page: the two halves side by side, then the scoring half in detail."""
    scoring = sides["score"]
    columns = [dict(summary(s)) for s in sides.values()]
    both = [[name, *(c[name] for c in columns)] for name, _ in summary(scoring)]
    parts = [
        HEAD.format(**versions),
        markdown_table(["", *(f"{side} programs" for side in sides)], both),
        "## Each check, on the scoring programs",
        CHECKS_TEXT,
        markdown_table(CHECKS, checks(scoring)),
        "## Each kind of fault, on the scoring programs",
        KINDS_TEXT,
        markdown_table(KINDS, kinds(scoring)),
        "## Misses",
        _bullets(misses(scoring)),
        "## False statements, and what was said of healthy runs",
        _bullets(untrue(scoring)),
        "## Runs that do not count",
        _bullets(not_counted(scoring)),
    ]
    return "\n\n".join(parts) + "\n"


def _bullets(texts: list[str]) -> str:
    return "\n".join(f"- {text}" for text in texts) or "None."


HEAD = """# How often is diag wrong?

Small honest trainings were broken on purpose, one fault at a time, and watched by `diag.watch(model)` with its
defaults; others were left whole, or changed in ways that look unusual and are sound. Thresholds were chosen on one
half of the programs and are scored on the other (`scripts/calibration/split.json`). Made by `scripts/calibrate`
with diag {diag}, torch {torch}, Python {python}; the rows are in `scripts/calibration/results/`.

*Detected*: an alarm or a warning that is true of the fault and that the whole program does not draw. *Right cause*:
one of the findings carries a cause that counts as naming the fault. *First*: the first finding does. A fault that a
watch cannot see, or that did a program no harm, does not count; all of those are listed at the end."""
CHECKS_TEXT = """*Runs*: counted runs of the faults that this check has named anywhere. *Steps*: median from the
onset of the fault until the check named it. *False*: false statements on faulty runs. The last three: findings on
healthy runs."""
KINDS_TEXT = """*Steps*: from the onset until it was named (else until anything was said). *Loss shows*: from the
onset until the loss differs by half of what the healthy training gains, for a reader who knows the healthy
curve."""
