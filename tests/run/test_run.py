"""A run as data: what it gives back, how it judges itself, what it makes of damage and of strangers."""

import dataclasses
import hashlib
import itertools
import json
import math
import shutil
import sys
from dataclasses import dataclass

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import diag
from diag.errors import MissingData, RunError
from diag.registry import instrument
from diag.result import Failed, Level, Provenance, Result, Skipped, Verdict, measured
from diag.run import rows
from diag.run.entries import Cost, Event, Record
from diag.run.files import checksum
from diag.run.folder import is_being_written
from diag.run.reading import read_run
from diag.run.records import kept_records, outcome_data, record_line
from diag.run.run import Run
from diag.run.writer import RunWriter
from diag.snapshot.history import empty_history

LAYERS = {"a.weight": 6, "a.bias": 2}


@dataclass(frozen=True, kw_only=True)
class Height(Result):
    height: float = measured("the height", unit="m")
    profile: object = measured("the heights along the way", shape="(n,)", default=())

    def verdict(self) -> Verdict:
        return Verdict(Level.ALARM if self.height > 1 else Level.OK, f"The height is {self.height}.")

    def plot(self, ax):
        ax.plot(self.profile)


@instrument(source="a ruler")
def height(labels, *, alarm_at: float = 1.0) -> Height:
    """How high it is."""
    return Height(height=float(labels.max()))


@dataclass(frozen=True, kw_only=True)
class Count(Result):
    rows: int = measured("recorded steps")
    times: int = measured("a setting", default=1)

    def verdict(self) -> Verdict:
        return Verdict(Level.WARNING, f"There are {self.rows} rows.")


@instrument(source="a counter")
def count(history, *, times: int = 1) -> Count:
    """How many steps were recorded."""
    return Count(rows=len(history), times=times)


@pytest.fixture(autouse=True)
def _two_instruments(monkeypatch):
    monkeypatch.setattr("diag.run.run.instruments", lambda: {"height": height, "count": count})


def height_of(value, **more):
    return Height(height=value, provenance=Provenance("height"), **more)


def steps(first, last, layers=LAYERS, **columns):
    rows = empty_history(layers, last - first + 1)
    return dataclasses.replace(rows, steps=numpy.arange(first, last + 1), total_steps=last, **columns)


def writer(tmp_path, **more):
    return RunWriter(tmp_path / "run", {"layers": LAYERS, "model": "Net", "parameters": 8, **more})


def seal_of(folder):
    return json.loads((folder / "run.json").read_text())["seal"]


def append_lines(folder, *lines):
    with open(folder / "records.jsonl", "ab") as file:
        file.write(b"".join(lines))


def test_everything_comes_back(tmp_path):
    loss = numpy.array([3.0, math.nan, math.inf])
    rows = steps(1, 3, loss=loss, notes=("no loss at step 2",), optimizer={"kind": "SGD", "lr": 0.1})
    profile = numpy.linspace(0, 1, 1000)
    with writer(tmp_path, seed=3, versions={"torch": "2.13.0"}) as w:
        w.append_steps(rows)
        w.append_outcome(2, height_of(0.5, profile=profile), 0.25)
        w.append_outcome(2, Skipped("other", "no data"), None)
        w.append_outcome(3, Failed("height", "broke", "Traceback ..."))
        w.append_event(3, "exception", "training stopped: KeyboardInterrupt")
        w.append_cost(3, wall_seconds=10.0, watch_seconds=0.2)
    run = read_run(tmp_path / "run")
    assert run.metadata["model"] == "Net" and run.metadata["format_version"] == 3 and run.metadata["created"]
    for field in dataclasses.fields(rows):
        numpy.testing.assert_array_equal(getattr(run.history, field.name), getattr(rows, field.name))
    assert isinstance(run.history.gradient_norm.base, numpy.memmap)
    [(step, result)] = run.series("height")
    assert step == 2 and result == height_of(0.5, profile=profile)
    assert run.outcomes == ((2, Skipped("other", "no data")), (3, Failed("height", "broke", "Traceback ...")))
    assert Event(3, "exception", "training stopped: KeyboardInterrupt") in run.events
    assert run.costs == [Cost(2, "height", 0.25), Cost(3, "", 0.0, 10.0, 0.2)]
    assert (run.wall_seconds, run.watch_seconds, run.torn, run.last_step) == (10.0, 0.2, 0, 3)


