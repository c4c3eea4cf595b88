"""Counts how often the truth is within two stated errors, and tells it as a table."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import click
import torch

from covering import examples, networks, operators
from covering.case import Case

CLAIMED, LEAST = 0.95, 0.93
CASES = [*operators.CASES, *examples.CASES, *networks.CASES]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "coverage.md"
Row = tuple[str, str, str, int, int, float]


def rows_of(case: Case, draws: int) -> list[Row]:
    """(instrument, setting, of what, draws, without an error, share covered) for each thing estimated."""
    counted: dict[str, list[bool | None]] = {}
    for draw in case.draws(draws):
        counted.setdefault(draw.of, []).append(draw.covered if draw.known else None)
    found = []
    for of, seen in counted.items():
        known = [s for s in seen if s is not None]
        share = sum(known) / len(known) if known else math.nan
        found.append((case.instrument, case.setting, of, len(known), len(seen) - len(known), share))
    return found


def too_low(row: Row) -> bool:
    """Whether a share is below what is claimed by more than chance allows."""
    draws, share = row[3], row[5]
    return draws > 0 and share < LEAST - 2 * math.sqrt(LEAST * (1 - LEAST) / draws)


def table(rows: Iterable[Row]) -> list[str]:
    """The rows as a table in Markdown."""
    lines = ["| instrument | setting | error of | draws | truth within two errors |", "|---|---|---|---|---|"]
    for row in rows:
        instrument, setting, of, draws, unknown, share = row
        mark = " (too low)" if too_low(row) else ""
        none = f" ({unknown} without an error)" if unknown else ""
        lines.append(f"| `{instrument}` | {setting} | {of} | {draws:,}{none} | {100 * share:.1f} %{mark} |")
    return lines


def page(rows: list[Row], draws: int) -> str:
    """docs/coverage.md."""
    return "\n".join(
        [
            "# Do the stated errors cover?",
            "",
            "An error e is stated so that value - 2 e to value + 2 e holds the truth in about 95 of 100 "
            "cases. Each",
            f"was drawn {draws} times where the truth is known (`scripts/coverage --page` writes this page; torch",
            f"{torch.__version__}). Where the same draw gives several values they are counted together.",
            "",
            *table(rows),
            "",
        ]
    )


@click.command()
@click.option("--only", help="Cases whose instrument or setting holds this text.")
@click.option("--draws", default=400, show_default=True, type=click.IntRange(10))
@click.option("--page", "write", is_flag=True, help="Write docs/coverage.md.")
def main(only: str | None, draws: int, write: bool) -> None:
    """Does every stated error cover what it claims? See scripts/coverage."""
    chosen = [c for c in CASES if only is None or only in f"{c.instrument} {c.setting}"]
    rows: list[Row] = []
    for case in chosen:
        began = time.perf_counter()
        rows += rows_of(case, draws)
        click.echo(f"{case.instrument}, {case.setting}: {time.perf_counter() - began:.0f} s", err=True)
    click.echo("\n".join(table(rows)))
    if write:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(rows, draws))
    sys.exit(1 if any(map(too_low, rows)) else 0)
