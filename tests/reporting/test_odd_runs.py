"""Pages of runs that are not ordinary: imported logs, checkpoints, runs that were killed, trials before
training."""

import dataclasses

import numpy
import report_fakes
from test_first_screen import with_outcome

from diag.instruments.causes import Cause
from diag.reporting import document, render
from diag.reporting.outcome import outcome_courses
from diag.reporting.words import CAUSES, cause_in_words
from diag.snapshot.history import empty_history


def test_a_few_checkpoints_are_named_with_their_steps():
    files = [{"step": 100, "path": "runs/a/first.pt"}, {"step": 400, "path": "runs/a/broken.pt"}]
    made = document(
        report_fakes.evidence(history=None, metadata={"checkpoints": files}, metrics={}), drawings=False
    )
    assert made["state"]["sentence"] == "Two checkpoints: first.pt (step 100) and broken.pt (step 400)."
    assert made["state"]["headline"] == "Something is wrong with these checkpoints"


def test_before_training_no_held_out_data_are_missed():
    made = document(report_fakes.evidence(metadata={"checked": "before training"}), drawings=False)["state"]
    assert "held-out" not in made["sentence"] and "this setup" in made["headline"]
    assert made["sentence"].startswith("Tried before training, on copies: ")


def logged(last_step=100, **metrics):
    history = report_fakes.history(steps=100)
    return report_fakes.evidence(findings=[], outcomes=[], history=history, metrics=metrics, last_step=last_step)


def test_a_held_out_loss_that_rises_is_said_where_the_accuracy_stays():
    told = logged(
        val_loss=[(20, 1.0), (40, 0.5), (60, 0.8), (80, 1.2)], val_acc=[(20, 0.5), (40, 0.9), (60, 0.9), (80, 0.9)]
    )
    said = document(told, drawings=False)["state"]["sentence"]
    assert "The val_loss was lowest at step 40 (0.5) and is 1.2 at the end." in said
    assert "The val_acc is at its best at the end: 90 %, as at step 40 already." in said


def test_a_loss_that_jumps_and_comes_back_is_said():
    made = logged()
    made.history.loss[:] = 2.0 * numpy.exp(-numpy.arange(100) / 50)
    assert "jumped" not in document(made, drawings=False)["state"]["sentence"]
    made.history.loss[61] = 6.5
    step = f"{made.history.steps[61]:,}"
    assert f"It jumped to 6.5 at step {step} and came back." in document(made, drawings=False)["state"]["sentence"]
    made.history.loss[61:] = 60.0  # it stays there: that is not coming back
    assert "came back" not in document(made, drawings=False)["state"]["sentence"]


def test_what_a_check_took_from_the_log_is_drawn_once_and_as_it_was_logged():
    about = with_outcome([0.5, 0.9, 0.7])
    steps = outcome_courses(about)["accuracy"][-1].steps
    again = dataclasses.replace(about, metrics={"val_acc": [(s, 0.6) for s in steps]})
    held_out = [c for c in outcome_courses(again)["accuracy"] if c.is_held_out]
    assert [(c.label, set(c.values)) for c in held_out] == [("val_acc", {0.6})]
    finer = dataclasses.replace(about, metrics={"val_acc": [(s + 1, 0.6) for s in steps]})
    assert len([c for c in outcome_courses(finer)["accuracy"] if c.is_held_out]) == 2


def test_a_record_without_layers_has_no_section_of_layers_and_one_value_no_curve():
    bare = dataclasses.replace(empty_history({}, 100), loss=numpy.linspace(2, 1, 100))
    made = document(
        report_fakes.evidence(
            findings=[], history=bare, metrics={"total": [(100, 3.0)], "lr": [(1, 1.0), (9, 2.0)]}
        ),
        drawings=False,
    )
    assert made["layers"] is None and 'id="layers"' not in render(made)
    assert [c["name"] for c in made["timeline"]["curves"]] == ["loss", "logged lr"]
    assert made["timeline"]["once"] == [{"label": "total", "step": 100, "value": "3"}]
    assert "Logged once: total 3 (step 100)." in render(made)


def test_a_run_on_disk_without_its_end_says_so():
    killed = report_fakes.evidence(on_disk=True)
    told = [c["text"] for c in document(killed, drawings=False)["caveats"] if c["kind"] == "unfinished"]
    assert told == [f"No end was recorded: training goes on, or was killed after step {killed.last_step:,}."]
    ended = report_fakes.evidence(on_disk=True, metadata={"closed": {"rows": 1}})
    assert not any(c["kind"] == "unfinished" for c in document(ended, drawings=False)["caveats"])


def test_a_number_without_name_unit_and_threshold_is_not_shown():
    made = document(report_fakes.evidence(), drawings=False)
    audit = made["audits"][0] | {"value": {"name": "", "number": 3.0, "text": "3", "unit": ""}, "threshold": None}
    shown = render(made | {"audits": [audit]})
    assert '<dl class="numbers">' not in shown
    audit["value"]["name"] = "first step"
    assert '<dl class="numbers">' in render(made | {"audits": [audit]})


def test_headlines_say_causes_in_words_of_every_day():
    assert cause_in_words(Cause.NOT_FINITE) == "NaN or infinity" and cause_in_words("of_my_own") == "of my own"
    assert CAUSES.keys() <= {str(cause) for cause in Cause}