def test_large_arrays_lie_beside_and_equal_ones_once(tmp_path):
    with writer(tmp_path) as w:
        for step in (1, 2):
            w.append_outcome(step, height_of(0.5, profile=numpy.arange(1000.0)))
        w.append_outcome(3, height_of(0.5, profile=numpy.arange(10.0)))
    assert len(list((tmp_path / "run" / "arrays").iterdir())) == 1
    assert (tmp_path / "run" / "records.jsonl").stat().st_size < 3000
    assert len(read_run(tmp_path / "run").series("height")[1][1].profile) == 1000


numbers = st.floats(allow_nan=True, allow_infinity=True, width=64)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.integers(1, 10**9), numbers), max_size=8),
    st.lists(st.tuples(st.integers(0, 100), st.text(max_size=20), st.text(min_size=1, max_size=40)), max_size=5),
    st.dictionaries(st.text(min_size=1, max_size=8), st.integers(0, 10**12), max_size=4),
)
def test_any_run_comes_back(tmp_path_factory, results, events, layers):
    folder = tmp_path_factory.mktemp("any") / "run"
    rows = steps(1, 5, layers)
    with RunWriter(folder, {"layers": layers}) as w:
        w.append_steps(rows)
        for step, value in results:
            w.append_outcome(step, height_of(value))
        for step, kind, text in events:
            w.append_event(step, kind, text)
    run = read_run(folder)
    assert run.torn == 0 and list(run.events) == [Event(*e) for e in events]
    assert run.history.layers == tuple(layers) and run.history.sizes == tuple(layers.values())
    numpy.testing.assert_array_equal(run.history.distance, rows.distance)
    expected = sorted({step: height_of(value) for step, value in results}.items())
    assert run.series("height") == expected


def test_findings_have_the_worst_first_then_the_earliest(tmp_path):
    with writer(tmp_path) as w:
        w.append_steps(steps(3, 9))
        w.append_outcome(5, height_of(0.5))
        w.append_outcome(8, height_of(2.0))
    run = read_run(tmp_path / "run")
    alarm, warning = run.findings()
    assert (alarm.instrument, alarm.title, alarm.source) == ("height", "Height", "a ruler")
    assert alarm.verdict.sentence == "The height is 2.0." and (alarm.first_step, alarm.last_step) == (5, 8)
    assert warning.verdict.sentence == "There are 7 rows." and (warning.first_step, warning.last_step) == (3, 9)
    assert run.instruments == ("count", "height")


def test_settings_and_choice_of_history_instruments_come_from_the_metadata(tmp_path):
    with writer(tmp_path, settings={"count": {"times": 4, "gone": 1}}) as w:
        w.append_steps(steps(1, 2))
    assert read_run(tmp_path / "run").series("count")[0][1].times == 4
    with writer(tmp_path, instruments=["height"]) as w:
        w.append_steps(steps(1, 2))
    assert read_run(tmp_path / "run").instruments == ()


def test_a_verdict_that_breaks_is_a_failure_and_not_an_exception(monkeypatch):
    monkeypatch.setattr(Height, "verdict", lambda self: 1 / 0)
    run = Run(records=[Record(4, "height", height_of(1.0))])
    assert run.findings() == []
    [(step, failed)] = run.outcomes
    assert step == 4 and failed.reason == "Its verdict failed: ZeroDivisionError: division by zero"


def test_an_instrument_of_the_history_that_breaks_is_a_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(count, "function", lambda history, times: 1 / 0)
    run = Run(history=steps(1, 4))
    [(step, failed)] = run.outcomes
    assert step == 4 and "ZeroDivisionError" in failed.reason and run.findings() == []


def test_a_run_in_memory_needs_no_folder():
    run = Run(records=[Record(1, "height", height_of(0.5), 0.1), Record(0, "height", Skipped("height", "no data"))])
    assert run.series("height") == [(1, height_of(0.5))] and run.findings()[0].verdict.level == Level.OK
    assert run.outcomes == ((0, Skipped("height", "no data")),) and run.costs == [Cost(1, "height", 0.1)]
    assert run.history is None and run.last_step == 1


def test_an_unknown_instrument_is_raw_and_listed(tmp_path, monkeypatch):
    with writer(tmp_path) as w:
        w.append_outcome(1, height_of(0.5, profile=numpy.arange(100.0)))
    monkeypatch.setattr("diag.run.run.instruments", dict)
    run = read_run(tmp_path / "run")
    assert run.unknown_instruments == ("height",) and run.findings() == [] and run.outcomes == ()
    [(step, raw)] = run.series("height")
    assert step == 1 and raw["height"] == 0.5 and raw["profile"].shape == (100,)
    assert "height" in run.facts()["not installed here"]


