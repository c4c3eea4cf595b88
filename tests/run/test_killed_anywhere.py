"""Killed at any file operation, a run's folder opens, goes on and can be used again, and no row is lost."""

import os
import random
import shutil
from dataclasses import dataclass

import numpy
import pytest

from diag.errors import RunError
from diag.result import Provenance, Result, Verdict, measured
from diag.run.reading import read_run
from diag.run.writer import RunWriter
from tests.run.killing import killed_at, operations

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
LAYERS = {"a.weight": 6, "a.bias": 2}
STRIDE = 5  # in the quick version


@dataclass(frozen=True, kw_only=True)
class Profile(Result):
    values: object = measured("values", shape="(n,)")

    def verdict(self) -> Verdict:
        return Verdict("ok", "fine")


def open_run(folder, **more):
    return RunWriter(folder, {"layers": LAYERS, "model": "Net"}, **more)


def write(w, first, last, told=lambda byte: None):
    """Rows, results with an array of their own, and events; each is told once the call has returned."""
    for step in range(first, last + 1):
        table = numpy.zeros(1, w.dtype)
        table["steps"] = table["total_steps"] = step
        w.append_table(table)
        told(b"s")
        values = numpy.arange(100.0) + step
        w.append_outcome(step, Profile(values=values, provenance=Provenance("profile")))
        told(b"o")
        w.append_event(step, "kind", f"event {step}")
        told(b"e")


def new_run(folder, told):
    with open_run(folder) as w:
        told(b"b")
        write(w, 1, 3, told)


def resumed_run(folder, told):
    with open_run(folder, resume=True) as w:
        told(b"b")
        write(w, 8, 9, told)


def nothing(folder):
    folder.mkdir()


def two_runs(folder):
    """A run of five steps that was closed, and the one of four steps before it."""
    for last in (4, 5):
        with open_run(folder) as w:
            write(w, 1, last)
    (folder / "mine.txt").write_text("mine")


def torn_run(folder):
    """A run of seven steps whose writer was killed while it wrote."""
    with open_run(folder) as w:
        write(w, 1, 7)
        shutil.copytree(folder, folder.parent / "copy")
    shutil.rmtree(folder)
    (folder.parent / "copy").rename(folder)
    for name in ("steps.bin", "records.jsonl"):
        with open(folder / name, "ab") as file:
            file.write(b'{"torn')


def found(folder):
    """How many steps, results and events there are; None without a run. Fails where something is damaged."""
    try:
        run = read_run(folder)
    except RunError as error:
        assert "holds no run" in str(error) or "being set aside" in str(error), error
        return None
    assert not run.outcomes and not [e for e in run.events if e.kind == "damaged"]
    for step, raw in run.series("profile"):
        numpy.testing.assert_array_equal(raw["values"], numpy.arange(100.0) + step)
    steps = [] if run.history is None else run.history.steps.tolist()
    assert steps == sorted(set(steps))
    return len(steps), len(run.series("profile")), len([e for e in run.events if e.kind == "kind"])


def check(folder, base, told):
    """After the kill: what was told is there, the run before as well, and the folder goes on in both ways."""
    done = tuple(told.count(kind) for kind in (b"s", b"o", b"e"))
    before = {"two_runs": 5, "torn_run": 7, "nothing": 0}[base]
    here = found(folder)
    if told:  # the writer had been opened
        goes_on = before if base == "torn_run" else 0
        assert here is not None and all(
            goes_on + d <= h <= goes_on + d + 1 for d, h in zip(done, here, strict=True)
        )
        if base == "two_runs":
            assert found(folder / "previous-run") == (5, 5, 5)
    elif base == "two_runs":
        assert here in (None, (0, 0, 0), (5, 5, 5))
        # The run of four steps is there until that of five has taken its place.
        kept = found(folder / "previous-run")
        assert kept in ((4, 4, 4), (5, 5, 5)) or (
            kept is None and found(folder / "previous-run.moving") == (5, 5, 5)
        )
    elif base == "torn_run":
        assert here == (7, 7, 7)
    for resume in (True, False):
        again = folder.with_name(f"again-{resume}")
        shutil.copytree(folder, again)
        with open_run(again, resume=resume) as w:
            write(w, w.last_step + 1, w.last_step + 2)
        if resume and here is not None:
            assert found(again) == tuple(h + 2 for h in here)
        else:
            assert found(again) == (2, 2, 2)
            # A run without a step or a result takes nobody's place.
            begun = here if here is not None and any(here[:2]) else None
            assert found(again / "previous-run") == (begun or ((5, 5, 5) if base == "two_runs" else None))
        assert not list(again.glob("previous-run.*"))
        assert base != "two_runs" or (again / "mine.txt").read_text() == "mine"
        shutil.rmtree(again)


SCENARIOS = {
    "a first run": (nothing, new_run),
    "a new run after two": (two_runs, new_run),
    "a run that goes on": (torn_run, resumed_run),
}


def kill_at(points, name, tmp_path):
    base, scenario = SCENARIOS[name]
    base(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "whole")
    total = operations(scenario, tmp_path / "whole")
    for at in points(total):
        shutil.copytree(tmp_path / "base", tmp_path / "run")
        told, seen = killed_at(at, scenario, tmp_path / "run")
        assert seen is None, "it was not killed"
        check(tmp_path / "run", base.__name__, told)
        shutil.rmtree(tmp_path / "run")
    return total


@pytest.fixture(autouse=True)
def _raw_results(monkeypatch):
    monkeypatch.setattr("diag.run.run.instruments", dict)


@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_at_some_operations(name, tmp_path):
    kill_at(lambda total: range(hash_of(name) % STRIDE, total, STRIDE), name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_at_every_operation(name, tmp_path):
    assert kill_at(range, name, tmp_path) > 30


@pytest.mark.slow
def test_killed_again_while_the_next_start_makes_the_first_kill_good(tmp_path):
    """Wherever two starts are killed, the third has the folder, and the run of five steps lies beside it."""
    two_runs(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "whole")
    total, moment = operations(opened, tmp_path / "whole"), random.Random(0)
    for first in range(total):
        shutil.copytree(tmp_path / "base", tmp_path / "run")
        killed_at(first, opened, tmp_path / "run")
        killed_at(moment.randrange(total), opened, tmp_path / "run")
        with open_run(tmp_path / "run") as w:
            write(w, 1, 2)
        assert found(tmp_path / "run") == (2, 2, 2) and not list((tmp_path / "run").glob("previous-run.*"))
        assert found(tmp_path / "run" / "previous-run") == (5, 5, 5)
        shutil.rmtree(tmp_path / "run")


def opened(folder, told):
    w = open_run(folder)
    told(b"b")
    w.release()


def hash_of(name):
    return sum(name.encode())  # the same in every process
