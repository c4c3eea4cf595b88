"""Findings beside the usual logs; each library's own reader says what arrived. Skipped where one is missing."""

import csv
import dataclasses

import numpy
import pytest
import torch

import diag
from diag.errors import InvalidInput
from diag.integrations.sinks import CsvSink, MlflowSink, TensorBoardSink, WandbSink, every_sink
from diag.run.reading import read_run
from diag.run.writer import RunWriter
from diag.snapshot.history import empty_history


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose softmax has collapsed on examples that say nothing of held-out ones."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    rows = dataclasses.replace(empty_history({"w": 4}, 100), loss=numpy.exp(-numpy.arange(100) / 50))
    labels = torch.arange(40) % 4
    with RunWriter(folder, {"layers": {"w": 4}}) as writer:
        writer.append_steps(rows)
        for step in (50, 100):
            logits = torch.nn.functional.one_hot(labels, 4).float() * 1000
            elsewhere = {"held_out_logits": logits, "held_out_labels": labels.flip(0)}
            writer.append_outcome(step, diag.softmax_collapse(logits=logits, labels=labels, **elsewhere))
    return read_run(folder)


@pytest.fixture(scope="module")
def finding(run):
    return next(f for f in run.findings() if f.verdict.level.is_finding)


def test_csv(run, finding, tmp_path):
    sink = CsvSink(tmp_path / "deep" / "findings.csv")
    sink(finding)
    sink(finding)
    sink.export(run)
    rows = list(csv.DictReader(sink.path.read_text().splitlines()))
    assert len(rows) == 3 and rows[0]["instrument"] == finding.instrument and rows[0]["step"] == "100"
    numbers = list(csv.DictReader(sink.numbers.read_text().splitlines()))
    collapsed = [
        (int(r["step"]), float(r["value"])) for r in numbers if r["name"] == "diag/softmax_collapse/collapsed"
    ]
    assert collapsed == [(50, 1.0), (100, 1.0)]


def test_one_sink_that_fails_does_not_keep_the_others_from_it(finding, tmp_path):
    def broken(_):
        raise ValueError("broken")

    sink = CsvSink(tmp_path / "findings.csv")
    with pytest.raises(ValueError, match="broken"):
        every_sink(broken, sink)(finding)
    assert sink.path.exists()


@pytest.mark.parametrize(
    "make", [lambda: TensorBoardSink(3), lambda: WandbSink(None), lambda: MlflowSink("x", "y")]
)
def test_what_is_no_logger_is_refused(make):
    with pytest.raises(InvalidInput, match="expected"):
        make()


def test_tensorboard(run, finding, tmp_path):
    pytest.importorskip("tensorboard", reason="pip install diag[sinks]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        sink = TensorBoardSink(writer)
        sink(finding)
        sink.export(run)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("diag/softmax_collapse/collapsed")] == [(50, 1.0), (100, 1.0)]
    assert [(e.step, e.value) for e in events.Scalars("diag/alarms")] == [(100, 1.0)]
    assert any(name.startswith("diag/softmax_collapse") for name in events.Tags()["tensors"])


def test_wandb_offline(run, finding, tmp_path):
    wandb = pytest.importorskip("wandb", reason="pip install diag[sinks]")
    started = wandb.init(mode="offline", dir=str(tmp_path), project="diag", settings=wandb.Settings(silent=True))
    sink = WandbSink(started)
    sink(finding)
    started.log({"loss": 1.0})
    assert started.step == 1, "a finding makes no step of its own"
    sink.export(run)
    assert "zero gradient" in started.summary["diag/softmax_collapse"] or started.summary["diag/softmax_collapse"]
    started.finish()


def test_mlflow(run, finding, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="pip install diag[sinks]")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the small package has no other store
    client = mlflow.MlflowClient(f"file:{tmp_path}/store")
    experiment = client.create_experiment("diag")
    started = client.create_run(experiment)
    sink = MlflowSink(client, started.info.run_id)
    sink(finding)
    sink.export(run)
    history = client.get_metric_history(started.info.run_id, "diag/softmax_collapse/collapsed")
    assert sorted((m.step, m.value) for m in history) == [(50, 1.0), (100, 1.0)]
    assert client.get_run(started.info.run_id).data.tags["diag.softmax_collapse"].startswith("step 100: alarm")
