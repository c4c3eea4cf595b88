"""Writing a run: one writer, resuming, replacing, a full disk, and being killed at any moment."""

import dataclasses
import errno
import gc
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy
import pytest

from diag.errors import InvalidInput, RunError
from diag.result import Provenance, Result, Verdict, measured
from diag.run.files import read_metadata
from diag.run.reading import read_run
from diag.run.writer import RunWriter
from diag.snapshot.history import empty_history

LAYERS = {"a.weight": 6, "a.bias": 2}


@dataclass(frozen=True, kw_only=True)
class Profile(Result):
    values: object = measured("values", shape="(n,)")

    def verdict(self) -> Verdict:
        return Verdict("ok", "fine")


def profile(values):
    return Profile(values=values, provenance=Provenance("profile"))


def steps(first, last, layers=LAYERS):
    rows = empty_history(layers, last - first + 1)
    return dataclasses.replace(rows, steps=numpy.arange(first, last + 1), total_steps=last)


def open_run(folder, **more):
    return RunWriter(folder, {"layers": LAYERS, "model": "Net"}, **more)


def in_another_process(code, folder):
    """A process that opens a writer on `folder`, says so, and then runs `code`."""
    lines = f"""import sys; from diag.run.writer import RunWriter
w = RunWriter(sys.argv[1], {{'layers': {{'a.weight': 6, 'a.bias': 2}}}}); print('taken', flush=True); {code}"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", lines, str(folder)], **pipes)


# One writer a folder


def test_a_second_writer_of_another_process_is_refused_until_the_first_is_killed(tmp_path):
    first = in_another_process("sys.stdin.read()", tmp_path)
    try:
        assert first.stdout.readline() == "taken\n"
        for resume in (False, True):
            with pytest.raises(
                RunError, match=f"is being written by process {first.pid}; stop it, or give another"
            ):
                open_run(tmp_path, resume=resume)
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    open_run(tmp_path).close()


def test_a_writer_of_the_same_process_is_taken_over(tmp_path):
    first = open_run(tmp_path)
    second = open_run(tmp_path)
    with pytest.raises(RunError, match="is closed; open it again with resume=True"):
        first.append_event(1, "kind", "text")
    second.append_event(1, "kind", "text")
    first.close()
    second.append_event(2, "kind", "text")
    assert len(read_run(tmp_path).events) == 2


def test_a_forgotten_writer_lets_the_folder_go(tmp_path):
    open_run(tmp_path)
    gc.collect()
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else None
    open_run(tmp_path).close()
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_forked_worker_does_not_keep_the_lock_nor_write(tmp_path):
    """A data loader worker outlives a killed parent for a while; its copy of the lock must not count."""
    with open_run(tmp_path) as w:
        receive, send = os.pipe()
        worker = os.fork()
        if not worker:
            try:
                w.append_event(1, "kind", "from the worker")
            except RunError:
                os.write(send, b"refused")
            os.close(receive)
            os.write(send, b".")
            time.sleep(60)
            os._exit(0)
        os.close(send)
        told = b""
        while not told.endswith(b"."):
            told += os.read(receive, 100)
    try:
        assert told == b"refused."
        # While the worker lives, another process can have the folder.
        other = in_another_process("w.close()", tmp_path)
        assert other.communicate()[0] == "taken\n"
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
        os.close(receive)


# Replacing


def test_a_new_run_keeps_the_one_before_aside_and_leaves_other_files_alone(tmp_path):
    for number in (1, 2, 3):
        with open_run(tmp_path) as w:
            w.append_steps(steps(1, number))
            w.append_outcome(1, profile(numpy.arange(100.0) + number))
        (tmp_path / "mine.pt").write_text("mine")
    assert len(read_run(tmp_path).history) == 3 and len(read_run(tmp_path / "previous-run").history) == 2
    assert len(list((tmp_path / "arrays").iterdir())) == 1 and (tmp_path / "mine.pt").read_text() == "mine"
    assert not (tmp_path / "previous-run" / "previous-run").exists()


def test_being_killed_while_setting_aside_is_made_good_at_the_next_start(tmp_path):
    with open_run(tmp_path) as w:
        w.append_steps(steps(1, 3))
    (tmp_path / "previous-run.moving").mkdir()
    (tmp_path / "run.json").rename(tmp_path / "previous-run.moving" / "run.json")
    open_run(tmp_path).close()
    assert len(read_run(tmp_path / "previous-run").history) == 3 and read_run(tmp_path).history is None


@pytest.mark.parametrize("name", ["run.json", "records.jsonl", "steps.bin", "arrays"])
def test_files_of_somebody_else_are_not_touched(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(
        RunError, match=f"{re.escape(name)} was not written by diag and is in the way; give another"
    ):
        open_run(tmp_path)
    assert (tmp_path / name).read_text() == "{}" and not (tmp_path / "previous-run").exists()


def test_a_start_that_came_to_nothing_takes_nobodys_place(tmp_path):
    with open_run(tmp_path) as w:
        w.append_steps(steps(1, 3))
    for _ in range(3):
        with open_run(tmp_path) as w:
            w.append_event(0, "probe", "nothing was seen yet")
    assert len(read_run(tmp_path / "previous-run").history) == 3
    with open_run(tmp_path) as w:
        w.append_outcome(1, profile(numpy.arange(3.0)))
    open_run(tmp_path).close()
    assert len(read_run(tmp_path / "previous-run").records) == 1


def test_a_run_that_may_have_had_steps_before_they_were_lost_is_kept_aside(tmp_path):
    open_run(tmp_path).close()
    (tmp_path / "steps.bin").unlink()
    open_run(tmp_path).close()
    assert read_metadata(tmp_path / "previous-run")[0]["model"] == "Net"


def test_a_previous_run_folder_of_somebody_else_is_not_removed(tmp_path):
    with open_run(tmp_path) as w:
        w.append_steps(steps(1, 3))
    (tmp_path / "previous-run").mkdir()
    (tmp_path / "previous-run" / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match="previous-run was not written by diag"):
        open_run(tmp_path)
    assert (tmp_path / "previous-run" / "thesis.tex").exists()


def test_a_run_of_a_newer_format_may_be_replaced_but_not_resumed(tmp_path):
    open_run(tmp_path).close()
    about = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(about | {"format_version": 99}))
    with pytest.raises(RunError, match="has run format 99"):
        open_run(tmp_path, resume=True)
    open_run(tmp_path).close()
    assert json.loads((tmp_path / "previous-run" / "run.json").read_text())["format_version"] == 99


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"The run folder .*file cannot be made"):
        open_run(tmp_path / "file")


# Resuming


def test_resume_goes_on_after_the_last_step_and_makes_good_torn_ends(tmp_path):
    with open_run(tmp_path) as w:
        w.append_steps(steps(1, 5))
        w.append_event(2, "kind", "before")
    for name in ("steps.bin", "records.jsonl"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes() + b'{"torn')
    with open_run(tmp_path, resume=True) as w:
        assert w.last_step == 5
        w.append_steps(steps(6, 8))
        w.append_event(7, "kind", "after")
    run = read_run(tmp_path)
    assert run.history.steps.tolist() == list(range(1, 9)) and run.torn == 2
    assert [e.text for e in run.events] == ["before", "resumed after step 5", "after"]
    assert [s["after"] for s in run.metadata["sessions"]] == [5]
    assert not (tmp_path / "previous-run").exists()


def test_resume_after_a_power_cut_cuts_the_rows_of_zeros_off(tmp_path):
    with open_run(tmp_path) as w:
        w.append_steps(steps(1, 3))
    file = tmp_path / "steps.bin"
    file.write_bytes(file.read_bytes() + bytes(file.stat().st_size))
    with open_run(tmp_path, resume=True) as w:
        assert w.last_step == 3
        w.append_steps(steps(4, 5))
    assert read_run(tmp_path).history.steps.tolist() == [1, 2, 3, 4, 5] and read_run(tmp_path).torn == 3


def test_a_run_without_a_step_goes_on_from_none(tmp_path):
    open_run(tmp_path).close()
    with open_run(tmp_path, resume=True) as w:
        assert w.last_step == 0


def test_the_files_of_a_run_are_for_all_to_read(tmp_path):
    before = os.umask(0o022)
    try:
        with open_run(tmp_path) as w:
            w.append_steps(steps(1, 3))
    finally:
        os.umask(before)
    assert all((tmp_path / name).stat().st_mode & 0o777 == 0o644 for name in ("steps.bin", "records.jsonl"))


def test_resume_without_a_run_starts_one(tmp_path):
    with open_run(tmp_path / "new", resume=True) as w:
        assert w.last_step == 0
    assert read_run(tmp_path / "new").events == ()


def test_resume_continues_after_records_that_lie_beyond_the_steps(tmp_path):
    with open_run(tmp_path) as w:
        w.append_steps(steps(1, 5))
        w.append_event(9, "kind", "text")
    with open_run(tmp_path, resume=True) as w:
        assert w.last_step == 9


def test_resume_from_an_earlier_step_supersedes_what_came_after(tmp_path):
    with open_run(tmp_path) as w:
        w.append_steps(steps(1, 10))
        for step in (4, 8):
            w.append_event(step, "kind", f"first at {step}")
        w.append_cost(8, wall_seconds=3.0)
    with open_run(tmp_path, resume=6) as w:
        w.append_steps(steps(7, 8))
        w.append_event(8, "kind", "second at 8")
    run = read_run(tmp_path)
    assert run.history.steps.tolist() == list(range(1, 9)) and run.history.total_steps == 8
    assert [e.text for e in run.events if e.kind == "kind"] == ["first at 4", "second at 8"]
    assert run.wall_seconds == 3.0, "time once spent stays spent"
    with open_run(tmp_path, resume=True) as w:
        assert w.last_step == 8


def test_the_rates_before_a_resumption_are_those_up_to_its_step(tmp_path):
    with open_run(tmp_path) as w:
        rows = steps(1, 10)
        rows.learning_rate[:] = numpy.arange(1.0, 11.0)
        w.append_steps(rows)
    with open_run(tmp_path, resume=6) as w:
        assert w.rates_before == (1.0, 6.0)


@pytest.mark.parametrize("step", [-1, 11])
def test_resume_from_a_step_that_is_not_there(tmp_path, step):
    with open_run(tmp_path) as w:
        w.append_steps(steps(1, 10))
    with pytest.raises(RunError, match=f"resume={step} is not a step of .*, which has steps up to 10"):
        open_run(tmp_path, resume=step)
    assert len(read_run(tmp_path).history) == 10


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ({"a.weight": 6, "a.bias": 3}, "for a.bias the run has 2 elements and the model 3 elements"),
        ({"a.weight": 6}, "for a.bias the run has 2 elements and the model no such layer"),
        ({**LAYERS, "b": 1}, "for b the run has no such layer and the model 1 elements"),
        ({"a.bias": 2, "a.weight": 6}, "has the layers of the run .* in another order"),
    ],
)
def test_another_model_is_refused_with_the_first_difference(tmp_path, layers, text):
    open_run(tmp_path).close()
    with pytest.raises(RunError, match=text):
        RunWriter(tmp_path, {"layers": layers}, resume=True)
    with open_run(tmp_path) as w, pytest.raises(RunError, match=text):
        w.append_steps(steps(1, 2, layers))


# Appending


def test_steps_must_go_on(tmp_path):
    with open_run(tmp_path) as w:
        w.append_steps(steps(1, 5))
        w.append_steps(steps(1, 0))
        with pytest.raises(RunError, match=r"Steps 5 to 6 do not continue .*, whose last step is 5"):
            w.append_steps(steps(5, 6))
        with pytest.raises(RunError, match="append increasing steps"):
            w.append_steps(steps(6, 9).rows(numpy.array([0, 2, 1])))


def test_an_outcome_must_say_whose_it_is(tmp_path):
    with open_run(tmp_path) as w, pytest.raises(InvalidInput, match="Profile does not say which instrument"):
        w.append_outcome(1, Profile(values=(1.0,)))


def test_metadata_must_name_the_layers(tmp_path):
    with pytest.raises(InvalidInput, match="metadata lack layers; give the number of elements of each parameter"):
        RunWriter(tmp_path / "run", {"model": "Net"})
    assert not (tmp_path / "run").exists()


def test_metadata_that_json_cannot_hold_becomes_text(tmp_path):
    RunWriter(tmp_path, {"layers": LAYERS, "folder": tmp_path, "limit": float("inf"), "tags": {"a"}}).close()
    about = read_run(tmp_path).metadata
    assert about["folder"] == str(tmp_path) and about["tags"] == ["a"] and about["limit"] == float("inf")
    with RunWriter(tmp_path, {"layers": LAYERS, "limit": float("nan")}, resume=True):
        assert read_run(tmp_path).metadata["limit"] == float("inf")


def test_a_full_disk_is_one_sentence_and_leaves_whole_records(tmp_path, monkeypatch):
    write = os.write

    def full(descriptor, data):
        if len(data) > 10:
            return write(descriptor, bytes(data)[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with open_run(tmp_path) as w:
        w.append_event(1, "kind", "before")
        monkeypatch.setattr("diag.run.writer.os.write", full)
        with pytest.raises(
            RunError, match=r"records\.jsonl cannot be written \(No space left on device\); free some"
        ):
            w.append_event(2, "kind", "lost")
        with pytest.raises(RunError, match=r"steps\.bin cannot be written"):
            w.append_steps(steps(1, 1))
        monkeypatch.undo()
        w.append_steps(steps(1, 2))
        w.append_event(3, "kind", "after")
    run = read_run(tmp_path)
    assert [e.text for e in run.events] == ["before", "after"] and run.torn == 0 and len(run.history) == 2


def test_an_array_that_may_not_be_written_is_one_sentence_without_advice_about_space(tmp_path, monkeypatch):
    def refused(folder, array):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("diag.run.writer.save_array", refused)
    expected = r"arrays cannot be written \(Permission denied\); see that the folder can be written to\.$"
    with open_run(tmp_path) as w, pytest.raises(RunError, match=expected):
        w.append_outcome(1, profile(numpy.arange(1000.0)))


def write_until_killed(folder, pipe):
    """Append without end; after each append, one byte through the pipe says that it is done."""
    w = open_run(folder)
    long = "x" * 100_000  # long lines, so that some kills fall into the middle of a write
    for step in range(1, 10**6):
        w.append_steps(steps(step, step))
        os.write(pipe, b"s")
        w.append_outcome(step, profile(numpy.arange(1000.0) + step))
        os.write(pipe, b"o")
        w.append_event(step, "kind", long)
        os.write(pipe, b"e")


def test_killed_at_thirty_random_moments_nothing_completed_is_lost(tmp_path, monkeypatch):
    moment = random.Random(0)
    monkeypatch.setattr("diag.run.run.instruments", dict)
    for attempt in range(30):
        folder = tmp_path / str(attempt)
        receive, send = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.close(receive)
                write_until_killed(folder, send)
            finally:
                os._exit(1)
        os.close(send)
        done = os.read(receive, 1)
        time.sleep(moment.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        while more := os.read(receive, 1 << 16):
            done += more
        os.close(receive)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        run = read_run(folder)
        told = {kind: done.count(kind.encode()) for kind in "soe"}
        found = {"s": len(run.history), "o": len(run.series("profile")), "e": len(run.events)}
        # What was under way when the kill came may be there, whole, or not.
        assert all(told[kind] <= found[kind] <= told[kind] + 1 for kind in "soe") and run.torn <= 1
        assert run.history.steps.tolist() == list(range(1, found["s"] + 1)) and not run.outcomes
        for step, raw in run.series("profile"):
            numpy.testing.assert_array_equal(raw["values"], numpy.arange(1000.0) + step)
        with open_run(folder, resume=True) as w:
            assert w.last_step == found["s"]


@pytest.mark.parametrize("function", ["ftruncate", "pwrite"])
def test_a_disk_that_is_full_when_the_folder_is_taken_is_told(tmp_path, monkeypatch, function):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, function, full)
        with pytest.raises(RunError, match=r"run cannot be written \(No space left on device\); give another"):
            RunWriter(tmp_path / "run", {"layers": LAYERS})
    RunWriter(tmp_path / "run", {"layers": LAYERS}).close()
    assert read_run(tmp_path / "run").history is None
