"""A read-only MCP server over a folder of runs, on standard input and output: `diag mcp runs`.

Four tools: the runs, the findings of one, the numbers of one check over the steps, and a comparison. Nothing is
written, and no path outside the folder is read.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from diag.errors import DiagError, InvalidInput
from diag.reporting.comparison.compare import comparison
from diag.reporting.machines.comparing import compared_document
from diag.reporting.machines.findings import findings_document, json_number, run_level
from diag.run.reading import read_run
from diag.run.run import Run

MOST_RUNS = 200
MOST_STEPS = 200
ABOUT = """Verdicts of diag on trainings of neural networks, recorded in folders. Begin with list_runs; findings has
what is wrong with one run and what to try; evidence has the numbers behind one check by step. A level `unknown` or
`description` is not a pass."""


class Runs:
    """The runs under `folder`, by their path within it."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).resolve()
        if not self.folder.is_dir():
            raise InvalidInput(f"There is no folder {folder}; give the one that holds the runs.")

    def opened(self, name: str) -> Run:
        """The run called `name`; InvalidInput where it lies outside the folder, RunError where there is none."""
        path = (self.folder / name).resolve()
        if not path.is_relative_to(self.folder):
            raise InvalidInput(f"{name!r} lies outside {self.folder}; give a name of list_runs.")
        return read_run(path)

    def list_runs(self) -> list[dict[str, Any]]:
        """The runs, the newest last: name, when it began, model, last step, worst level."""
        found: list[dict[str, Any]] = []
        for file in sorted(self.folder.rglob("run.json"))[:MOST_RUNS]:
            name = str(file.parent.relative_to(self.folder)) or "."
            try:
                run = self.opened(name)
            except DiagError as error:
                found.append({"name": name, "problem": str(error)})
                continue
            about = {key: run.metadata.get(key) for key in ("created", "model")}
            found.append(
                {"name": name, **about, "last_step": run.last_step, "level": str(run_level(run.findings()))}
            )
        return sorted(found, key=lambda row: str(row.get("created") or ""))

    def findings(self, run: str) -> dict[str, Any]:
        """What a run says of itself: every verdict with its evidence, and what follows from what."""
        return findings_document(self.opened(run))

    def evidence(self, run: str, instrument: str) -> dict[str, Any]:
        """The numbers of one check by step, the last few hundred of them."""
        series = self.opened(run).series(instrument)[-MOST_STEPS:]
        if not series:
            raise InvalidInput(f"{instrument!r} measured nothing in {run}; see its findings for what did.")
        scalars = [result.scalars() for _, result in series]
        names = dict.fromkeys(name for row in scalars for name in row)
        values = {n: [json_number(row[n]) if n in row else None for row in scalars] for n in names}
        return {"instrument": instrument, "steps": [step for step, _ in series], "values": values}

    def compare(self, runs: list[str]) -> dict[str, Any]:
        """Two runs or more against the first: which verdicts changed, and every number with its difference."""
        return compared_document(comparison(*(self.opened(run) for run in runs), names=list(runs)))


def mcp_server(folder: str | Path) -> Any:
    """The server; `server.run("stdio")` serves it. Raises InvalidInput where the package mcp is missing."""
    try:
        from mcp.server.mcpserver import MCPServer
        from mcp.types import ToolAnnotations
    except ImportError:
        raise InvalidInput("diag mcp needs the package mcp, 2.0 or later: pip install diag[mcp].") from None
    runs, server = Runs(folder), MCPServer("diag", instructions=ABOUT)
    annotations = ToolAnnotations(read_only_hint=True, destructive_hint=False, idempotent_hint=True)
    for tool in (runs.list_runs, runs.findings, runs.evidence, runs.compare):
        server.tool(annotations=annotations)(_spoken(tool))
    return server


def _spoken(tool: Any) -> Any:
    """The tool, which answers an error of diag with {"error": one sentence}."""

    @functools.wraps(tool)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return tool(*args, **kwargs)
        except DiagError as error:
            return {"error": str(error)}

    return call
