"""The report as one JSON document."""

import dataclasses
import json

import numpy
import pytest
import report_fakes
import torch
from report_fakes import HOSTILE, Bare, Collapse, Uncertain, finding, series

import diag
from diag.errors import InvalidInput, RunError
from diag.reporting import document, render
from diag.reporting.plain import as_text, clean, count_in_words, listed, number, rounded
from diag.result import Failed, Skipped, Verdict
from diag.run.entries import Cost, Event, Record
from diag.run.run import Run
from diag.run.writer import RunWriter

NOTHING = {"findings": [], "outcomes": [], "history": None, "events": [], "costs": [], "torn": 0}


def audit(made, instrument):
    return next(a for a in made["audits"] if a["instrument"] == instrument)


def test_the_document_is_strict_json_and_the_same_each_time(evidence, made):
    text = json.dumps(made, allow_nan=False, sort_keys=True)
    assert json.loads(text) == made
    assert json.dumps(document(evidence), allow_nan=False, sort_keys=True) == text


def test_every_check_is_counted_once_and_the_worst_comes_first(made):
    assert [a["level"] for a in made["audits"]] == [
        "alarm", "warning", "unknown", "ok", "not_applicable", "failed", "skipped",
    ]  # fmt: skip
    assert made["counts"] == dict.fromkeys(made["counts"], 1) | {"description": 0}
    assert sum(made["counts"].values()) == len(made["audits"])


def test_the_verdict_names_the_first_finding(made):
    assert made["verdict"]["headline"] == "One alarm and one warning in 7 checks"
    assert made["verdict"]["level"] == "alarm"
    assert made["verdict"]["sentence"] == made["audits"][0]["sentence"]
    assert made["verdict"]["audit"] == "collapse"


def test_a_quiet_run_claims_no_more_than_was_judged():
    passed = finding("bare", "Bare", series(Bare, [1, 2], ratio=1.0))
    torn = finding("uncertain", "Alignment", series(Uncertain, [1, 2], alignment=0.5))
    quiet = report_fakes.evidence(**NOTHING | {"findings": [torn, passed]})
    verdict = document(quiet)["verdict"]
    assert (verdict["level"], verdict["headline"]) == ("ok", "No check raised a warning")
    assert verdict["sentence"] == "The one check that could judge passed; one could not tell."


@pytest.mark.parametrize(
    ("outcomes", "sentence"),
    [([], "Nothing was measured."), ([(1, Skipped("a", "No labels."))], "None of the one check could judge.")],
)
def test_where_nothing_could_judge_there_is_no_verdict(outcomes, sentence):
    verdict = document(report_fakes.evidence(**NOTHING | {"outcomes": outcomes}))["verdict"]
    assert verdict["level"] == "unknown" and verdict["headline"] == "No verdict"
    assert verdict["sentence"] == sentence


def test_a_number_that_is_no_field_has_the_verdicts_unit():
    class OfPairs(Collapse):
        def verdict(self):
            return dataclasses.replace(super().verdict(), value=0.25, unit="share")

    rows = series(OfPairs, [900], collapsed=0.3, headroom=1.0, margins=numpy.ones(4), level="alarm")
    entry = audit(document(report_fakes.evidence(findings=[finding("collapse", "Collapse", rows)])), "collapse")
    assert (entry["value"]["text"], entry["value"]["unit"], entry["threshold"]["text"]) == ("25", "%", "10")


def test_an_entry_has_what_lighthouse_has(made):
    entry = audit(made, "collapse")
    assert entry["id"] == "collapse" and entry["title"] == "Softmax collapse: alarm"
    assert entry["value"] == {"name": "collapsed", "number": 0.21, "text": "21", "unit": "%"}
    assert entry["threshold"] == {"number": 0.1, "text": "10", "unit": "%"}
    assert entry["uncalibrated"] and entry["threshold_source"] == "our choice, uncalibrated"
    assert (entry["first_step"], entry["last_step"], entry["measurements"]) == (50, 900, 18)
    assert entry["layers"] == ["head", HOSTILE]
    assert entry["why_here"] == (
        "Judged over steps 50 to 900, on 18 measurements of 640 examples. "
        "The deciding number lies above its threshold."
    )
    assert audit(made, "bare")["title"] == "Bare third party: passed"
    unmet = "A precondition does not hold: terminal phase (the training accuracy is 0.93)."
    assert audit(made, "inapplicable")["why_here"].endswith(unmet)


