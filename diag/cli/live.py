"""The commands `diag live`, the page of a run as it grows, and `diag mcp`, the runs for an assistant."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import click

from diag.cli.output import PATHS
from diag.cli.text import echo


@click.command("live", short_help="The page of a run, renewed while training goes on.")
@click.argument("run", type=PATHS)
@click.option("--host", default="127.0.0.1", show_default=True, help="Another one needs --public.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="[default: a free one]")
@click.option("--public", is_flag=True, help="Serve to other machines, too: anybody who reaches it can read it.")
@click.option("--open", "open_it", is_flag=True, help="Show the page in the browser.")
def live_command(run: Path, host: str, port: int, public: bool, open_it: bool) -> None:
    """Serve the page of a run on this machine, renewed as the run grows. Read-only; stop it with Ctrl-C."""
    from diag.reporting.serving import live_server

    with live_server(run, host, port, public=public) as server:
        name = f"[{host}]" if ":" in host else host
        address = f"http://{name}:{server.server_address[1]}/"
        echo(f"{run} at {address}")
        if open_it:
            click.launch(address)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            echo("")


@click.command("mcp", short_help="A read-only MCP server over a folder of runs.")
@click.argument("folder", type=PATHS, default=Path("runs"))
def mcp_command(folder: Path) -> None:
    """Serve the runs under FOLDER to an assistant, on standard input and output: list, findings, evidence, compare.

    Needs pip install diag[mcp].
    """
    from diag.integrations.mcp import mcp_server

    mcp_server(folder).run("stdio")


def follow(
    run: Path, show: Callable[[str], None] = echo, seconds: float = 2.0, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Print a run's progress until no process writes to it: a line where steps were added, and each finding
    once."""
    from diag.display import format_number
    from diag.run.folder import is_being_written
    from diag.run.reading import read_run

    printed: set[tuple[str, str]] = set()
    last = -1
    while True:
        written = is_being_written(run)  # asked first: what it wrote until then is read below
        opened = read_run(run)
        if opened.last_step != last:
            last = opened.last_step
            loss = opened.last_values().get("loss")
            show(f"step {last:,}" + ("" if loss is None else f" · loss {format_number(loss)}"))
        for finding in opened.findings():
            key = (finding.instrument, str(finding.verdict.level))
            if finding.verdict.level.is_finding and key not in printed:
                printed.add(key)
                advice = f" Try: {finding.verdict.advice}" if finding.verdict.advice else ""
                show(f"{finding.verdict.level}: {finding.title}. {finding.verdict.sentence}{advice}")
        if not written:
            show(f"The run has ended at step {last:,}.")
            return
        sleep(seconds)


COMMANDS = (live_command, mcp_command)
