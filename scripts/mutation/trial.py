"""Run tests on a copy of the tree, with or without one change, each time in a process of its own.

A process is forked from this one, in which torch and pytest are already loaded but nothing of diag, so that a trial
starts at once; it is killed, with all it started, when it takes too long.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

KILLED, SURVIVED, TIMED_OUT, NO_TEST = "killed", "survived", "timed out", "no test"
COPIED = ("diag", "tests", "scripts", "docs", "reports", "notebooks", "README.md", "pyproject.toml")
MOST_MEMORY = 12 << 30  # bytes; a change to a loop or a shape may ask for any


@dataclass(frozen=True)
class Outcome:
    """What became of one trial: its name, the seconds it took, and the first test that failed."""

    result: str
    seconds: float
    test: str = ""


class Tree:
    """A copy of the working tree in a temporary folder."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root, folder
        for name in COPIED:
            if name == "reports":
                os.symlink(root / name, folder / name)
            elif (root / name).is_dir():
                shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif (root / name).exists():
                shutil.copy2(root / name, folder / name)
        compiled = [sys.executable, "-m", "compileall", "-q", str(folder / "diag")]
        subprocess.run(compiled, check=True)
        _load()

    @contextlib.contextmanager
    def changed(self, path: str, text: bytes) -> Iterator[None]:
        """The copy with another text in one file; what was compiled from it is thrown away, before and after."""
        target = self.folder / path
        before = target.read_bytes()
        try:
            self._write(target, text)
            yield
        finally:
            self._write(target, before)

    def _write(self, target: Path, text: bytes) -> None:
        target.write_bytes(text)
        for compiled in (target.parent / "__pycache__").glob(f"{target.stem}.*.pyc"):
            compiled.unlink()

    def run(self, tests: Sequence[str], limit: float, silence: float = math.inf) -> Outcome:
        """The outcome of these tests (files or node ids), up to the first that fails; after `limit` seconds, or
        after so many of `silence` in which no test has ended, they count as timed out."""
        began = time.monotonic()
        output = self.folder / "output.txt"
        output.unlink(missing_ok=True)
        child = os.fork()
        if not child:
            self._become_pytest(tests, output)
        status = _waited(child, began + limit, output, silence)
        seconds = time.monotonic() - began
        if status is None:
            return Outcome(TIMED_OUT, seconds)
        code = os.waitstatus_to_exitcode(status)
        name = {0: SURVIVED, 5: NO_TEST}.get(code, KILLED)
        return Outcome(name, seconds, _first_failure(output.read_text(errors="replace")) if name == KILLED else "")

    def _become_pytest(self, tests: Sequence[str], output: Path) -> None:
        code = 70
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
            with output.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.chdir(self.folder)
            os.environ["PYTHONPATH"] = str(self.folder)
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
            sys.dont_write_bytecode = True
            sys.path.insert(0, str(self.folder))
            code = _pytest_here(self.folder, tests)
        finally:
            os._exit(code)


def _pytest_here(folder: Path, tests: Sequence[str]) -> int:
    import importlib.util

    import pytest

    found = importlib.util.find_spec("diag")
    assert found is not None and str(found.origin).startswith(str(folder)), found
    quiet = ["-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return int(pytest.main([*quiet, "--rootdir", str(folder), *tests]))


def _load() -> None:
    import hypothesis  # noqa: F401
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import scipy.sparse  # noqa: F401
    import torch

    torch.set_num_threads(1)
    assert "diag" not in sys.modules


def _waited(child: int, until: float, output: Path, silence: float) -> int | None:
    """The status of the child, or None where it had to be killed; whatever it started goes with it."""
    wait, size, heard = 0.01, 0, time.monotonic()
    status = None
    while status is None and time.monotonic() < min(until, heard + silence):
        done, code = os.waitpid(child, os.WNOHANG)
        status = code if done else None
        if not done:
            time.sleep(wait)
            wait = min(1.2 * wait, 0.2)
        if output.exists() and output.stat().st_size != size:
            size, heard = output.stat().st_size, time.monotonic()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
    return status


def _first_failure(output: str) -> str:
    lines = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return lines[0].split(" - ")[0].split(" ", 1)[1] if lines else "the process ended"


@contextlib.contextmanager
def copied(root: Path) -> Iterator[Tree]:
    """A copy of the tree at `root`, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="diag-mutants-", ignore_cleanup_errors=True) as folder:
        yield Tree(root, Path(folder).resolve())
