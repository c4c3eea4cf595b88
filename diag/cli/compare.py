"""The command `diag compare`: two runs or checkpoints beside each other, or a whole sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from diag.cli.output import JSON, PATHS, print_document
from diag.cli.text import command_line, echo

TWO = 2


@click.command("compare", short_help="Runs or checkpoints side by side; a sweep in one table.")
@click.argument("sources", nargs=-1, required=True, type=PATHS, metavar="A B [...]")
@click.option("-o", "--output", type=PATHS, help="Write the comparison as a page, too.")
@click.option("--healthy", multiple=True, type=PATHS, metavar="RUN", help="A run that went well: gives the range.")
@click.option("--build", metavar="MODULE:FUNCTION", help="For checkpoints: returns (model, loss_fn, data).")
@click.option("--all", "everything", is_flag=True, help="Also the checks and numbers that are equal.")
@JSON
def compare_command(
    sources: Sequence[Path],
    output: Path | None,
    healthy: Sequence[Path],
    build: str | None,
    everything: bool,
    as_json: bool,
) -> None:
    """Runs side by side: their verdicts and the last value of every number, all against the first.

    Checkpoints are measured with --build, and compared by what the files hold without it. With --healthy,
    numbers outside the range of the healthy runs are marked. Three runs or more are shown as a table with one
    row a run.
    """
    from diag.cli import tables
    from diag.reporting.comparison.compare import compare as write_comparison
    from diag.reporting.machines.comparing import compared_document
    from diag.run.opening import opened, opened_against_first

    if len(sources) < TWO:
        raise click.UsageError(f"There is one run, {sources[0]}; give at least two.")
    runs = opened_against_first(sources, build)
    accepted = [opened(path, build, sources[0]) for path in healthy]
    names = _short_names(sources)
    page = None
    if output is not None or as_json or len(runs) > TWO:
        page = write_comparison(*runs, output=output, names=names, healthy=accepted, command=command_line())
    if as_json and page is not None:
        print_document(compared_document(page.document, None if page.path is None else str(page.path.resolve())))
        return
    if len(runs) == TWO:
        tables.show(tables.side_by_side(dict(zip(names, runs, strict=True)), everything))
    elif page is not None:
        tables.show(tables.sweep(page.document))
    if page is not None and page.path is not None:
        echo(f"\nComparison: {page.path.resolve()}")


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Short names for runs: the folders' own where they all differ, else the whole paths, with a letter."""
    from diag.reporting.comparison.sweep import key_of

    short = [path.resolve().name for path in paths]
    if len(set(short)) == len(short):
        return short
    return [f"{key_of(i)}: {path}" for i, path in enumerate(paths)]


COMMANDS = (compare_command,)
