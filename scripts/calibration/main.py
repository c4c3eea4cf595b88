"""The command line of `scripts/calibrate`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import click

from calibration import tables
from calibration.runner import Results, Row, run_all, versions
from calibration.scores import score, told
from calibration.split import split
from calibration.suite import Case, cases, matching, short_cases

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent.parent / "docs" / "calibration.md"
RATES = Path(__file__).parent.parent.parent / "diag" / "rates.json"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--split", "side", type=click.Choice(list(split())), help="Only the programs of this side.")
@click.option("--only", help="Only this kind, program, kind/program or kind/program/seed.")
@click.option("--short", is_flag=True, help="A cut of twelve cases.")
@click.option("--resume", is_flag=True, help="Skip the cases of which there is a row.")
@click.option("--table", is_flag=True, help="Run nothing; print the tables of the rows that are there.")
@click.option("--page", is_flag=True, help="Run nothing; write the documentation's page from the rows.")
@click.option("--list", "listing", is_flag=True, help="Run nothing; name the cases.")
@click.option("--processes", type=click.IntRange(1, 8), default=2, show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, help="The folder of the rows.")
def main(
    side: str | None,
    only: str | None,
    short: bool,
    resume: bool,
    table: bool,
    page: bool,
    listing: bool,
    processes: int,
    results: Path,
) -> None:
    """How often is diag wrong? Runs broken and healthy trainings, watched, and counts what was said of them."""
    chosen = matching(short_cases() if short else cases(), only, side)
    if not chosen:
        raise click.UsageError(f"No case matches {only!r}; --list names them all.")
    kept = Results(results)
    if listing:
        click.echo("\n".join(f"{case.side:6s} {case.name}" for case in chosen))
        return
    if page:
        write_page(kept)
        return
    if not table:
        run(chosen, kept, processes, resume)
    show([row for name in split() if side in (None, name) for row in kept.rows(name)], chosen)


def run(chosen: list[Case], kept: Results, processes: int, resume: bool) -> None:
    """Run the cases that are to be run, a line a case, after the controls that they need and that have no row."""
    if not resume:
        kept.forget(chosen)
    have = {(r["kind"], r["program"], r["seed"]) for side in split() for r in kept.rows(side)}
    controls = dict.fromkeys(Case("plain", case.program, case.seed) for case in chosen if case.fault)
    wanted = dict.fromkeys([*controls, *chosen])
    todo = [case for case in wanted if (case.kind, case.program, case.seed) not in have]
    began, count = time.monotonic(), 0
    made = dict(versions())

    def done(case: Case, row: Row) -> None:
        nonlocal count
        count += 1
        kept.add(case.side, row | {"versions": made})
        said = row.get("error") or ", ".join(f"{f['check']}:{f['cause'] or f['level']}" for f in told(row)) or "–"
        left = (time.monotonic() - began) / count * (len(todo) - count)
        seconds = row.get("seconds", 0.0)
        click.echo(f"{count:4d}/{len(todo)} {case.name:52s} {seconds:6.1f} s  {said[:150]}   ({left:.0f} s left)")

    run_all(todo, processes, done)


def show(rows: list[Row], chosen: list[Case]) -> None:
    """Print the tables of the rows of these cases and of the programs that they belong to as they are."""
    names = {(c.kind, c.program, c.seed) for c in chosen}
    controls = {("plain", c.program, c.seed) for c in chosen}
    scores = score(r for r in rows if (r["kind"], r["program"], r["seed"]) in names | controls)
    click.echo()
    click.echo(tables.text_table(("", ""), tables.summary(scores)))
    for title, text in (
        ("Checks", tables.text_table(tables.CHECKS, tables.checks(scores))),
        ("Kinds of fault", tables.text_table(tables.KINDS, tables.kinds(scores))),
        ("Misses", "\n".join(tables.misses(scores))),
        ("False statements, and what was said of healthy runs", "\n".join(tables.untrue(scores))),
        ("Runs of faults that do not count", "\n".join(tables.not_counted(scores))),
        ("Runs that broke", "\n".join(tables.broken(scores))),
    ):
        click.echo(f"\n{title}\n{text or 'none'}")


def write_page(kept: Results) -> None:
    """Write the documentation's page from the rows."""
    sides = {side: kept.rows(side) for side in split()}
    missing = [side for side, rows in sides.items() if not rows]
    if missing:
        raise click.UsageError(f"There are no rows of the {' and '.join(missing)} side yet; run scripts/calibrate.")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(
        tables.page({side: score(rows) for side, rows in sides.items()}, sides["score"][-1]["versions"])
    )
    RESULTS.mkdir(exist_ok=True)
    kept.pack(RESULTS)
    RATES.write_text(json.dumps(tables.rates(score(sides["score"])), indent=1) + "\n")
    click.echo(f"Wrote {PAGE}, {RATES} and the rows in {RESULTS}.")


if __name__ == "__main__":
    sys.exit(main())
