"""The command `diag import`: a log of another tool becomes a run, on which every command works."""

from __future__ import annotations

from pathlib import Path

import click

from diag.cli.output import JSON, PATHS, print_document
from diag.cli.text import echo


@click.command("import", short_help="A log of another tool becomes a run.")
@click.argument("log", type=PATHS)
@click.option("-o", "--output", type=PATHS, help="The run's folder. [default: diag-run beside the log]")
@JSON
def import_command(log: Path, output: Path | None, as_json: bool) -> None:
    """Make a run of trainer_state.json, Lightning's metrics.csv, TensorBoard events, W&B exports, CSV or JSONL.

    The checks of the loss's course judge it; show, report, check and compare work on it.
    """
    from diag.cli import tables
    from diag.integrations.logs import import_log
    from diag.reporting.machines.findings import findings_document

    folder = output or (log if log.is_dir() else log.parent) / "diag-run"
    run = import_log(log, folder)
    if as_json:
        print_document(findings_document(run))
        return
    tables.show(tables.verdicts(run.findings()))
    echo(f"\nRun: {folder.resolve()}")


COMMANDS = (import_command,)
