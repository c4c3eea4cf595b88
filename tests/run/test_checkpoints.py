"""A run made from checkpoints: what is measured on which, in what order, and what is said about it."""

import functools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from diag.errors import InvalidInput
from diag.registry import PRODUCT, instrument
from diag.result import Result, Verdict, measured
from diag.run.checkpoints import from_checkpoints

LABELS = torch.arange(8) % 4
DATA = nn.functional.one_hot(LABELS, 4).float(), LABELS
MARGINS = {10: 0.5, 20: 1.0, 30: 4.0, 40: 2.0, 50: 3.0}  # the loss log(1 + 3 exp(-m)) is the lowest at step 30


@dataclass(frozen=True, kw_only=True)
class Mean(Result):
    value: float = measured("the mean loss")

    def verdict(self) -> Verdict:
        return Verdict("ok", "It was measured.")


@instrument(source="a test")
def one_look(losses) -> Mean:
    """The mean loss, by one look."""
    return Mean(value=float(losses.mean()))


@instrument(source="a test", passes=lambda settings: 50 * PRODUCT)
def takes_long(losses) -> Mean:
    """The mean loss, by what is said to take long."""
    return Mean(value=float(losses.mean()))


@instrument(source="a test", kind="check", passes=lambda settings: 50 * PRODUCT)
def quick_check(losses) -> Mean:
    """A check, whatever it says of its passes."""
    return Mean(value=float(losses.mean()))


@instrument(source="a test", kind="description")
def described(losses) -> Mean:
    """What judges nothing."""
    return Mean(value=float(losses.mean()))


@instrument(source="a test", kind="check")
def of_the_steps(losses, history=None) -> Mean:
    """What asks for the steps that led here."""
    return Mean(value=float(losses.mean()))


@instrument(source="a test", kind="check")
def of_the_loop(loop) -> Mean:
    """What asks for the facts of a loop."""
    return Mean(value=0.0)


def build():
    return nn.Sequential(nn.Linear(4, 4, bias=False)), nn.functional.cross_entropy, DATA


def diverged():
    return build()[0], lambda outputs, targets: outputs.sum() * math.nan, DATA


@pytest.fixture
def paths(tmp_path, monkeypatch):
    known = {"one_look": one_look, "takes_long": takes_long}
    for name in ("checkpoints", "run"):
        monkeypatch.setattr(f"diag.run.{name}.instruments", lambda: known)
    monkeypatch.setattr("diag.run.checkpoints.find", known.__getitem__)
    for step, margin in MARGINS.items():
        torch.save({"0.weight": torch.eye(4) * margin}, tmp_path / f"step{step}.pt")
    return [tmp_path / f"step{step}.pt" for step in MARGINS]


def steps_of(run, name):
    return [step for step, _ in run.series(name)]


def test_what_takes_long_is_measured_on_the_first_the_last_and_the_best(paths):
    seen = []
    run = from_checkpoints(reversed(paths), build, progress=lambda *what: seen.append(what))
    assert steps_of(run, "one_look") == [10, 20, 30, 40, 50] and steps_of(run, "takes_long") == [10, 30, 50]
    for name in ("one_look", "takes_long"):
        for step, result in run.series(name):
            # float32 losses of order .1 to 1: 1e-6 is some ten roundings
            assert abs(result.value - math.log(1 + 3 * math.exp(-MARGINS[step]))) < 1e-6
    assert [r.instrument for r in run.records[:5]] == ["one_look"] * 5, "what comes at once comes first"
    assert [done for done, *_ in seen] == list(range(9)) and seen[-1][:2] == (8, 8)
    (told,) = run.events
    assert told.kind == "info" and "(steps 10, 30, 50); name one, or give every=True" in told.text


def test_the_best_is_judged_on_held_out_data_where_there_is_some(paths):
    """On labels that are moved on by one the loss is the lowest where the margin is the smallest."""
    run = from_checkpoints(paths, build, options={"held_out": (DATA[0], (LABELS + 1) % 4)})
    assert steps_of(run, "takes_long") == [10, 50]


def test_everywhere_where_that_is_asked_for(paths):
    assert steps_of(from_checkpoints(paths, build, every=True), "takes_long") == list(MARGINS)
    run = from_checkpoints(paths, build, names=["takes_long"])
    assert steps_of(run, "takes_long") == list(MARGINS) and not run.events
    assert steps_of(from_checkpoints(paths[:3], build), "takes_long") == [10, 20, 30]


def test_checks_are_everywhere_and_what_cannot_judge_a_moment_nowhere(paths, monkeypatch):
    known = {i.name: i for i in (one_look, takes_long, quick_check, described, of_the_steps, of_the_loop)}
    for name in ("checkpoints", "run"):
        monkeypatch.setattr(f"diag.run.{name}.instruments", lambda: known)
    run = from_checkpoints(paths, build)
    assert steps_of(run, "quick_check") == list(MARGINS) and steps_of(run, "takes_long") == [10, 30, 50]
    assert {r.instrument for r in run.records} == {"one_look", "quick_check", "takes_long"}


def test_progress_counts_every_measurement(paths):
    seen = []
    names = ["one_look", "takes_long"]
    from_checkpoints(paths, build, names=names, progress=lambda *what: seen.append(what[:2]))
    assert seen == [(done, 10) for done in range(11)]


def test_where_no_loss_is_finite_the_best_is_left_out(paths):
    run = from_checkpoints(paths, diverged)
    assert {r.step for r in run.records if r.instrument == "takes_long"} == {10, 50}


@pytest.mark.parametrize(
    ("paths_given", "build_given", "text"),
    [
        ([], build, "No checkpoint was given"),
        (["a.pt"], 3, "build is an int; expected a function, or its name"),
        (["a.pt"], lambda: {"model": 3}, "returned int as its model"),
        (["a.pt"], lambda: 3, "returned int; "),
        (["a.pt"], functools.partial(int), r"The build function functools.partial\(<class 'int'>\) returned int; "),
    ],
)
def test_a_wrong_call_is_told_in_one_sentence(paths_given, build_given, text):
    with pytest.raises(InvalidInput, match=text):
        from_checkpoints(paths_given, build_given)
