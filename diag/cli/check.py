"""The command `diag check`: exit status 1 where something is wrong, and what CI systems read about it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from diag.cli.output import JSON, PATHS, print_document
from diag.cli.text import echo

FAILING_LEVELS = ("alarm", "warning")
FILES = click.Path(dir_okay=False, path_type=Path)
IN_GITHUB = "GITHUB_ACTIONS"


@click.command("check", short_help="Exit with status 1 where something is wrong, for CI.")
@click.argument("run", type=PATHS)
@click.option("--fail-on", type=click.Choice(FAILING_LEVELS), help="The mildest failure. [default: alarm]")
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    type=PATHS,
    metavar="RUN",
    help="Fail only on what is worse than there.",
)
@click.option("--last", type=click.IntRange(1), metavar="N", help="The last N healthy runs beside it as baseline.")
@click.option("--config", type=FILES, help="Levels, limits, settings. [default: [tool.diag] of pyproject.toml]")
@click.option("--junit", type=FILES, help="Write JUnit XML.")
@click.option("--sarif", type=FILES, help="Write SARIF 2.1.0.")
@click.option("--github/--no-github", default=None, help="GitHub annotations. [default: inside GitHub Actions]")
@JSON
def check_command(
    run: Path,
    fail_on: str | None,
    baselines: Sequence[Path],
    last: int | None,
    config: Path | None,
    junit: Path | None,
    sarif: Path | None,
    github: bool | None,
    as_json: bool,
) -> None:
    """Exit with status 1 where a verdict on the run is an alarm (or a warning), for CI.

    Status 0: none is, and every limit is kept. Status 1: something fails. Status 2: there is no run, nothing was
    measured in it, or the call or the configuration is wrong.
    """
    from diag.reporting.machines import annotations
    from diag.reporting.machines.checking import check, last_healthy
    from diag.reporting.machines.policy import read_policy
    from diag.run.reading import read_run

    policy = read_policy(config)
    if fail_on is not None:
        policy = dataclasses.replace(policy, fail_on=fail_on)
    opened = read_run(run)
    accepted = [read_run(path) for path in baselines] + (last_healthy(opened, last) if last else [])
    made = check(opened, policy, accepted)
    for path, text in ((junit, annotations.junit), (sarif, annotations.sarif)):
        if path is not None:
            _write(path, text(made))
    if as_json:
        print_document(made)
    else:
        _show(made, opened.findings())
    if github or (github is None and os.environ.get(IN_GITHUB) == "true"):
        click.echo(annotations.github(made), nl=False, err=as_json)
    raise SystemExit(made["exit_code"])


def _show(made: Mapping[str, Any], findings: Sequence[Any]) -> None:
    from diag.cli import tables

    failing = {row["instrument"] for row in made["checks"] if row["outcome"] == "failed"}
    if failing:
        tables.show(tables.verdicts([f for f in findings if f.instrument in failing]))
    for row in made["limits"]:
        if row["outcome"] != "passed":
            echo(f"{'Broken limit' if row['outcome'] == 'failed' else 'Tolerated'}: {row['sentence']}")
    for outcome, words in (("known", "As in the baseline"), ("ignored", "Ignored")):
        names = [row["instrument"] for row in made["checks"] if row["outcome"] == outcome]
        if names:
            echo(f"{words}: {', '.join(names)}")
    echo(f"{'passed' if made['passed'] else 'FAILED'}: {tables.counts(findings)}")
    for text in made["problems"]:
        echo(text, err=True)
    if made["broken"]:
        echo(f"Broke while measuring, so not judged: {', '.join(made['broken'])}", err=True)


def _write(path: Path, text: str) -> None:
    from diag.errors import InvalidInput

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"{path} cannot be written ({error.strerror}); give another name.") from None


@click.command("schema", short_help="The JSON schema of what --json prints.")
def schema_command() -> None:
    """Print the JSON schema of every document that --json prints."""
    from diag.reporting.machines.schema import schema

    print_document(schema())


COMMANDS = (check_command, schema_command)
