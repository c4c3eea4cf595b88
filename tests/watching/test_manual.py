"""Loops without an optimizer of torch tell of their steps; any loop can put numbers of its own on the record."""

import math

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.reporting.document import document


def model_and_data():
    torch.manual_seed(0)
    return nn.Linear(4, 3), torch.randn(16, 4), torch.randint(0, 3, (16,))


def test_a_manual_loop_tells_of_its_steps():
    model, x, y = model_and_data()
    losses, gradients, updates = [], [], []
    with diag.watch(model, instruments=["softmax_collapse"], budget=math.inf) as watcher:
        for _ in range(12):
            model.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            losses.append(loss.item())
            gradients.append([float(p.grad.norm()) for p in model.parameters()])
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
            updates.append([0.1 * g for g in gradients[-1]])
            watcher.step()
        assert watcher.last_step == 12
    run = watcher.run
    assert run.history.loss == pytest.approx(numpy.array(losses), rel=1e-6)
    assert run.history.gradient_norm == pytest.approx(numpy.array(gradients), rel=1e-5)
    # Before the first step nobody knew that the parameters would be compared.
    assert numpy.isnan(run.history.update_norm[0]).all()
    assert run.history.update_norm[1:10] == pytest.approx(numpy.array(updates[1:10]), rel=1e-4)
    assert len(run.series("softmax_collapse")) >= 5
    assert not [e.text for e in run.events if e.kind in ("note", "internal error")]


def test_without_being_told_nothing_is_called_sam():
    model, x, y = model_and_data()
    with diag.watch(model, instruments=[]) as watcher:
        for _ in range(5):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
    notes = [e.text for e in watcher.run.events if e.kind == "note"]
    assert len(notes) == 1 and "No optimizer step" in notes[0] and "watcher.step()" in notes[0]


@pytest.mark.parametrize("given", [False, True])
def test_gradients_without_backward_leave_no_loss_without_a_word(given):
    model, x, y = model_and_data()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    with diag.watch(model, instruments=[]) as watcher:
        for i in range(5):
            loss = F.cross_entropy(model(x), y)
            for p, g in zip(model.parameters(), torch.autograd.grad(loss, model.parameters()), strict=True):
                p.grad = g
            if given and i:
                watcher.loss(loss)
            losses.append(loss.item() if given and i else math.nan)
            optimizer.step()
    assert watcher.run.history.loss == pytest.approx(numpy.array(losses), rel=1e-6, nan_ok=True)
    told = "1 of 5 steps" if given else "all 5 steps"
    (note,) = (e.text for e in watcher.run.events if e.kind == "note")
    assert note.startswith(f"No backward() from a loss of this model was seen before {told},")
    assert note.endswith("give it by watcher.loss(value).")


def test_being_told_of_steps_that_are_seen_makes_no_second_row():
    model, x, y = model_and_data()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with diag.watch(model, instruments=[]) as watcher:
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            watcher.step()
    assert len(watcher.run.history) == 4
    assert any("watcher.step() is not needed" in e.text for e in watcher.run.events)


def test_the_users_own_numbers_are_on_the_record_and_the_timeline(tmp_path):
    model, x, y = model_and_data()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with diag.watch(model, instruments=[], run=tmp_path / "run") as watcher:
        for step in range(1, 7):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            watcher.log(accuracy=step / 10, epoch=numpy.int64(step // 2))
            watcher.log(tensor=torch.tensor(2.0, requires_grad=True), broken="no", several=torch.ones(3))
        watcher.log(accuracy=math.nan)
    run = watcher.run
    assert [step for step, _ in run.metrics["accuracy"]] == [1, 2, 3, 4, 5, 6, 6]
    assert [value for _, value in run.metrics["accuracy"]][:6] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert math.isnan(run.metrics["accuracy"][-1][1]) and run.metrics["tensor"][0] == (1, 2.0)
    assert set(run.metrics) == {"accuracy", "epoch", "tensor"}
    notes = [e.text for e in run.events if e.kind == "note"]
    assert any("as broken= is a str" in n for n in notes) and any("as several= is a Tensor" in n for n in notes)
    assert run.to_frame()["logged.epoch"].tolist() == [0, 1, 1, 2, 2, 3]
    curves = {curve["name"]: curve for curve in document(run, drawings=False)["timeline"]["curves"]}
    assert curves["logged epoch"]["label"] == "epoch" and curves["logged epoch"]["last"] == "3"


@pytest.mark.parametrize("how", ["data", "no_grad", "told"])
def test_a_manual_loop_is_not_described_as_another(how):
    """Neither as one that never steps, nor as SAM; where it does not tell of its steps, how to is said."""
    model, x, y = model_and_data()
    with diag.watch(model, budget=math.inf) as watcher:
        for _ in range(30):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if how == "data":
                for p in model.parameters():
                    p.data -= 0.1 * p.grad
            else:
                with torch.no_grad():
                    for p in model.parameters():
                        p -= 0.1 * p.grad
            if how == "told":
                watcher.step()
    run = watcher.run
    said = " ".join(e.text for e in run.events)
    assert "No optimizer has stepped" not in said and "SAM" not in said
    assert ("watcher.step()" in said) == (how != "told")
    assert watcher.last_step == (30 if how == "told" else 0)


def test_a_loop_that_never_moves_the_parameters_is_found():
    model, x, y = model_and_data()
    torch.optim.SGD(model.parameters(), 0.1)
    with diag.watch(model, budget=math.inf) as watcher:
        for _ in range(30):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
    assert "No optimizer has stepped" in " ".join(f.verdict.sentence for f in watcher.findings)
