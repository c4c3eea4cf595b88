"""Reports of checkpoints: --build, --set, --instrument, and every way to get them wrong."""

import json
import math
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from diag.cli.settings import convert, read_settings
from diag.errors import InvalidInput
from diag.registry import instrument
from diag.result import Result, Verdict, measured
from diag.run.checkpoints import from_checkpoints

TASK = """
import torch
from torch import nn
import diag

def data():
    labels = torch.arange(40) % 4
    return nn.functional.one_hot(labels, 4).float(), labels

def build():
    return nn.Sequential(nn.Linear(4, 4, bias=False)), nn.functional.cross_entropy, data()

def as_dict():
    model, loss_fn, batch = build()
    return {"model": model, "loss_fn": loss_fn, "data": batch, "seed": 3}

def as_snapshot():
    return diag.Snapshot(*build(), max_examples=8)

def breaks():
    return {}["nothing"]

def bad_data():
    def batches():
        yield data()
        raise OSError("disk gone")
    model, loss_fn, _ = build()
    return model, loss_fn, batches()

def no_data():
    model, loss_fn, _ = build()
    return model, loss_fn, 3

def gives_a_number():
    return 3

def gives_no_model():
    return {"model": 3}

def gives_a_typo():
    return {"model": build()[0], "dat": data()}
"""


@pytest.fixture
def task(tmp_path, monkeypatch):
    """task.py in the current folder, and three checkpoints whose margins grow: 1, 1000 and 2000."""
    (tmp_path / "task.py").write_text(textwrap.dedent(TASK))
    for step, margin in {0: 1.0, 100: 1000.0, 200: 2000.0}.items():
        torch.save({"model": {"0.weight": torch.eye(4) * margin}, "step": step}, tmp_path / f"net_{step}.pt")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "task", raising=False)  # another test's
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if "task" in name:
            del sys.modules[name]


@pytest.mark.parametrize("build", ["task:build", "task.py:build", "task.py:as_dict", "task.py:as_snapshot"])
def test_each_checkpoint_becomes_a_step(build, task, run_diag):
    arguments = ["net_200.pt", "net_0.pt", "net_100.pt", "--build", build, "--instrument", "softmax_collapse"]
    result = run_diag("report", *arguments)
    assert result.exit_code == 0, result.output
    assert "description  Softmax collapse" in result.stdout and "steps 0–200" in result.stdout
    assert "first seen at step 100" in " ".join(result.stdout.split())
    assert "Sequential" in (task / "report.html").read_text()


def test_all_instruments_and_what_was_skipped(task, run_diag):
    result = run_diag("report", "net_0.pt", "net_100.pt", "--build", "task:build")
    assert result.exit_code == 0 and "Softmax collapse" in result.stdout and "skipped" in result.stdout
    assert "Gradient flow" not in result.stdout, "it needs the steps of a watched run"


def test_the_run_in_memory(task, monkeypatch):
    monkeypatch.chdir(task)
    seen = []
    run = from_checkpoints(
        [task / "net_100.pt", task / "net_0.pt"],
        "task.py:as_dict",
        names=["softmax_collapse"],
        settings={"softmax_collapse": {"alarm_at": 0.25}},
        options={"max_examples": 12},
        progress=lambda *what: seen.append(what),
    )
    (first, calm), (second, collapsed) = run.series("softmax_collapse")
    assert (first, second, calm.collapsed, collapsed.collapsed) == (0, 100, 0.0, 1.0) and not run.events
    assert collapsed.provenance.settings["alarm_at"] == 0.25
    assert collapsed.provenance.num_examples == 12 and collapsed.provenance.seed == 3
    assert calm.provenance.data_fingerprint == collapsed.provenance.data_fingerprint
    assert run.metadata["parameters"] == 16 and [c["step"] for c in run.metadata["checkpoints"]] == [0, 100]
    assert [done for done, _, _ in seen] == [0, 1, 2] and len(run.costs) == 2


