"""Writing that fails for a while, in one file or for good: what is kept, what is told, and when."""

import errno
import logging
import math
import os
import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.errors import RunError
from diag.watching import waiting
from diag.watching.waiting import Waiting

STEPS = 40


class Failing:
    """`os.write` that fails from one step of the training to another, as on a disk that is full meanwhile."""

    def __init__(self, monkeypatch, module="diag.run.growing.os.write"):
        self._write, self.full = os.write, False
        monkeypatch.setattr(module, self)

    def __call__(self, descriptor, data):
        if self.full:
            if len(data) > 7:  # a part of a record is written before the disk is full
                return self._write(descriptor, bytes(data)[:7])
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._write(descriptor, data)


@pytest.fixture(autouse=True)
def _at_every_step(monkeypatch):
    monkeypatch.setattr(waiting, "EVERY", 0.0)


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(32, 6)
    return model, x, x[:, :3].argmax(1)


def train(between=lambda step: None, run=None, steps=STEPS, **options):
    """Train, watched where `run` is given, and call `between(step)` after each step; the final parameters."""
    model, x, y = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    watcher = diag.watch(model, run=run, **{"instruments": [], **options}) if run is not None else None
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        between(step)
    if watcher is not None:
        watcher.close()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def events_of(run, kind):
    return [e.text for e in run.events if e.kind == kind]


def test_a_disk_that_is_full_for_a_while_loses_nothing_and_is_told(tmp_path, monkeypatch, caplog):
    disk, told_by = Failing(monkeypatch), []

    def between(step):
        disk.full = 10 <= step < 30
        if step == 11:
            told_by.extend(r.getMessage() for r in caplog.records if r.name == "diag")

    with caplog.at_level(logging.WARNING, "diag"):
        final = train(between, tmp_path / "run")
    torch.testing.assert_close(final, train(), rtol=0, atol=0)
    run = diag.load(tmp_path / "run")
    assert run.history.steps.tolist() == list(range(1, STEPS + 1)) and run.torn == 0
    [steps] = [text for text in events_of(run, "incomplete") if text.startswith("The steps")]
    assert "from step 11 to 30 could not be written" in steps and "No space left on device" in steps
    assert steps.endswith("they were kept and written later, and none is missing.")
    assert not events_of(run, "damaged")
    [at_once] = [text for text in told_by if "The steps" in text]
    assert "cannot be written since step 11" in at_once and "Training goes on" in at_once


def test_more_than_the_memory_may_hold_is_counted(tmp_path, monkeypatch):
    disk, size = Failing(monkeypatch), []

    def between(step):
        if not size:
            row = (tmp_path / "run" / "steps.bin").stat().st_size // step
            size.append(row)
            monkeypatch.setattr(waiting, "BYTES_WAITING", 6 * (row + 500))  # six rows
        disk.full = 10 <= step < 30

    train(between, tmp_path / "run")
    run = diag.load(tmp_path / "run")
    assert run.history.steps.tolist() == [*range(1, 17), *range(31, STEPS + 1)]
    [steps] = [text for text in events_of(run, "incomplete") if text.startswith("The steps")]
    assert steps.endswith("14 of them are missing, from step 17 to 30.")


def test_a_disk_that_stays_full_is_told_at_the_end(tmp_path, monkeypatch, caplog):
    disk = Failing(monkeypatch)

    def between(step):
        disk.full = step >= 10

    with pytest.warns(UserWarning, match=r"not complete: The steps .* 30 of them are missing, from step 11 to 40"):
        train(between, tmp_path / "run")
    assert diag.load(tmp_path / "run").history.steps.tolist() == list(range(1, 11))


