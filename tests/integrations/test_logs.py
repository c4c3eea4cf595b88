"""Logs of other tools become runs: what was logged is there, and what was not is said to be missing."""

import csv
import json

import numpy
import pytest
import torch
import torch.nn.functional as F

import diag
from diag.errors import InvalidInput
from diag.instruments.optimization.course import scatter
from diag.integrations.logs import import_log, run_of_log


def falling(count, every=10):
    return [(every * (i + 1), float(numpy.exp(-i / 20))) for i in range(count)]


def as_trainer_state(path, course):
    rows = [{"step": s, "loss": v, "learning_rate": 1e-3, "epoch": s / 100, "grad_norm": 1.0} for s, v in course]
    rows += [{"step": course[-1][0], "eval_loss": 0.5, "eval_accuracy": 0.8, "epoch": 1.0}]
    path.write_text(json.dumps({"global_step": course[-1][0], "log_history": rows}))


def as_lightning(path, course):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "step", "train_loss", "val_loss"])
        for step, value in course:
            writer.writerow([0, step, value, ""])
        writer.writerow([0, course[-1][0], "", 0.5])


def as_jsonl(path, course):
    lines = [json.dumps({"_step": s, "train/loss": v, "_runtime": 1.0}) for s, v in course]
    path.write_text("\n".join(lines) + '\n{"_step": 9')


KINDS = {"trainer_state.json": as_trainer_state, "metrics.csv": as_lightning, "history.jsonl": as_jsonl}


@pytest.mark.parametrize("name", KINDS)
def test_the_loss_is_there_at_the_steps_at_which_it_was_logged(name, tmp_path):
    course = falling(60)
    KINDS[name](tmp_path / name, course)
    run = run_of_log(tmp_path / name)
    assert run.history.steps.tolist() == [s for s, _ in course]
    assert run.history.loss.tolist() == [v for _, v in course]
    assert "The loss was logged at 60 of 600 steps" in run.history.notes[0]
    assert not [o for _, o in run.outcomes if type(o).__name__ == "Failed"], run.outcomes


def test_what_else_was_logged_is_the_user_s_own(tmp_path):
    as_trainer_state(tmp_path / "trainer_state.json", falling(20))
    run = run_of_log(tmp_path)
    assert run.history.learning_rate.tolist() == [1e-3] * 20
    assert set(run.metrics) == {"grad_norm", "eval_loss", "eval_accuracy"}
    assert run.metrics["eval_accuracy"] == [(200, 0.8)]


def test_a_log_from_step_zero_counts_from_one(tmp_path):
    as_lightning(tmp_path / "metrics.csv", [(0, 1.0), (1, 0.5)])
    assert run_of_log(tmp_path / "metrics.csv").history.steps.tolist() == [1, 2]


def test_a_loss_that_diverges_is_found_and_one_that_falls_is_left_in_peace(tmp_path):
    bad = [(s, v) for s, v in falling(100, 1)] + [(101 + i, 5.0 * 1.2**i) for i in range(60)]
    as_jsonl(tmp_path / "bad.jsonl", bad)
    as_jsonl(tmp_path / "good.jsonl", falling(200, 1))
    levels = {n: {f.instrument: f.verdict.level for f in run_of_log(tmp_path / n).findings()} for n in
              ("bad.jsonl", "good.jsonl")}  # fmt: skip
    assert levels["bad.jsonl"]["divergence"].is_finding and not levels["good.jsonl"]["divergence"].is_finding


def test_a_spike_of_a_log_is_found(tmp_path):
    course = [(s, v + (3.0 - (s - 100) / 2 if 100 <= s < 106 else 0.0)) for s, v in falling(200, 1)]
    as_jsonl(tmp_path / "spike.jsonl", course)
    (found,) = [f for f in run_of_log(tmp_path / "spike.jsonl").findings() if f.instrument == "loss_spikes"]
    assert found.verdict.cause == "loss_spike" and found.verdict.step == 100


def test_a_log_that_becomes_not_finite_is_an_alarm(tmp_path):
    text = "step,loss\n" + "".join(f"{i},{1 / i}\n" for i in range(1, 80)) + "80,nan\n81,nan\n"
    (tmp_path / "log.csv").write_text(text)
    run = run_of_log(tmp_path / "log.csv")
    assert any(f.verdict.level == "alarm" for f in run.findings())


def test_too_thin_a_log_is_not_judged(tmp_path):
    as_jsonl(tmp_path / "thin.jsonl", [(10, 1.0), (20, 0.9)])
    assert not any(f.verdict.level.is_finding for f in run_of_log(tmp_path / "thin.jsonl").findings())


def test_an_imported_run_is_a_run_for_every_command(tmp_path):
    as_trainer_state(tmp_path / "trainer_state.json", falling(60))
    made, again = import_log(tmp_path, tmp_path / "run"), diag.load(tmp_path / "run")
    assert made.history.loss.tolist() == again.history.loss.tolist()
    assert {k: list(v) for k, v in made.metrics.items()} == {
        k: list(v) for k, v in run_of_log(tmp_path).metrics.items()
    }
    page = diag.report(again)
    assert "eval_loss" in page.html and page.document["outcome"]["panels"]
    assert "better" not in diag.compare(made, again).document["verdict"]["headline"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "loss\n1\n", "has no row with a step"),
        ("a.csv", "", "has no row with a step"),
        ("a.json", "{}", "has no log_history"),
        ("a.json", "[1]", "has no log_history"),
        ("a.json", "{", "cannot be read as json"),
        ("a.txt", "x", "ends in .txt; expected"),
        ("a.csv", b"\xff\xfe\x00", "cannot be read as csv"),
    ],
)
def test_what_is_no_log_is_refused_in_one_sentence(name, text, said, tmp_path):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InvalidInput, match=said):
        run_of_log(tmp_path / name)


