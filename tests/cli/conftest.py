"""The command line as a user meets it: exit status, standard output, standard error."""

import dataclasses

import numpy
import pytest
import torch
from click.testing import CliRunner

import diag
from diag.cli import main
from diag.result import Failed, Skipped
from diag.run.writer import RunWriter
from diag.snapshot.history import empty_history

LAYERS = {"body.weight": 6, "head.weight": 4}


@pytest.fixture
def run_diag(monkeypatch, tmp_path):
    """`run_diag("check", path)` -> the result of click's runner, in an empty folder, 100 columns wide."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, columns=100):
        return CliRunner().invoke(main, [str(a) for a in arguments], env={"COLUMNS": str(columns), "NO_COLOR": "1"})

    return call


@pytest.fixture
def make_run(tmp_path):
    """`make_run(name, margin)` writes a run whose softmax has collapsed where the margin is large."""

    def make(name, margin, steps=(50, 100)):
        rows = empty_history(LAYERS, 100)
        one = numpy.ones((100, 2), numpy.float32)
        loss = numpy.exp(-numpy.arange(100) / 50)
        rows = dataclasses.replace(rows, loss=loss, gradient_norm=one, parameter_norm=one, update_norm=one / 100)
        with RunWriter(tmp_path / name, {"layers": LAYERS, "model": "Net", "parameters": 10}) as w:
            w.append_steps(rows)
            for step in steps:
                labels = torch.arange(40) % 4
                logits = torch.nn.functional.one_hot(labels, 4).float() * margin
                answers = {"logits": logits, "labels": labels}  # and wrong ones on held-out data
                held_out = {"held_out_logits": logits.roll(1, 0), "held_out_labels": labels}
                w.append_outcome(step, diag.softmax_collapse(**answers, **held_out), 0.01)
                w.append_outcome(step, Skipped("neural_collapse", "features are missing; give a last Linear."))
            w.append_event(60, "not observed", "The loss was computed by hand; give loss_fn=.")
            w.append_cost(100, wall_seconds=10.0, watch_seconds=0.2)
        return tmp_path / name

    return make


@pytest.fixture
def broken_run(tmp_path):
    """A run in which nothing could be measured."""
    with RunWriter(tmp_path / "broken", {"layers": LAYERS, "model": "Net"}) as w:
        w.append_outcome(3, Failed("softmax_collapse", "ValueError: broke", "Traceback"))
    return tmp_path / "broken"