def test_each_checkpoint_has_the_one_before_as_its_previous(task, monkeypatch):
    """The loss of an identity of margin m on one-hot inputs is log(1 + 3 exp(-m)), at this and at the last step."""

    @dataclass(frozen=True, kw_only=True)
    class Change(Result):
        before: float = measured("mean loss at the checkpoint before")
        now: float = measured("mean loss")

        def verdict(self) -> Verdict:
            return Verdict("ok", "It changed.")

    @instrument(source="a test")
    def change(losses, previous_losses) -> Change:
        """How the loss changed."""
        return Change(before=float(previous_losses.mean()), now=float(losses.mean()))

    monkeypatch.chdir(task)
    monkeypatch.setattr("diag.run.checkpoints.find", lambda name: change)
    monkeypatch.setattr("diag.run.run.instruments", lambda: {"change": change})
    for step, margin in {1: 1.0, 2: 2.0, 3: 3.0}.items():
        torch.save({"0.weight": torch.eye(4) * margin}, task / f"small_{step}.pt")
    run = from_checkpoints([task / f"small_{step}.pt" for step in (1, 2, 3)], "task.py:build", names=["change"])
    loss = {m: math.log(1 + 3 * math.exp(-m)) for m in (1, 2, 3)}
    assert [step for step, _ in run.series("change")] == [2, 3] and [step for step, _ in run.outcomes] == [1]
    for step, result in run.series("change"):
        # float32 losses of order 0.1 to 1, so 1e-6 is some ten roundings
        assert abs(result.now - loss[step]) < 1e-6 and abs(result.before - loss[step - 1]) < 1e-6


def test_checkpoints_that_do_not_tell_their_step_are_numbered(task, run_diag):
    for name in ("first", "second"):
        torch.save({"0.weight": torch.eye(4)}, task / f"{name}.pt")
    result = run_diag(
        "report", "first.pt", "second.pt", "--build", "task:build", "--instrument", "softmax_collapse"
    )
    assert "The checkpoints do not all tell their step, so they are numbered in the order given" in result.stderr
    assert "Softmax collapse" in result.stdout and '"last_step": 1' in Path("report.json").read_text()
    torch.save({"model": {"0.weight": torch.eye(4)}, "epoch": 7}, task / "third.pt")
    result = run_diag("report", "net_0.pt", "third.pt", "--build", "task:build", "--instrument", "softmax_collapse")
    assert "tell equal steps, or steps of different kinds" in result.stderr