def test_no_file_and_an_empty_folder(tmp_path):
    with pytest.raises(InvalidInput, match="There is no"):
        run_of_log(tmp_path / "nothing.csv")
    with pytest.raises(InvalidInput, match="holds no log"):
        run_of_log(tmp_path)


def test_tensorboard_events(tmp_path):
    pytest.importorskip("tensorboard", reason="pip install diag[sinks]")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for step, value in falling(40):
            writer.add_scalar("train/loss", value, step)
        writer.add_scalar("val/accuracy", 0.5, 400)
    run = run_of_log(tmp_path)
    assert run.history.loss == pytest.approx([v for _, v in falling(40)], rel=1e-6)  # events hold float32
    assert run.metrics["val/accuracy"] == [(400, 0.5)]


def with_validation(path, losses, held_out, accuracy=None, names=("val_loss", "val_acc")):
    """A CSV with a row an epoch, as Keras and many scripts write it; the verdict on generalisation, if any."""
    with open(path / "log.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "loss", names[0], *(names[1:] if accuracy is not None else [])])
        columns = [losses, held_out, *([] if accuracy is None else [accuracy])]
        for epoch, row in enumerate(zip(*columns, strict=True), 1):
            writer.writerow([epoch, *row])
    found = {f.instrument: f.verdict for f in import_log(path / "log.csv", path / "run").findings()}
    return found.get("generalization")


EPOCHS = numpy.arange(1, 41)
FALLING = numpy.exp(-EPOCHS / 10)
TURNING = 0.5 + 0.0008 * (EPOCHS - 12.0) ** 2
NOISE = 0.03 * numpy.random.default_rng(0).standard_normal(40)


@pytest.mark.parametrize("name", ["val_loss", "eval/loss", "validation_loss", "loss_val", "test loss"])
def test_a_logged_validation_loss_that_turns_is_overfitting(name, tmp_path):
    verdict = with_validation(tmp_path, FALLING, TURNING + NOISE, names=(name, "val_acc"))
    assert verdict.cause == "overfitting" and verdict.level == "warning" and 8 <= verdict.step <= 16


@pytest.mark.parametrize(
    ("losses", "held_out", "accuracy"),
    [
        (FALLING, 0.1 + FALLING + NOISE, None),  # both fall
        (FALLING, 0.6 + 4 * NOISE, None),  # it only scatters
        (FALLING[::-1], TURNING, None),  # training gets worse as well
        (FALLING, TURNING, 1 - 0.5 * FALLING),  # surer of what is wrong, and no less often right
        (FALLING, TURNING, 90 - 0.05 * EPOCHS),  # two points of a hundred
    ],
)
def test_a_logged_validation_course_that_is_well_or_noise_is_left_in_peace(losses, held_out, accuracy, tmp_path):
    verdict = with_validation(tmp_path, losses, held_out, accuracy)
    assert verdict.level == "ok" and not verdict.cause


def test_a_logged_accuracy_that_falls_is_overfitting(tmp_path):
    verdict = with_validation(tmp_path, FALLING, TURNING, 90 - 0.02 * (EPOCHS - 12.0) ** 2)
    assert verdict.cause == "overfitting" and "90 %" in verdict.sentence


def test_a_validation_loss_that_the_loop_logs_is_judged_where_nothing_else_was_measured():
    torch.manual_seed(0)
    model, x, y = torch.nn.Linear(3, 2), torch.randn(64, 3), torch.randint(2, (64,))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with diag.watch(model, instruments=["generalization"]) as watcher:
        for epoch in range(40):
            for rows in torch.randperm(64).split(16):
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
            watcher.log(val_loss=float(TURNING[epoch]))
    (found,) = watcher.run.findings()
    assert len(found.series) == 40 and found.series[0][1].held_out_loss == pytest.approx(TURNING[1])
    assert not [o for _, o in watcher.run.outcomes if o.instrument == "generalization"]


@pytest.mark.parametrize("epoch", [0, 11, 38])
def test_one_logged_value_that_is_not_a_number_hides_nothing(epoch, tmp_path):
    """At the beginning, at the best epoch and next to the last: its neighbours count with the values beside it."""
    held_out = numpy.where(numpy.arange(40) == epoch, numpy.nan, TURNING)
    verdict = with_validation(tmp_path, FALLING, held_out)
    assert verdict.cause == "overfitting" and "undefined" not in verdict.sentence


def test_few_or_other_logged_numbers_are_no_course(tmp_path):
    assert with_validation(tmp_path, FALLING[:4], TURNING[:4]) is None
    assert with_validation(tmp_path, FALLING, TURNING, names=("val_loss_of_the_decoder", "val_acc")) is None


def test_the_scatter_of_logged_values_is_the_noise_around_their_course():
    """Normal noise of 0.1 around a line; the median of 2,000 second differences is known to 2 %."""
    x = numpy.arange(2000)
    values = 3 - 0.001 * x + 0.1 * numpy.random.default_rng(1).standard_normal(2000)
    assert scatter(values) == pytest.approx(0.1, rel=0.08)
    assert scatter(3 - 0.001 * x) == pytest.approx(0, abs=1e-12)
