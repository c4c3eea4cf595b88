"""Damaged and hostile run folders: never a number that was not written without a word, never a bare traceback.

Whatever is done to the files, a run opens with a part of what was written and says that it is a part, or it is
refused with one sentence. Files that are whole by their checksums and hold nonsense are refused or told, too.
"""

import json
import random
import shutil
from dataclasses import dataclass

import numpy
import pytest

from diag.cli import tables
from diag.errors import RunError
from diag.registry import instrument
from diag.reporting import document, render
from diag.result import Provenance, Result, Skipped, Verdict, measured
from diag.run.files import metadata_text
from diag.run.reading import read_run
from diag.run.records import record_line
from diag.run.writer import RunWriter
from diag.snapshot.history import empty_history

LAYERS = {"body.weight": 600, "body.bias": 20, "head.weight": 40}
STEPS = 30
NUMBERS = ("loss", "learning_rate", "gradient_norm", "parameter_norm", "update_norm", "distance")
KINDS = ["result", "skipped", "failed", "event", "note", "cost", "resume", "optimizer", "new"]
ABOUT = [
    *(
        "name",
        "created",
        "model",
        "parameters",
        "device",
        "seed",
        "settings",
        "versions",
        "instruments",
        "sessions",
    ),
    *("closed", "budget", "every", "threads", "checkpoints", "build", "gradient_norms", "dtype", "new"),
]


@dataclass(frozen=True, kw_only=True)
class Profile(Result):
    mean: float = measured("the mean")
    values: object = measured("values", shape="(n,)")

    def verdict(self) -> Verdict:
        return Verdict("ok", f"The mean is {self.mean}.")

    def plot(self, ax):
        ax.plot(self.values)
        ax.set(xlabel="place", ylabel="value")


@instrument(source="a test")
def profile(labels) -> Profile:
    """A profile."""
    return Profile(mean=0.0, values=labels)


@dataclass(frozen=True, kw_only=True)
class Total(Result):
    total: float = measured("the sum of the losses")

    def verdict(self) -> Verdict:
        return Verdict("ok", f"The total is {self.total}.")


@instrument(source="a test")
def total(history) -> Total:
    """The sum of the losses."""
    return Total(total=float(history.loss.sum()))


@pytest.fixture(autouse=True)
def _two_instruments(monkeypatch):
    monkeypatch.setattr("diag.run.run.instruments", lambda: {"profile": profile, "total": total})