def test_another_entry_of_the_checkpoint(task, run_diag):
    torch.save({"model": {"0.weight": torch.eye(4)}, "ema": {"0.weight": torch.eye(4) * 1000}}, task / "a.pt")
    arguments = ["report", "a.pt", "--build", "task:build", "--instrument", "softmax_collapse"]
    plain = run_diag(*arguments)
    assert "✔ ok" in plain.stdout and "It also holds ema" in plain.stderr
    assert "100 % of the examples (40 of 40)" in run_diag(*arguments, "--key", "ema").stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["net_0.pt", "--build", "task.py"],
            "The build task.py names no function; expected module:function or file.py",
        ),
        (["net_0.pt", "--build", "tusk:build"], "There is no module 'tusk' here"),
        (["net_0.pt", "--build", "a.b.c:build"], "There is no module 'a.b.c' here"),
        (["net_0.pt", "--build", "tusk.py:build"], "There is no file tusk.py"),
        (["net_0.pt", "--build", "task.py:bild"], "task.py has no function 'bild'; it has data, build, as_dict"),
        (["net_0.pt", "--build", "task:breaks"], "task:breaks raised KeyError at task.py, line 21: 'nothing'"),
        (
            ["net_0.pt", "--build", "task:bad_data"],
            "Reading the data raised OSError at task.py, line 26: disk gone",
        ),
        (["net_0.pt", "--build", "task:no_data"], "Error: The data is an int; expected a DataLoader"),
        (
            ["net_0.pt", "--build", "task:build", "--device", "abacus"],
            "The device 'abacus' cannot be used (Expected",
        ),
        (["net_0.pt", "--build", "bad.py:build"], "Importing bad.py raised ZeroDivisionError at bad.py, line 1"),
        (["net_0.pt", "--build", "syntax.py:build"], "Importing syntax.py raised SyntaxError"),
        (["net_0.pt", "--build", "task:gives_a_number"], "returned int; expected (model, loss_fn, data), a dict"),
        (["net_0.pt", "--build", "task:gives_no_model"], "returned int as its model; expected (model"),
        (["net_0.pt", "--build", "task:gives_a_typo"], "returned 'dat'; expected one of model, loss_fn, data"),
        (["nowhere.pt", "--build", "task:build"], "There is no checkpoint nowhere.pt"),
        (["run", "--build", "task:build"], "run is a run and not a checkpoint; leave build out"),
        (
            ["other.pt", "--build", "task:build"],
            "other.pt does not fit Sequential: 0.weight has shape (5, 4) in the",
        ),
        (["whole.pt", "--build", "task:build"], "whole.pt is a whole pickled model"),
        (["net_0.pt", "--build", "task:build", "--key", "ema"], "has no entry 'ema'; there are model and step"),
        (["net_0.pt", "--build", "task:build", "--instrument", "x"], "There is no instrument 'x'"),
        (["net_0.pt", "--build", "task:build", "--max-examples", "0"], "0 is not in the range x>=1"),
        (
            ["net_0.pt", "--build", "task:build", "--set", "a"],
            "--set a has another form; expected instrument.setting",
        ),
        (
            ["net_0.pt", "--build", "task:build", "--set", "softmax_collapse.alarm_at=x"],
            "softmax_collapse.alarm_at takes a number from 0 to 1 (its default is 0.5) and not 'x'",
        ),
        (
            ["net_0.pt", "--build", "task:build", "--set", "softmax_collapse.x=1"],
            "has no setting 'x'; it has alarm_at",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(arguments, text, task, run_diag, make_run):
    make_run("run", 1.0)
    torch.save({"0.weight": torch.ones(5, 4)}, task / "other.pt")
    torch.save(nn.Linear(2, 2), task / "whole.pt")
    (task / "bad.py").write_text("1 / 0\n")
    (task / "syntax.py").write_text("def build(:\n")
    result = run_diag("report", *arguments)
    assert result.exit_code == 2 and text in result.stderr, result.output
    assert "Traceback" not in result.stderr and result.stdout == "" and not (task / "report.html").exists()


def test_a_file_does_not_take_the_place_of_a_module_of_its_name(task, run_diag):
    (task / "json.py").write_text((task / "task.py").read_text())
    result = run_diag("report", "net_0.pt", "--build", "json.py:build", "--instrument", "softmax_collapse")
    assert result.exit_code == 0 and sys.modules["json"] is json
    sys.modules.pop("build_json")


# Settings


@pytest.mark.parametrize(
    ("text", "annotation", "default", "value"),
    [
        ("3", int, 1, 3),
        ("1e-3", float, 1.0, 0.001),
        ("yes", bool, False, True),
        ("False", bool, True, False),
        ("weights", str | None, None, "weights"),
        ("none", str | None, "x", None),
        ("7", int | None, None, 7),
        ("0.5", int | float, 1, 0.5),
        ("1,2, 3", tuple[int, ...], (), (1, 2, 3)),
        ("[0.5, 1]", list[float], [], [0.5, 1.0]),
        ("{'a': 1}", dict[str, int], {}, {"a": 1}),
        ("2.5", "Any", 1.0, 2.5),
    ],
)
def test_texts_become_values_of_the_settings_type(text, annotation, default, value):
    from typing import Any

    made = convert(text, Any if annotation == "Any" else annotation, default)
    assert made == value and type(made) is type(value)


@pytest.mark.parametrize(
    ("text", "annotation"),
    [("3.5", int), ("maybe", bool), ("x", float), ("x", int | None), ("1,x", tuple[int, ...])],
)
def test_texts_of_another_type_are_refused(text, annotation):
    with pytest.raises(ValueError):
        convert(text, annotation)


def test_choices_are_listed_where_one_is_wrong():
    from typing import Literal

    assert convert("b", Literal["a", "b"]) == "b"
    with pytest.raises(ValueError):
        convert("c", Literal["a", "b"])


def test_several_settings_come_together_by_instrument():
    found = read_settings(
        ["softmax_collapse.alarm_at=0.2", "softmax_collapse.near_nats = 1", "gradient_flow.depth_factor=9"]
    )
    assert found == {
        "softmax_collapse": {"alarm_at": 0.2, "near_nats": 1.0},
        "gradient_flow": {"depth_factor": 9.0},
    }
    with pytest.raises(
        InvalidInput, match="There is no instrument 'sofmax_collapse'; did you mean softmax_collapse"
    ):
        read_settings(["sofmax_collapse.alarm_at=1"])