def test_a_result_that_cannot_be_rebuilt_is_a_failure_with_its_reason(tmp_path):
    with writer(tmp_path) as w:
        w.append_outcome(1, height_of(0.5, profile=numpy.arange(100.0)))
        w.append_outcome(2, height_of(0.7))
    next((tmp_path / "run" / "arrays").iterdir()).unlink()
    run = read_run(tmp_path / "run")
    assert [step for step, _ in run.series("height")] == [2]
    [(step, failed)] = run.outcomes
    assert step == 1 and "cannot be read" in failed.reason and "No such file" in failed.reason


def test_an_array_outside_the_run_or_pickled_is_not_read(tmp_path):
    numpy.save(tmp_path / "secret.npy", numpy.arange(3))
    with writer(tmp_path) as w:
        w.append_outcome(1, height_of(0.5))
    evil = {
        "type": "result",
        "step": 2,
        "instrument": "height",
        "data": {"height": {"__array__": "../../secret.npy"}},
    }
    numpy.save(tmp_path / "objects.npy", numpy.array([print], dtype=object), allow_pickle=True)
    data = (tmp_path / "objects.npy").read_bytes()
    name = hashlib.blake2b(data, digest_size=12).hexdigest() + ".npy"
    (tmp_path / "run" / "arrays").mkdir()
    (tmp_path / "run" / "arrays" / name).write_bytes(data)
    worse = evil | {"step": 3, "data": {"height": {"__array__": name}}}
    seal = seal_of(tmp_path / "run")
    append_lines(tmp_path / "run", record_line(evil, 1, seal), record_line(worse, 2, seal))
    reasons = [failed.reason for _, failed in read_run(tmp_path / "run").outcomes]
    assert len(reasons) == 2 and "not a plain file name" in reasons[0] and "Python objects" in reasons[1]


@pytest.mark.parametrize(
    "torn", [b'{"type":"ev', b"\x00\x00\x00", b'{"type":"event","step":9,"kind":"k","text":"t"}']
)
def test_a_torn_last_line_is_dropped_and_counted(tmp_path, torn):
    with writer(tmp_path) as w:
        w.append_event(1, "kind", "text")
    with open(tmp_path / "run" / "records.jsonl", "ab") as file:
        file.write(torn)
    run = read_run(tmp_path / "run")
    assert list(run.events) == [Event(1, "kind", "text")] and run.torn == 1
    assert run.facts()["torn records dropped"] == "1"


@pytest.mark.parametrize(
    "bad",
    [
        b"{]",
        b"\xff\xfe",
        b"[1, 2]",
        b'{"type":"event","kind":"no step","text":""}',
        b'{"type":"event","step":2,"kind":"no checksum","text":""}',
        b"7",
        {"type": "event", "kind": "no step", "text": ""},
        {"type": "event", "step": -1, "kind": "before the first", "text": ""},
        {"type": "event", "step": 1 << 80, "kind": "too late", "text": ""},
        {"type": "event", "step": 2, "kind": "no text"},
        {"type": "event", "step": 2, "kind": ["no", "kind"], "text": ""},
        {"type": "result", "step": 1},
        {"type": "result", "step": 1, "instrument": 3, "data": {}},
        {"type": "resume", "step": 1, "rows": "all"},
        {"type": "cost", "step": 1, "seconds": "long"},
        {"type": ["event"], "step": 1},
        b'{"crc":"00000000","n":1,' + b'"a":' + b"[" * 100_000,
    ],
)
def test_a_bad_line_in_the_middle_is_counted_and_not_fatal(tmp_path, bad):
    with writer(tmp_path) as w:
        w.append_event(1, "kind", "before")
    after = {"type": "event", "step": 2, "kind": "kind", "text": "after"}
    seal = seal_of(tmp_path / "run")
    bad = bad if isinstance(bad, bytes) else record_line(bad, 1, seal)[:-1]
    append_lines(tmp_path / "run", bad + b"\n", record_line(after, 2, seal))
    run = read_run(tmp_path / "run")
    told = "1 line of records.jsonl is damaged or gone, and left out."
    assert [e.text for e in run.events] == ["before", "after", told] and run.torn == 0
    assert run.events[-1].kind == "damaged" and run.facts() and run.costs == []


