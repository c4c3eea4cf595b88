"""What the instruments of a watched run are given: the state before the step, the optimizer, the record so far."""

import math
import re
from dataclasses import dataclass

import numpy
import pytest
import torch
from torch.nn import functional as F

import diag
import diag.registry
from diag.errors import InvalidInput
from diag.registry import find, instrument
from diag.result import Failed, Level, Result, Verdict, measured
from diag.run.rows import history_of, row_columns, row_dtype
from diag.snapshot.history import parts
from diag.watching.measure.measuring import chosen_instruments
from diag.watching.measure.training import _LazyHistory


@dataclass(frozen=True, kw_only=True, eq=False)
class Moved(Result):
    """The length of the last step, by two ways."""

    length: float = measured("2-norm of the update")
    rate: float = measured("learning rate")
    steps: int = measured("recorded steps")

    def verdict(self):
        return Verdict(Level.OK, f"The step was {self.length:.3g} long.")


@instrument(source="a test")
def moved(update, optimizer, history) -> Moved:
    """The length of the last step."""
    length = torch.cat([u.flatten() for u in update.values()]).double().norm()
    return Moved(length=float(length), rate=optimizer.learning_rate, steps=len(history.steps))


def test_the_state_before_the_step_the_optimizer_and_the_history(tiny, monkeypatch):
    model, x, y = tiny
    monkeypatch.setattr("diag.watching.measure.measuring.find", lambda name: moved)
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    kept, lengths = [], []
    with diag.watch(model, budget=math.inf, every=1, probe=(x, y), instruments=["moved"]) as watcher:
        monkeypatch.setattr(
            watcher._recorder, "outcome", lambda step, outcome, seconds: kept.append((step, outcome))
        )
        watcher._measurements._record = watcher._recorder.outcome
        # Without the norms that need it, the state before the step is kept for the instrument alone.
        monkeypatch.setattr(watcher._steps.thinning, "take", lambda step, elapsed: False)
        for _ in range(6):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.step()
            moves = [(p - b).flatten() for p, b in zip(model.parameters(), before, strict=True)]
            lengths.append(float(torch.cat(moves).detach().norm()))
    # That it is wanted shows at the first step, so it is there from the second on.
    assert [step for step, _ in kept] == [2, 3, 4, 5, 6]
    assert numpy.isnan(watcher.run.history.update_norm).all()
    for step, outcome in kept:
        assert isinstance(outcome, Moved), outcome
        assert outcome.length == pytest.approx(lengths[step - 1], rel=1e-6)
        assert outcome.rate == 0.03 and outcome.steps == step


def test_settings_are_passed_and_checked(tiny):
    model, x, y = tiny
    settings = {"softmax_collapse": {"alarm_at": 0.123}}
    with diag.watch(model, budget=math.inf, probe=(x, y), instruments=settings) as watcher:
        F.cross_entropy(model(x), y).backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
    result = watcher.run.series("softmax_collapse")[0][1]
    assert result.provenance.settings["alarm_at"] == 0.123
    assert watcher.run.metadata["settings"] == settings
    assert chosen_instruments("softmax_collapse") == {"softmax_collapse": {}}
    here = {n: i for n, i in diag.registry.instruments().items() if i.of_a_snapshot}  # not of files or of a trial
    assert set(chosen_instruments("all")) == set(here)
    descriptions = {n for n, i in here.items() if i.kind is diag.registry.Kind.DESCRIPTION}
    assert set(chosen_instruments(None)) == set(here) - descriptions
    assert {"gradient_conflict", "input_magnitude", "symmetry_groups"} <= descriptions
    with pytest.raises(InvalidInput, match="has no setting 'nonsense'; it has"):
        chosen_instruments({"softmax_collapse": {"nonsense": 1}})


def test_a_run_says_what_it_is(tiny):
    model, _, _ = tiny
    with diag.watch(model, instruments=["softmax_collapse"], budget=0.1, every=7) as watcher:
        pass
    about = watcher.run.metadata
    assert about["model"] == "Sequential" and about["parameters"] == 83 and about["dtype"] == "float64"
    assert about["layers"] == {"0.weight": 48, "0.bias": 8, "2.weight": 24, "2.bias": 3}
    assert (about["budget"], about["every"], about["instruments"]) == (0.1, 7, ["softmax_collapse"])
    assert "before clipping" in about["gradient_norms"] and about["versions"]["torch"] == torch.__version__


def trained(watched, model, x, y, steps=6):
    optimizer = torch.optim.SGD(model.parameters(), 0.03)
    with watched as watcher:
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return watcher.run


