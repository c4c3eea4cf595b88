"""The record of the steps in parts: what is computed of them is what is computed of the whole."""

import dataclasses
import subprocess
import sys

import numpy
import pytest

import diag
from diag.snapshot.history import by_rows, empty_history, parts

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


BIG = """
import resource, sys
import numpy
from diag.reporting import report
from diag.run.run import RunWriter, load
from diag.snapshot.history import empty_history
layers = {f"block{i // 8}.layer{i % 8}.weight": 1000 for i in range(2000)}
draw = numpy.random.default_rng(0)
with RunWriter(sys.argv[1], {"layers": layers, "model": "Net"}) as writer:
    for first in range(1, 20001, 500):
        rows = empty_history(layers, 500)
        rows.steps[...] = numpy.arange(first, first + 500)
        rows.loss[...] = numpy.exp(-rows.steps / 5000)
        for name in ("gradient_norm", "parameter_norm", "update_norm", "distance"):
            getattr(rows, name)[...] = draw.random((500, 2000), dtype=numpy.float32) + 0.5
        writer.append_steps(rows)
report(sys.argv[1], sys.argv[1] + "/report.html")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_a_record_of_twenty_thousand_steps_of_two_thousand_layers_is_reported_in_little_memory(tmp_path):
    """Its file has 680 MB, which are mapped and so count; a copy of all of it in float64 would be above this."""
    shown = subprocess.run(
        [sys.executable, "-c", BIG, str(tmp_path / "run")], capture_output=True, text=True, check=True
    )
    assert int(shown.stdout) < 1.4e9
