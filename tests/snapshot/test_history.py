"""The record of the steps in parts: what is computed of them is what is computed of the whole."""

import dataclasses
import os
import subprocess
import sys

import numpy
import pytest

import diag
from diag.run.rows import Rows, kept_rows
from diag.run.writer import RunWriter
from diag.snapshot.history import by_rows, empty_history, parts, taken, thinned_record, unmap

LAYERS = {f"layer{i}.{kind}": size for i in range(6) for kind, size in (("weight", 600), ("bias", 20))}


def record(steps):
    draw = numpy.random.default_rng(0)
    history = empty_history(LAYERS, steps)
    for name in ("gradient_norm", "parameter_norm", "update_norm", "distance"):
        values = getattr(history, name)
        values[...] = draw.random(values.shape) + 0.5
        values[draw.random(values.shape) < 0.1] = numpy.nan
    history.parameter_norm[3] = numpy.nan  # a step at which it was not taken
    history.update_norm[...] *= 1e-3
    history.gradient_norm[:, 4] = 0
    history.gradient_norm[7, 2], history.gradient_finite[9, 5] = numpy.inf, False
    history.skipped[11] = True
    history.loss[...] = numpy.exp(-numpy.arange(steps) / 100)
    history.learning_rate[...] = 0.1
    history.applied_gradient_norm[...] = 1.0
    optimizer = {"kind": "Adam", "lr": 0.1, "eps": 1e-8, "groups": [{"lr": 0.1, "weight_decay": 0.01}]}
    return dataclasses.replace(history, optimizer=optimizer)


@pytest.mark.parametrize("cells", [1, 12, 50, 10**9])
def test_parts_are_the_record(cells, monkeypatch):
    monkeypatch.setattr("diag.snapshot.history.CELLS", cells)
    history = record(40)
    assert numpy.concatenate([part.steps for part in parts(history)]).tolist() == list(range(1, 41))
    assert all(part.layers == history.layers for part in parts(history))
    numpy.testing.assert_array_equal(by_rows(history, lambda h: h.gradient_norm[:, 0]), history.gradient_norm[:, 0])
    assert [len(part) for part in parts(empty_history(LAYERS))] == [0]


@pytest.mark.parametrize("name", ["gradient_flow", "step_size", "weight_decay"])
def test_instruments_of_the_record_give_the_same_in_parts(name, monkeypatch):
    history = record(300)
    whole = getattr(diag, name)(history=history)
    monkeypatch.setattr("diag.snapshot.history.CELLS", 100)
    assert getattr(diag, name)(history=history) == whole


def test_rows_are_taken_part_by_part(monkeypatch):
    history = record(40)
    monkeypatch.setattr("diag.snapshot.history.CELLS", 50)
    assert taken(history, numpy.array([0, 7, 8, 39])).steps.tolist() == [1, 8, 9, 40]
    numpy.testing.assert_array_equal(taken(history, numpy.array([5])).distance, history.distance[[5]])
    assert thinned_record(history, 40 * 12 + 1) is history
    assert thinned_record(history, 20 * 12).steps.tolist() == list(range(1, 41, 3))


def test_what_was_let_go_can_be_read_again(tmp_path):
    numpy.arange(10_000.0).tofile(tmp_path / "numbers")
    mapped = numpy.memmap(tmp_path / "numbers", float, "r")
    column = mapped.reshape(-1, 10)[:, 3]
    for array in (column, mapped, numpy.zeros(3)):
        unmap(array)
    assert column.sum() == numpy.arange(3.0, 10_000, 10).sum()


@pytest.mark.parametrize("block", [1, 100, 1 << 22])
def test_superseded_rows_are_left_out_in_memory_and_in_a_file(block, monkeypatch):
    monkeypatch.setattr("diag.run.rows.ROW_BYTES_AT_ONCE", block)
    rows = numpy.zeros(30, [("steps", "<i8"), ("value", "<f8")])
    rows["steps"], rows["value"] = [*range(1, 21), *range(16, 26)], range(30)
    whole = numpy.ones(30, bool)
    whole[3] = False
    kept = kept_rows(Rows(rows, whole, 0), [{"type": "resume", "rows": 20, "step": 15}])
    assert kept["value"].tolist() == [0, 1, 2, *range(4, 15), *range(20, 30)]
    assert not len(kept_rows(Rows(rows, ~whole & False, 0), []))


REPORT = """
import sys
import diag
diag.report(sys.argv[1], sys.argv[1] + "/report.html")
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's account of the memory")
def test_a_record_of_twenty_thousand_steps_of_two_thousand_layers_is_reported_in_little_memory(tmp_path):
    """Its file has 680 MB; the libraries alone take about 230 MB."""
    layers = {f"block{i // 8}.layer{i % 8}.weight": 1000 for i in range(2000)}
    draw = numpy.random.default_rng(0)
    with RunWriter(tmp_path / "run", {"layers": layers, "model": "Net"}) as writer:
        for first in range(1, 20001, 500):
            rows = empty_history(layers, 500)
            rows.steps[...] = numpy.arange(first, first + 500)
            rows.loss[...] = numpy.exp(-rows.steps / 5000)
            for name in ("gradient_norm", "parameter_norm", "update_norm", "distance"):
                getattr(rows, name)[...] = draw.random((500, 2000), dtype=numpy.float32) + 0.5
            writer.append_steps(rows)
    command = [sys.executable, "-c", REPORT, tmp_path / "run"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(shown.stdout) < 450_000  # KiB