def test_what_the_budget_never_allowed_is_said(tiny, monkeypatch):
    model, x, y = tiny
    monkeypatch.setattr("diag.watching.measure.runner.SPARE", 0.0)
    run = trained(diag.watch(model, instruments=["sharpness"], budget=1e-9), model, x, y)
    ((step, skipped),) = run.outcomes
    assert (step, skipped.instrument) == (6, "sharpness")
    text = r"too short to earn the time .*budget: 0%.*; give a larger budget=, call watcher"
    assert re.search(text, skipped.reason)


def test_measuring_at_once_needs_no_budget(tiny, monkeypatch):
    model, x, y = tiny
    monkeypatch.setattr("diag.watching.measure.runner.SPARE", 0.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.03)
    with diag.watch(model, instruments=["softmax_collapse", "sharpness"], budget=1e-9) as watcher:
        for _ in range(6):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        watcher.measure("softmax_collapse")
        with pytest.raises(InvalidInput, match="does not measure 'neural_collapse'; did you mean softmax_collapse"):
            watcher.measure("neural_collapse")
    run = watcher.run
    assert [step for step, _ in run.series("softmax_collapse")] == [6]
    assert [skipped.instrument for _, skipped in run.outcomes] == ["sharpness"]


def test_the_first_estimate_comes_from_the_instrument_and_its_settings(tiny):
    """A spectrum of 20 products is planned to be cheaper than one of 80, an edge cheaper than both; what says
    nothing goes by the costs of its quantities."""
    model, x, y = tiny
    estimates = {}
    for steps in (20, 80):
        names = {"hessian_spectrum": {"steps": steps, "num_eigenvalues": 3}, "edge_of_stability": {}}
        names |= {"softmax_collapse": {}}
        with diag.watch(model, probe=(x, y), instruments=names, budget=1e-9) as watcher:
            optimizer = torch.optim.SGD(model.parameters(), 0.03)
            for _ in range(6):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            watcher._measurements.estimate(0.3, len(x), len(x), 1.0)
            estimates[steps] = {n: a.estimate for n, a in watcher._measurements.schedule.accounts.items()}
    forward = 0.1  # a third of the step
    passes = find("hessian_spectrum").expected_passes
    for steps, found in estimates.items():
        expected = passes({"steps": steps, "num_eigenvalues": 3}) * forward
        assert found["hessian_spectrum"] == pytest.approx(expected, rel=0.01)
        assert found["softmax_collapse"] == pytest.approx(forward, rel=0.05)
    assert (
        estimates[80]["edge_of_stability"] < estimates[20]["hessian_spectrum"] < estimates[80]["hessian_spectrum"]
    )
    assert passes({"num_probes": 3}) > 2 * passes({})


def test_every_instrument_on_curvature_says_what_it_takes():
    for one in diag.registry.instruments().values():
        if any(need.quantity.name in ("hessian", "gauss_newton") and not need.optional for need in one.needs):
            assert one.expected_passes({}) > 100, one.name


def test_a_snapshot_reads_the_record_once():
    """Fields and methods alike: reading a long record takes longer than a check does."""

    class Source:
        times = 0

        def history(self):
            self.times += 1
            return history_of({"layers": {"w": 3}}, numpy.zeros(4, row_dtype(row_columns(1))), [])

    source = Source()
    record = _LazyHistory(source.history)
    assert len(record) == 4 and record.layers == ("w",)
    assert len(record.rows(slice(0, 2))) == 2 and [len(part) for part in parts(record)] == [4]
    assert source.times == 1


def test_what_reads_the_record_waits_for_its_first_step(tiny, monkeypatch):
    """The numbers of a step may come a step or two later, from a device or from other ranks."""
    monkeypatch.setattr("diag.watching.observe.rows.RowQueue._finish_usual", lambda *args: False)
    monkeypatch.setattr("diag.watching.observe.rows._read_at_once", lambda numbers: None)
    monkeypatch.setattr("diag.watching.observe.rows.Readback.ready", lambda self: watcher.last_step > 2)
    model, x, y = tiny
    optimizer = torch.optim.SGD(model.parameters(), 0.03)
    with diag.watch(model, instruments=["initial_loss"]) as watcher:
        for _ in range(12):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    run = watcher.run
    (early,) = [outcome for step, outcome in run.outcomes if step == 1]
    assert early.instrument == "initial_loss" and "No step has been recorded yet" in early.reason
    assert run.series("initial_loss")[-1][0] == 12  # it was not given up
    assert not [outcome for _, outcome in run.outcomes if isinstance(outcome, Failed)]


def test_what_a_run_cannot_have_is_named_and_not_its_length(tiny):
    model, x, y = tiny
    optimizer = torch.optim.SGD(model.parameters(), 0.03)
    with diag.watch(model, budget=1e-6, probe=(x, y), instruments=["mode_connectivity", "sharpness"]) as watcher:
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    skipped = {outcome.instrument: outcome.reason for _, outcome in watcher.run.outcomes}
    assert "no second network" in skipped["mode_connectivity"]
    assert "no second network" not in skipped.get("sharpness", "")