def rows(first, last):
    draw = numpy.random.default_rng(first)
    history = empty_history(LAYERS, last - first + 1)
    for name in NUMBERS:
        values = getattr(history, name)
        values[...] = draw.random(values.shape)
    history.steps[...] = numpy.arange(first, last + 1)
    return history


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of two sessions, with results, arrays, skips, events and costs."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    about = {"layers": LAYERS, "model": "Net", "parameters": 660, "settings": {"total": {}}, "versions": {"a": "1"}}
    for first, resume in ((1, False), (STEPS // 2 + 1, True)):
        with RunWriter(folder, about, resume=resume) as w:
            w.append_steps(rows(first, first + STEPS // 2 - 1))
            for step in range(first, first + STEPS // 2, 3):
                values = numpy.linspace(0, step, 80)
                result = Profile(mean=float(step), values=values, provenance=Provenance("profile"))
                w.append_outcome(step, result, 0.5)
                w.append_event(step, "kind", f"event at {step}")
                w.append_cost(step, wall_seconds=2.0, watch_seconds=0.5)
            w.append_outcome(first, Skipped("other", f"nothing at {first}"))
            w.append_optimizer({"kind": "SGD", "lr": 1.0 / first})
    return folder


def truth_of(run):
    """What a run says, each piece by a name, so that two runs can be compared piece by piece."""
    said = {("metadata", name): value for name, value in run.metadata.items()}
    if run.history is not None:
        for name in (*NUMBERS, "skipped"):
            for step, value in zip(run.history.steps.tolist(), getattr(run.history, name), strict=True):
                said[name, step] = numpy.asarray(value).tobytes()
        said["history", "layers"] = (run.history.layers, run.history.sizes)
        said["history", "optimizer"] = str(run.history.optimizer)
    for step, result in run.series("profile"):
        said["profile", step] = (result.mean, result.values.tobytes())
    for step, outcome in run.outcomes:
        said["outcome", outcome.instrument, step] = outcome.reason
    for number, event in enumerate(e for e in run.events if e.kind != "damaged"):
        said["event", event.step, event.kind, event.text, number] = True
    said["costs",] = [tuple(c) for c in run.times]
    return said


def told(run):
    """Whether the run says that something of it is damaged, torn or missing."""
    failed = any(type(o).__name__ == "Failed" for _, o in run.outcomes)
    return run.torn > 0 or failed or any(e.kind == "damaged" for e in run.events)


def damage(draw, data, other):
    """One of many ways in which bytes are changed, moved, lost or put in."""
    at, size = draw.randrange(len(data) + 1), draw.choice([1, 2, 4, 7, 64, len(data) // 3])
    to = draw.randrange(len(data) + 1)
    span = data[at : at + size]
    flipped = bytes(b ^ (1 << draw.randrange(8)) for b in span[:1])
    ways = [
        lambda: data[:at] + flipped + data[at + 1 :],
        lambda: data[:at] + bytes(len(span)) + data[at + size :],
        lambda: data[:at] + draw.randbytes(len(span)) + data[at + size :],
        lambda: data[:at],
        lambda: data[at:],
        lambda: data[:at] + data[at + size :],
        lambda: data[:at] + draw.randbytes(size) + data[at:],
        lambda: data[:at] + span + data[at:],
        lambda: data[:to] + span + data[to:],
        lambda: data + draw.randbytes(size),
        lambda: data + data[-size:],
        lambda: other,
        lambda: b"",
        lambda: data[: len(data) // 2] + data[: len(data) // 2],
        lambda: bytes(len(data)),
    ]
    return draw.choice(ways)()


def broken_copy(whole, folder, draw):
    """A copy of the run in which one or two files were damaged, exchanged or removed."""
    shutil.copytree(whole, folder)
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != "writer.lock")
    named = [f for f in files if f.parent == folder]
    for _ in range(draw.choice([1, 1, 2])):
        file, other = (draw.choice(named if draw.random() < 0.75 else files) for _ in range(2))
        if not file.exists():
            continue
        if draw.random() < 0.08:
            file.unlink()
        elif draw.random() < 0.05:
            shutil.rmtree(folder / "arrays", ignore_errors=True)
        else:
            file.write_bytes(damage(draw, file.read_bytes(), other.read_bytes() if other.exists() else b""))


def look_at(run):
    """Everything that people call."""
    run.findings(), run.facts(), run.costs, run.to_frame(), repr(run), run._repr_html_()
    screen = tables.console()
    with screen.capture():
        screen.print(tables.run_page(run), tables.series(run, "profile"))


def judge(folder, truth, draw, page=0.0):
    """Returns "refused", "told" or "whole"; fails where something differs in silence."""
    try:
        run = read_run(folder)
    except RunError as error:
        assert str(error).rstrip().endswith((".", ")")) and "Traceback" not in str(error)
        return "refused"
    said = truth_of(run)
    differs = [name for name, value in said.items() if name[0] != "event" and truth.get(name) != value]
    lost = [name for name in truth if name not in said]
    if differs or lost:
        assert told(run), f"in silence: {(differs + lost)[:4]}"
    # What is there is what was written, whatever else was lost; a description that was changed is told apart.
    numbers = [n for n in differs if n[0] not in ("metadata", "outcome", "costs")]
    kept = [n for n in numbers if n != ("history", "optimizer")]
    assert not kept, kept[:4]
    look_at(run)
    if draw.random() < page:
        render(document(run))
    return "told" if told(run) else "whole"


def fuzz(whole, tmp_path, number, page):
    truth, found = truth_of(read_run(whole)), []
    for seed in range(number):
        draw = random.Random(seed)
        broken_copy(whole, tmp_path / "run", draw)
        found.append(judge(tmp_path / "run", truth, draw, page))
        shutil.rmtree(tmp_path / "run")
    return {kind: found.count(kind) for kind in ("refused", "told", "whole")}


def test_some_damaged_folders(whole, tmp_path):
    found = fuzz(whole, tmp_path, 60, 0.05)
    assert found["told"] > 20 and found["whole"] < 15  # a byte between two blanks of run.json changes nothing


@pytest.mark.slow
def test_six_hundred_damaged_folders(whole, tmp_path):
    found = fuzz(whole, tmp_path, 600, 0.1)
    assert found["told"] > 200 and found["whole"] < 60, found


# Files that are whole by their checksums and hold what diag never writes


HOSTILE = [
    None, True, -1, 0, 1 << 50, 1 << 200, 1e308, "x" * 10_000, "\x1b[2J\x1b]0;x\x07", "[bold]", "[/]", [], {}, [[]],
    {"__float__": "nan"}, {"__float__": "x"}, {"__array__": [1], "dtype": "S1000000000", "shape": [1]},
    {"__array__": [1], "dtype": "O", "shape": [1 << 50]}, {"__array__": "../run.json"}, {"a": {"b": [None]}},
    json.loads("[" * 500 + "]" * 500),
]  # fmt: skip


PAGES = {3, 8}  # of these values a page is made, too
QUICK_AND_SLOW = ["some", pytest.param("all", marks=pytest.mark.slow)]


def chosen(numbers, name):
    """The places of the values to be tried: all, or every fifth, starting elsewhere for each name."""
    return range(0 if numbers == "all" else len(name) % 5, len(HOSTILE), 1 if numbers == "all" else 5)


@pytest.mark.parametrize("name", ABOUT)
@pytest.mark.parametrize("numbers", QUICK_AND_SLOW)
def test_run_json_with_any_value_is_told_or_refused(numbers, name, whole, tmp_path):
    about = json.loads((whole / "run.json").read_text())
    shutil.copytree(whole, tmp_path / "run")
    for number in chosen(numbers, name):
        value = HOSTILE[number]
        for inside in (value, {"total": value}, [value]):
            (tmp_path / "run" / "run.json").write_text(metadata_text(about | {name: inside}))
            try:
                run = read_run(tmp_path / "run")
            except RunError:
                continue
            look_at(run)
            if number in PAGES:
                render(document(run))


@pytest.mark.parametrize("name", ["row", "layers", "format_version", "seal", "check"])
def test_a_structure_of_any_kind_is_refused(name, whole, tmp_path):
    about = json.loads((whole / "run.json").read_text())
    shutil.copytree(whole, tmp_path / "run")
    first, *others = about["row"]
    for value in HOSTILE:
        columns = [[*first[:2], value], [value, *first[1:]], [first[0], value, []], value, [first[0], "|O", []]]
        rows = [[c, *others] for c in columns] if name == "row" else []
        for inside in (value, [value], [[value, value, value]], *rows):
            changed = about | {name: inside}
            text = json.dumps(changed) if name == "check" else metadata_text(changed)
            (tmp_path / "run" / "run.json").write_text(text)
            try:
                run = read_run(tmp_path / "run")
            except RunError:
                continue
            assert told(run) or inside == about[name], (name, inside)


def test_text_that_is_no_number_and_very_deep_json_are_refused(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    text = (whole / "run.json").read_text()
    for broken in (
        text.replace('"format_version": 3', '"format_version": 1e400'),
        text.replace('"parameters": 660', '"parameters": 1e400'),
        text.replace('"parameters": 660', '"parameters": NaN'),
        text.replace('"parameters": 660', '"parameters": ' + "9" * 5000),
        text.replace('"parameters": 660', '"parameters": ' + "[" * 100_000),
        text.replace('"model"', '"\\ud800"'),
        text.replace('"Net"', '"\\udfff\\u0000"'),
    ):
        assert broken != text
        (tmp_path / "run" / "run.json").write_text(broken)
        try:
            run = read_run(tmp_path / "run")
        except RunError:
            continue
        assert told(run)
        look_at(run)
        render(document(run))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("numbers", QUICK_AND_SLOW)
def test_lines_with_any_value_are_left_out_or_told(numbers, kind, whole, tmp_path):
    base = {
        "type": kind,
        "step": 3,
        "instrument": "profile",
        "seconds": 0.5,
        "data": {"reason": "x", "mean": 1.0, "values": [1.0, 2.0]},
        "kind": "kind",
        "text": "text",
        "rows": 2,
        "wall_seconds": 1.0,
    }
    shutil.copytree(whole, tmp_path / "run")
    file = tmp_path / "run" / "records.jsonl"
    seal = json.loads((whole / "run.json").read_text())["seal"]
    for number in chosen(numbers, kind):
        value = HOSTILE[number]
        inside = ("reason", "mean", "values", "provenance", "notes")
        lines = [base | {name: value} for name in base] + [base | {"data": {key: value}} for key in inside]
        for some in (lines[:4], lines[4:9], lines[9:]):
            file.write_bytes(b"".join(record_line(line, at, seal) for at, line in enumerate(some)))
            look_at(read_run(tmp_path / "run"))
    render(document(read_run(tmp_path / "run")))
