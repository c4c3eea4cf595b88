"""The command `diag preflight`: what of a training will not work, before it begins."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from diag.cli.output import JSON, print_document
from diag.cli.text import echo
from diag.result import Level


@click.command("preflight", short_help="Before training: what will not work.")
@click.option("--build", required=True, metavar="MODULE:FUNCTION", help="Returns (model, loss_fn, data).")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the page, too.")
@click.option("--steps", type=click.IntRange(1), default=200, show_default=True, help="On one batch, at most.")
@click.option("--seconds", type=click.FloatRange(1), default=60.0, show_default=True, help="For all of it, about.")
@JSON
def preflight_command(build: str, output: Path | None, steps: int, seconds: float, as_json: bool) -> None:
    """Try out a training before it begins: a copy of the model learns one batch, and what fails is reported.

    The function that --build names returns (model, loss_fn, data), or a dict of diag.Snapshot's arguments, in which
    `optimizer` is the one that will train. Status 1 where something is an alarm.
    """
    from diag.build import built_arguments
    from diag.cli import tables
    from diag.reporting import report as write_report
    from diag.reporting.machines.findings import findings_document
    from diag.trial.preflight import preflight

    built = built_arguments(build)
    known = {name: built[name] for name in ("loss_fn", "data", "optimizer", "unpack") if name in built}
    with tables.progress_bar() as bar:
        task = bar.add_task("Reading", total=None)

        def progress(text: str) -> None:
            bar.update(task, description=text)

        run = preflight(built["model"], **known, steps=steps, seconds=seconds, progress=progress)
    page = None if output is None else str(Path(write_report(run, output)).resolve())
    if as_json:
        print_document(findings_document(run) | ({} if page is None else {"report": page}))
    else:
        tables.show(tables.verdicts(run.findings()))
        if run.outcomes:
            tables.show("", tables.others(run.outcomes))
        if page is not None:
            echo(f"\nReport: {page}")
    sys.exit(1 if any(f.verdict.level is Level.ALARM for f in run.findings()) else 0)


COMMANDS = (preflight_command,)
