"""Runs cases, each in a process of its own with a deadline, and keeps a row of each as soon as it is there.

The processes are copies of one that has imported torch and read the data, so that a run costs what it trains. Rows
go to `results/choose.jsonl` or `results/score.jsonl`; a killed calibration goes on with `--resume`.
"""

from __future__ import annotations

import gzip
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from calibration import data, programs_transfer
from calibration.observe import observe
from calibration.programs import programs
from calibration.split import split
from calibration.suite import Case
from diag.registry import instruments

DEADLINE = 180.0
FORK = multiprocessing.get_context("fork")
Row = dict[str, Any]


class Results:
    """The rows of a folder: one file a side, a line a row; what is published is packed beside it (`pack`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def rows(self, side: str) -> list[Row]:
        """The rows of a side, the last of each case; a torn line is left out."""
        path, packed = self.folder / f"{side}.jsonl", self.folder / f"{side}.jsonl.gz"
        found: dict[tuple[Any, ...], Row] = {}
        text = gzip.decompress(packed.read_bytes()).decode() if packed.exists() else ""
        for line in (text + (path.read_text() if path.exists() else "")).splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            found[row["kind"], row["program"], row["seed"]] = row
        return list(found.values())

    def add(self, side: str, row: Row) -> None:
        with (self.folder / f"{side}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def forget(self, cases: Iterable[Case]) -> None:
        """Drop the rows of these cases."""
        dropped: dict[str, set[tuple[Any, ...]]] = {}
        for case in cases:
            dropped.setdefault(case.side, set()).add((case.kind, case.program, case.seed))
        for side, names in dropped.items():
            kept = [r for r in self.rows(side) if (r["kind"], r["program"], r["seed"]) not in names]
            (self.folder / f"{side}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
            (self.folder / f"{side}.jsonl.gz").unlink(missing_ok=True)

    def pack(self, folder: Path) -> None:
        """Write all rows into the folder as they are published, each the same whenever it is written."""
        for side in split():
            text = "".join(json.dumps(r) + "\n" for r in self.rows(side))
            (folder / f"{side}.jsonl.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def warm() -> None:
    """Do once what every run would do again."""
    torch.set_num_threads(1)
    data.warm()
    programs_transfer.warm()
    instruments()


def run_all(
    cases: Iterable[Case], processes: int, done: Callable[[Case, Row], None], deadline: float = DEADLINE
) -> None:
    """Run the cases, `processes` at a time; `done(case, row)` is called for each in the order of their ends."""
    warm()
    waiting, running = list(cases)[::-1], dict[Any, tuple[Case, Any, float]]()
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                case = waiting.pop()
                pipe, process = _start(case)
                running[pipe] = (case, process, time.monotonic() + deadline)
            ready = multiprocessing.connection.wait(list(running), timeout=1.0)
            for pipe in [p for p in running if p in ready or time.monotonic() > running[p][2]]:
                case, process, _ = running.pop(pipe)
                done(case, _end(case, pipe, process, pipe in ready))
    finally:
        for _, process, _ in running.values():
            process.kill()


def _start(case: Case) -> tuple[Any, Any]:
    ours, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_work, args=(case, theirs))
    process.start()
    theirs.close()
    return ours, process


def _end(case: Case, pipe: Any, process: Any, ready: bool) -> Row:
    row: Row = {"kind": case.kind, "program": case.program, "seed": case.seed, "fault": case.fault}
    try:
        row = pipe.recv() if ready else row | {"error": "It ran past its deadline."}
    except EOFError:
        row["error"] = "Its process ended without a row."
    process.join(timeout=5 if ready else 0)
    if process.is_alive():
        process.kill()
    pipe.close()
    return row


def _work(case: Case, pipe: Any) -> None:
    os.setpgrp()
    torch.set_num_threads(1)
    logging.getLogger("diag").propagate = False  # what is said is in the record too
    logging.getLogger("diag").addHandler(logging.NullHandler())
    if programs()[case.program].world == 1:
        pipe.send(observe(case))
        return
    with tempfile.TemporaryDirectory() as folder:
        other = FORK.Process(target=_rank, args=(case, 1, folder, None))
        other.start()
        _rank(case, 0, folder, pipe)
        other.join(timeout=10)
        if other.is_alive():
            other.kill()


def _rank(case: Case, rank: int, folder: str, pipe: Any) -> None:
    from datetime import timedelta

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    row = observe(case)
    if pipe is not None:
        pipe.send(row)
    torch.distributed.destroy_process_group()


def versions() -> Mapping[str, str]:
    """What the rows were made with."""
    import platform
    import subprocess

    import diag

    here = Path(diag.__file__).parent
    shown = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    return {
        "diag": shown.stdout.strip() or "installed",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