def test_arrays_that_cannot_be_written_keep_no_row_waiting(tmp_path, monkeypatch):
    """A folder that lost its permission: rows are written on, and a result once its array can be."""
    from diag.run import writer

    save, allowed = writer.save_array, [True]

    def refuse(folder, array):
        if not allowed[0]:
            raise PermissionError(errno.EACCES, "Permission denied")
        return save(folder, array)

    monkeypatch.setattr(writer, "save_array", refuse)
    seen = []

    def between(step):
        allowed[0] = not 3 <= step < 20
        if step == 19:
            seen.append(len(diag.load(tmp_path / "run").history))

    options = {"budget": math.inf, "every": 1, "probe": (torch.randn(100, 6), torch.arange(100) % 3)}
    train(between, tmp_path / "run", instruments=["softmax_collapse"], **options)
    run = diag.load(tmp_path / "run")
    assert seen == [19] and len(run.series("softmax_collapse")) == STEPS and not run.outcomes
    [results] = events_of(run, "incomplete")
    assert results.startswith("The results from step 4 to") and "Permission denied" in results


@pytest.mark.parametrize("gone", ["arrays", "run"])
def test_what_is_removed_meanwhile_is_made_again(gone, tmp_path, monkeypatch):
    monkeypatch.setattr("diag.watching.record.COST_EVERY", 0.0)  # when the files are looked after
    folder = {"arrays": tmp_path / "run" / "arrays", "run": tmp_path / "run"}[gone]

    def between(step):
        if step == 20:
            shutil.rmtree(folder)

    options = {"budget": math.inf, "every": 1, "probe": (torch.randn(100, 6), torch.arange(100) % 3)}
    train(between, tmp_path / "run", instruments=["softmax_collapse"], **options)
    run = diag.load(tmp_path / "run")
    assert run.history.steps.tolist() == list(range(1, STEPS + 1)) and not events_of(run, "damaged")
    # The arrays that had been written are gone, and each result that had one says so.
    later = [step for step, _ in run.series("softmax_collapse")]
    assert set(range(21, STEPS + 1)) <= set(later)
    assert all("No such file" in outcome.reason for _, outcome in run.outcomes)
    assert len(later) + len(run.outcomes) == STEPS
    told = [text for text in events_of(run, "incomplete") if text.startswith("The run's files were removed")]
    assert len(told) == (gone == "run")


def test_a_folder_that_another_run_has_taken_is_left_to_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("diag.watching.record.COST_EVERY", 0.0)

    def between(step):
        if step == 20:
            shutil.rmtree(tmp_path / "run")
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / "steps.bin").write_bytes(b"another's")

    with caplog.at_level(logging.WARNING, "diag"):
        final = train(between, tmp_path / "run")
    torch.testing.assert_close(final, train(), rtol=0, atol=0)
    assert (tmp_path / "run" / "steps.bin").read_bytes() == b"another's"
    told = [r.getMessage() for r in caplog.records if "What is recorded from now on is lost" in r.getMessage()]
    assert len(told) == 1


def test_a_relative_path_stays_where_it_was(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    options = {"budget": math.inf, "every": 1, "probe": (torch.randn(100, 6), torch.arange(100) % 3)}

    def between(step):
        if step == 10:
            os.chdir(tmp_path / "elsewhere")

    train(between, "run", instruments=["softmax_collapse"], **options)
    run = diag.load(tmp_path / "run")
    assert len(run.history) == STEPS and len(run.series("softmax_collapse")) == STEPS
    assert not list((tmp_path / "elsewhere").iterdir())


def test_one_that_can_never_be_written_is_told_and_keeps_no_other_waiting(tmp_path):
    with diag.watch(network()[0], run=tmp_path / "run", instruments=[]) as watcher:
        watcher._recorder.event(object(), "kind", "no step")
        watcher._recorder.event(2, "kind", "text")
    run = diag.load(tmp_path / "run")
    assert events_of(run, "kind") == ["text"] and "failed to observe" in events_of(run, "internal error")[0]


def test_order_is_kept_and_what_failed_is_tried_in_turn():
    written, told, fails = [], [], [False]

    def call(value):
        if fails[0]:
            raise RunError("no space.")
        written.append(value)

    part = Waiting("rows", lambda step, text: told.append((step, text)))
    for step in range(1, 10):
        fails[0] = step in (3, 4, 7)
        part.append(step, 1, call, step)
    assert written == list(range(1, 10)) and part.flush()
    sentence = "The rows from step {} to {} could not be written (no space); they were kept and written later, and "
    assert told == [(s, sentence.format(f, s) + "none is missing.") for f, s in ((3, 4), (7, 7))]