def test_details_are_typed_and_carry_standard_errors_and_ranges(made):
    rows = {row["name"]: row for row in audit(made, "collapse")["details"]}
    assert rows["collapsed"]["lowest"]["number"] == 0 and rows["collapsed"]["highest"]["number"] == 0.21
    assert rows["headroom"]["standard_error"]["text"] == "0.4" and rows["headroom"]["unit"] == "nats"
    arrays = {row["name"]: row for row in audit(made, "collapse")["arrays"]}
    assert arrays["margins"]["shape"] == "float64 [640]"


def test_a_number_is_named_only_where_one_field_has_it():
    class Twin(Bare):
        pass

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Two(Collapse):
        def verdict(self):
            return Verdict("alarm", "Same.", value=self.collapsed, threshold=1.0)

    same = series(Two, [1], collapsed=0.4, headroom=0.4, headroom_standard_error=0.4, margins=numpy.ones(3))
    value = audit(document(report_fakes.evidence(**NOTHING | {"findings": [finding("two", "Two", same)]})), "two")[
        "value"
    ]
    assert value == {"name": "", "number": 0.4, "text": "0.4", "unit": ""}


def test_skips_of_a_check_that_also_measured_are_told_in_its_entry(made):
    (gap,) = audit(made, "uncertain")["gaps"]
    assert (gap["kind"], gap["first_step"], gap["times"]) == ("skipped", 100, 1)
    assert audit(made, "broken")["traceback"].startswith("Traceback")
    assert audit(made, "curvature")["sentence"].startswith("The model has an op")


def test_ids_stay_apart():
    twins = [finding(n, n, series(Bare, [1], ratio=1.0)) for n in ("a b", "a-b", "<a b>")]
    made = document(report_fakes.evidence(**NOTHING | {"findings": twins}))
    assert [a["id"] for a in made["audits"]] == ["a-b", "a-b-2", "a-b-3"]


def test_warnings_about_the_run_itself(made):
    kinds = [c["kind"] for c in made["caveats"]]
    assert kinds == [
        "skipped", "failed", "non-finite steps", "non-finite steps", "note", "exception", "over budget",
        "torn records",
    ]  # fmt: skip
    texts = " ".join(c["text"] for c in made["caveats"])
    assert "At one step the training loss was infinite or not a number, at step 701." in texts
    assert "One check was skipped" in texts and "One record was torn" in texts
    assert "The loop raised (step 512)." in texts
    assert "Measuring took 6.46 % of the wall time, more than its budget of 5 %" in texts


def test_warnings_of_sampled_steps_scaler_and_missing_data():
    history = report_fakes.history(100)
    history.skipped[[3, 7]] = True
    history.loss[50:] = numpy.nan
    history = dataclasses.replace(history, total_steps=1000)
    changed = report_fakes.evidence(**NOTHING | {"history": history, "not_installed": ("theirs",)})
    texts = [c["text"] for c in document(changed)["caveats"]]
    assert "100 of 1,000 steps were recorded; what happened in between is unknown." in texts
    assert "The GradScaler left out two steps, from step 4 to 8." in texts
    assert "The training loss was not observed at 50 steps, from step 51 to 100." in texts
    assert "Measured by instruments that are not installed here: theirs." in texts
    alone = document(report_fakes.evidence(**NOTHING))["caveats"]
    assert [c["text"] for c in alone] == ["No optimizer step was recorded, so there is no time course."]


def test_repeated_events_are_told_once():
    events = [Event(s, "skipped step", "The scaler left it out.") for s in range(1, 60)]
    changed = report_fakes.evidence(**NOTHING | {"events": events, "history": report_fakes.history(60)})
    texts = [c["text"] for c in document(changed)["caveats"]]
    assert "The scaler left it out (step 1 and 58 more times)." in texts