def test_lines_that_are_gone_moved_or_there_twice_are_told(tmp_path):
    with writer(tmp_path) as w:
        for step in range(5):
            w.append_event(step, "kind", f"event {step}")
    file = tmp_path / "run" / "records.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    told = "{} of records.jsonl {} damaged or gone, and left out."
    for changed, kept, sentence in (
        (lines[:1] + lines[2:], "0234", told.format("1 line", "is")),
        (lines[2:], "234", told.format("2 lines", "are")),
        (lines[:2] + lines[1:], "01234", told.format("1 line", "is")),
        ([lines[i] for i in (0, 2, 1, 3, 4)], "0234", told.format("1 line", "is")),
        (lines[:3], "012", "The last 2 lines of records.jsonl were cut off; restore it from a copy."),
    ):
        file.write_bytes(b"".join(changed))
        *events, damage = read_run(tmp_path / "run").events
        assert [e.text for e in events] == [f"event {step}" for step in kept] and damage.text == sentence


def test_a_torn_last_row_is_dropped_and_counted(tmp_path):
    with writer(tmp_path) as w:
        w.append_steps(steps(1, 3))
    file = tmp_path / "run" / "steps.bin"
    file.write_bytes(file.read_bytes()[:-1])
    run = read_run(tmp_path / "run")
    assert run.history.steps.tolist() == [1, 2] and run.torn == 1
    file.write_bytes(file.read_bytes()[:5])
    run = read_run(tmp_path / "run")
    assert run.history is None and run.torn == 1