def test_how_a_run_was_observed_is_no_warning_and_stands_with_the_method():
    events = [
        Event(1, "info", "The loss was observed: cross_entropy(weight=<b>)."),
        Event(1, "note", "The optimizer also steps other parameters."),
        Event(9, "info", "The loss was observed: cross_entropy(weight=<b>)."),  # of a resumed run
    ]
    changed = report_fakes.evidence(**NOTHING | {"events": events, "history": report_fakes.history(60)})
    made = document(changed)
    texts = [c["text"] for c in made["caveats"]]
    assert "The optimizer also steps other parameters (step 1)." in texts
    assert not any("The loss was observed" in text for text in texts)
    assert made["method"]["observed"] == ["The loss was observed: cross_entropy(weight=<b>)."]
    page = render(made)
    method = page[page.index('id="method-title"') :]
    assert "<p>The loss was observed: cross_entropy(weight=&lt;b&gt;).</p>" in method
    assert document(report_fakes.evidence(**NOTHING))["method"]["observed"] == []


def test_method_tells_schedule_cost_settings_and_thresholds(made):
    how = made["method"]
    row = next(r for r in how["schedule"] if r["audit"] == "collapse")
    assert (row["steps"], row["mean"], row["total"], row["seed"]) == (
        "every 50 from 50 to 900",
        "21 ms",
        "378 ms",
        "0",
    )
    assert how["share"] == "6.46 %" and how["budget"] == "5 %"
    setting = next(s for s in how["settings"] if s["audit"] == "collapse")
    assert (setting["name"], setting["text"], setting["decided"]) == ("alarm_at", "0.1", True)
    assert {t["audit"]: t["uncalibrated"] for t in how["thresholds"]} == {
        "collapse": True, "opposing": True, "uncertain": False,
    }  # fmt: skip
    assert {"name": "torch", "text": "2.13.0"} in how["versions"]


def test_facts_come_from_metadata_and_history(made):
    facts = {f["name"]: f["text"] for f in made["facts"]}
    assert facts["Parameters"] == "10,026" and facts["Optimizer"] == "SGD, learning rate 0.1"
    assert facts["Probe"] == "640 examples" and made["method"]["share"] == "6.46 %"


# Where a report comes from.


def outcomes():
    logits = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    return {"softmax_collapse": diag.softmax_collapse(logits=logits, labels=logits.argmax(1))}


def test_a_dict_of_results_skips_and_failures():
    made = document({**outcomes(), "a": Skipped("a", "No labels."), "b": Failed("b", "ValueError: x")})
    assert made["kind"] == "moment" and made["timeline"] is None and made["layers"] is None
    assert made["counts"]["skipped"] == made["counts"]["failed"] == 1
    entry = audit(made, "softmax_collapse")
    assert entry["why"] and entry["documentation"] and entry["first_step"] is None


def test_a_result_whose_verdict_raises_is_a_failure():
    class Wrong(Bare):
        def verdict(self):
            raise KeyError("gone")

    (entry,) = document({"wrong": Wrong(ratio=1.0)})["audits"]
    assert entry["level"] == "failed" and entry["sentence"] == "Its verdict failed: KeyError: 'gone'"


def test_a_single_result_and_one_of_another_package():
    result = outcomes()["softmax_collapse"]
    assert document(result)["audits"][0]["instrument"] == "softmax_collapse"
    assert document({"theirs": Bare(ratio=2.0)})["audits"][0]["name"] == "Theirs"


def test_a_snapshot_is_measured_with_every_instrument():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    data = (torch.randn(30, 4), torch.arange(30) % 3)
    made = document(diag.Snapshot(model, torch.nn.functional.cross_entropy, data))
    from diag.registry import instruments

    assert {a["instrument"] for a in made["audits"]} == set(instruments())
    assert made["title"] == "Snapshot of a Sequential"
    assert {f["name"] for f in made["facts"]} >= {"Model", "Parameters", "Examples"}


def test_a_snapshot_of_a_watched_run_has_its_curves_and_no_lanes():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    history = report_fakes.history(40, {"weight": 12, "bias": 3})
    data = (torch.randn(9, 4), torch.arange(9) % 3)
    made = document(diag.Snapshot(model, torch.nn.functional.cross_entropy, data, history=history), drawings=False)
    assert (made["timeline"]["first_step"], made["timeline"]["last_step"]) == (1, 40)
    assert made["timeline"]["lanes"] == [] and made["drawings"] == {}