def test_wherever_the_files_are_cut_what_was_whole_is_there(tmp_path):
    with writer(tmp_path) as w:
        w.append_steps(steps(1, 4))
        for step in range(4):
            w.append_event(step, "kind", f"event {step}: ünïcode {{}} []")
    for name in ("records.jsonl", "steps.bin"):
        file = tmp_path / "run" / name
        unit = {"records.jsonl": "line", "steps.bin": "row"}[name]
        whole = file.read_bytes()
        ends = [i + 1 for i in range(len(whole)) if whole[i] == 10] if name == "records.jsonl" else None
        row = len(whole) // 4
        for cut in {*range(0, len(whole) + 1, 3), *(ends or ()), row + 1, len(whole)}:
            file.write_bytes(whole[:cut])
            run = read_run(tmp_path / "run")
            found = len([e for e in run.events if e.kind != "damaged"]) if ends else len(run.history or ())
            assert found == (sum(end <= cut for end in ends) if ends else cut // row)
            assert run.torn == (cut not in {0, *ends} if ends else cut % row > 0)
            lost = f"{4 - found} {unit}" + "s" * (found < 3)
            told = [f"The last {lost} of {name} were cut off; restore it from a copy."] if found < 4 else []
            assert [e.text for e in run.events if e.kind == "damaged"] == told
        file.write_bytes(whole)


def test_one_changed_byte_anywhere_in_a_line_never_gives_another_record(tmp_path):
    with writer(tmp_path) as w:
        w.append_outcome(1, height_of(0.5))
        w.append_event(2, "kind", "text")
    file = tmp_path / "run" / "records.jsonl"
    whole = file.read_bytes()
    for place in range(0, len(whole), 2):
        if whole[place : place + 1] == b"\n":
            continue
        for flip in (1, 128):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
            run = read_run(tmp_path / "run")
            assert len(run.events) + len(run.records) == 2 and run.outcomes == ()
            assert all(item == (1, height_of(0.5)) for item in run.series("height"))
            *events, damage = run.events
            assert damage.kind == "damaged" and all(event == Event(2, "kind", "text") for event in events)


def test_instruments_with_any_name(tmp_path):
    with writer(tmp_path) as w:
        for name in ('a"b', "ü", "back\\slash", "plain"):
            w.append_outcome(1, Skipped(name, "no data"), 1e-7)
    run = read_run(tmp_path / "run")
    assert [o.instrument for _, o in run.outcomes] == ['a"b', "ü", "back\\slash", "plain"] and run.torn == 0
    assert [c.seconds for c in run.costs] == [1e-7] * 4


def test_rows_of_zeros_after_a_power_cut_are_dropped_and_counted(tmp_path):
    with writer(tmp_path) as w:
        w.append_steps(steps(1, 3))
    file = tmp_path / "run" / "steps.bin"
    file.write_bytes(file.read_bytes() + bytes(file.stat().st_size // 3))
    run = read_run(tmp_path / "run")
    assert run.history.steps.tolist() == [1, 2, 3] and run.torn == 1


def test_what_is_no_run_is_refused_with_one_sentence(tmp_path):
    with pytest.raises(RunError, match=r"nowhere holds no run \(there is no such folder\); expected a folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"holds no run; expected a folder that diag.watch"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(RunError, match="was not written by diag"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"run\.json cannot be read"):
        read_run(tmp_path)
    for version in ("1", "2", "null", "[3]", '"3"'):
        (tmp_path / "run.json").write_text(f'{{"format": "diag-run", "format_version": {version}}}')
        with pytest.raises(RunError, match=r"has run format .*, which is older, and this diag reads"):
            read_run(tmp_path)
    (tmp_path / "run.json").write_text('{"format": "diag-run", "format_version": 3}')
    with pytest.raises(RunError, match=r"run\.json is damaged"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text('{"a":' + "[" * 100_000)
    with pytest.raises(RunError, match=r"run\.json cannot be read"):
        read_run(tmp_path)


def test_a_run_whose_files_cannot_be_read(tmp_path):
    writer(tmp_path).close()
    (tmp_path / "run" / "records.jsonl").unlink()
    (tmp_path / "run" / "records.jsonl").mkdir()
    with pytest.raises(RunError, match=r"run cannot be read \(Is a directory: .*records\.jsonl\)"):
        read_run(tmp_path / "run")


def test_a_newer_format_is_refused(tmp_path):
    writer(tmp_path).close()
    file = tmp_path / "run" / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 4}))
    with pytest.raises(RunError, match="has run format 4 and this diag reads format 3; install a newer diag"):
        read_run(tmp_path / "run")


def test_a_run_draws_itself_with_every_text_escaped(tmp_path):
    with writer(tmp_path, model="<script>alert(1)</script>") as w:
        w.append_steps(steps(1, 3, loss=numpy.array([2.0, 1.0, math.nan])))
        w.append_outcome(3, height_of(2.0), 1.0)
        w.append_cost(3, wall_seconds=10.0, watch_seconds=0.2)
    page = read_run(tmp_path / "run")._repr_html_()
    assert page.index("The height is 2.0") < page.index("There are 3 rows")
    assert "&lt;script&gt;" in page and "<script" not in page
    assert "10 s, of which diag 2 %" in page and ">1<" in page
    assert "Nothing was measured" in Run()._repr_html_()


def test_the_facts_of_a_run_are_for_reading():
    about = {"model": "TinyT+00:00", "parameters": 1234567, "created": "2026-01-02T03:04:05+00:00"}
    facts = Run(metadata=about).facts()
    assert facts["created"] == "2026-01-02 03:04:05 UTC" and facts["model"] == "TinyT+00:00"
    assert facts["parameters"] == "1,234,567" and facts["steps"] == "0"


def test_what_json_has_no_word_for_is_not_written():
    """A NaN in a record would make its whole line unreadable to others; `encode` comes first."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        record_line({"type": "event", "value": math.nan}, 0, 0)


@pytest.mark.parametrize("data", ["[]", '"text"', "3", "null"])
def test_the_data_of_an_outcome_are_a_dict(data):
    with pytest.raises(ValueError, match="its data are not a dict"):
        outcome_data(b'{"data": ' + data.encode() + b"}")


def test_a_table_without_pandas_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with RunWriter(tmp_path, {"layers": LAYERS}):
        pass
    with pytest.raises(MissingData, match="pandas is not installed: pip install pandas"):
        read_run(tmp_path).to_frame()


def test_to_frame_has_a_row_a_step(tmp_path):
    norms = numpy.array([[3, 4], [6, 8]], numpy.float32)
    run = Run(
        history=steps(1, 2, gradient_norm=norms, loss=numpy.array([2.0, 1.0])),
        records=[Record(2, "height", height_of(0.5)), Record(4, "height", height_of(0.25))],
    )
    frame = run.to_frame()
    assert frame.index.tolist() == [1, 2, 4] and frame.index.name == "step"
    assert frame["gradient_norm"].tolist()[:2] == [5.0, 10.0] and frame["loss"].tolist()[:2] == [2.0, 1.0]
    assert frame["height.height"].tolist()[1:] == [0.5, 0.25] and math.isnan(frame["height.height"][1])


def test_many_records_are_opened_without_building_their_results(tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(Height, "__post_init__", lambda self: built.append(1))
    result = height_of(0.5)
    with writer(tmp_path) as w:
        for _ in range(20_000):
            w.append_outcome(1, result)
        w.append_steps(steps(1, 20_000))
    built.clear()
    run = read_run(tmp_path / "run")
    assert len(run.records) == 20_000 and len(run.history) == 20_000 and not built
    assert len(diag.load(tmp_path / "run").records) == 20_000
    assert read_run(tmp_path / "run" / "run.json").last_step == run.last_step


def test_last_values_are_the_last_of_each_number(tmp_path):
    with writer(tmp_path) as w:
        w.append_steps(steps(1, 3, loss=numpy.array([3.0, 2.0, 1.0])))
        w.append_metrics(2, {"accuracy": 0.25})
        w.append_metrics(3, {"accuracy": 0.75})
        w.append_outcome(2, height_of(4.0))
        w.append_outcome(3, height_of(5.0))
    values = read_run(tmp_path / "run").last_values()
    assert values.items() >= {"loss": 1.0, "height.height": 5.0, "logged.accuracy": 0.75}.items()


def test_of_equal_steps_a_resumption_keeps_what_was_before_it():
    """A resumption from step 6 goes on after it: what was recorded at 6 stands, what came later does not."""
    before = [{"type": kind, "step": step} for kind in ("event", "cost") for step in (5, 6, 7)]
    resumed = {"type": "resume", "step": 6}
    kept = kept_records([*before, resumed])
    assert [(r["type"], r["step"]) for r in kept[:-1]] == [
        ("event", 5), ("event", 6), ("cost", 5), ("cost", 6), ("cost", 7)
    ]  # fmt: skip
    assert kept[-1] is resumed


def test_without_locks_a_run_is_being_written_until_it_is_closed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with writer(tmp_path):
        assert is_being_written(tmp_path / "run")
    assert not is_being_written(tmp_path / "run")


def test_a_checksum_is_of_strict_json():
    assert checksum({"a": 1, "b": [2]}) == checksum({"b": [2], "a": 1}) != checksum({"a": 1, "b": [3]})
    with pytest.raises(ValueError, match="not JSON compliant"):
        checksum({"a": math.nan})


def test_a_file_that_is_larger_than_any_result_is_refused_unread(tmp_path, monkeypatch):
    file = tmp_path / "result.json"
    height_of(1.0).save(file)
    monkeypatch.setattr("diag.run.saved.LARGEST_RESULT", file.stat().st_size)
    with pytest.raises(RunError, match="a result of 'height', which is not installed here"):
        diag.load(file)
    monkeypatch.setattr("diag.run.saved.LARGEST_RESULT", file.stat().st_size - 1)
    with pytest.raises(RunError, match=r"is larger than any result; expected a file that result\.save wrote"):
        diag.load(file)


def test_the_files_of_another_run_do_not_fit(tmp_path):
    """The same network and as many steps, so that nothing else tells the files apart."""
    for name in ("a", "b"):
        with RunWriter(tmp_path / name, {"layers": LAYERS}) as w:
            w.append_steps(steps(1, 3, loss=numpy.array([2.0, 1.0, 0.5])))
            w.append_event(3, "kind", f"of {name}")
    for file in ("steps.bin", "records.jsonl"):
        shutil.copytree(tmp_path / "a", tmp_path / file)
        shutil.copy(tmp_path / "b" / file, tmp_path / file / file)
        run = read_run(tmp_path / file)
        told = [e.text for e in run.events if e.kind == "damaged"]
        what = "3 rows" if file == "steps.bin" else "1 line"
        assert len(told) == 1 and told[0].startswith(f"{what} of {file}")
        assert not [e for e in run.events if e.text == "of b"]
        assert (run.history is None) == (file == "steps.bin")


def test_a_file_that_is_cut_while_it_is_read_has_no_whole_rows_from_there(tmp_path):
    file = tmp_path / "steps.bin"
    dtype = numpy.dtype([("step", "<i8"), (rows.CRC, "<u4")])
    file.write_bytes(bytes(3 * dtype.itemsize))
    found = list(itertools.islice(rows._whole(file, dtype, 5, 0), 9))  # five were there when it was looked at
    assert [len(part) for part in found] == [3, 2] and not found[1].any()