def written(folder):
    """A run on disk with a series of one instrument and the record that another is computed from."""
    layers = {"a.weight": 4, "a.bias": 2}
    with RunWriter(folder, {"layers": layers, "model": "Net", "budget": 0.05}) as writer:
        writer.append_steps(report_fakes.history(30, layers))
        writer.append_outcome(10, outcomes()["softmax_collapse"], 0.01)
        writer.append_outcome(20, outcomes()["softmax_collapse"], 0.01)
        writer.append_cost(30, wall_seconds=2.0, watch_seconds=0.05)
    return folder


def test_a_run_and_the_path_of_its_folder_give_the_same(tmp_path):
    folder = written(tmp_path / "mine")
    made = document(folder)
    assert made == document(str(folder)) == document(diag.load(folder))
    schedule = {row["audit"]: row["steps"] for row in made["method"]["schedule"]}
    assert schedule["softmax-collapse"] == "10, 20" and schedule["gradient-flow"] == "from the record of every step"
    assert made["title"] == "Run mine" and made["timeline"]["last_step"] == 30
    assert audit(made, "softmax_collapse")["measurements"] == 2
    assert document(folder, title="Another")["title"] == "Another"


def test_when_and_how_long_is_said_of_what_was_measured_and_not_of_what_is_computed_at_opening():
    """The same instrument: measured on two checkpoints, and computed of the steps of a run."""
    measured = diag.gradient_flow(report_fakes.history(5))
    records = [Record(step, "gradient_flow", measured, 0.25) for step in (10, 20)]
    for run, steps, total in (
        (Run(records=records), "10, 20", "500 ms"),
        (Run(history=report_fakes.history(5)), "from the record of every step", ""),
    ):
        rows = {row["audit"]: row for row in document(run, drawings=False)["method"]["schedule"]}
        assert (rows["gradient-flow"]["steps"], rows["gradient-flow"]["total"]) == (steps, total)


def test_a_run_in_memory():
    run = Run(metadata={"name": "here"}, history=report_fakes.history(5), times=[Cost(5, wall_seconds=1.0)])
    assert document(run)["title"] == "Run here"


def test_a_run_without_a_step():
    made = document(Run())
    assert made["verdict"]["sentence"] == "Nothing was measured." and made["layers"] is None


@pytest.mark.parametrize("source", [3, {"a": 1}, None, [1]])
def test_what_no_report_can_be_made_of(source):
    with pytest.raises(InvalidInput, match=r"cannot be made of (an? )?\w+; give a run, the path of its folder"):
        document(source)


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(RunError, match="holds no run"):
        document(tmp_path)


# Texts and numbers.


def test_numbers_and_texts_are_json_safe():
    assert number(float("nan")) == {"number": None, "text": "undefined", "unit": ""}
    assert number(0.123, "share") == {"number": 0.123, "text": "12.3", "unit": "%"}
    assert number(float("inf"), "share") == {"number": None, "text": "∞", "unit": ""}
    assert number(True)["text"] == "yes"
    assert rounded([1.23456, float("inf"), float("nan")]) == [1.235, None, None]
    assert clean("a\x00b\ud800") == "a\N{REPLACEMENT CHARACTER}b?"
    assert as_text({"lr": 0.1, "betas": (0.9, 0.999), "foreach": None}) == "lr: 0.1, betas: 0.9, 0.999, foreach: –"
    assert (count_in_words(1, "alarm"), count_in_words(12, "alarm"), count_in_words(2, "one", "ones")) == (
        "one alarm",
        "12 alarms",
        "two ones",
    )
    assert (listed([]), listed(["a"]), listed(["a", "b", "c"])) == ("", "a", "a, b and c")


def test_numbers_of_what_does_not_apply_are_left_to_the_record(tmp_path):
    judged = [a for a in document(written(tmp_path / "mine"))["audits"] if "details" in a]
    idle = [a for a in judged if a["level"] == "not_applicable"]
    assert idle and not any(a["details"] or a["arrays"] for a in idle)
    assert all(a["details"] for a in judged if a["level"] not in ("not_applicable", "unknown"))
