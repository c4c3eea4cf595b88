"""The first screen: the state in plain words, the stories that matter, the course with its best step, the words."""

import dataclasses

import numpy
import pytest
import report_fakes
from report_fakes import Collapse, finding, series

from diag.reporting import document, render
from diag.reporting.outcome import best_step, outcome_courses
from diag.reporting.state import said_once, shortened
from diag.reporting.timeline import Axis, scale
from diag.reporting.words import WORDS, word_id, words_in, words_of
from diag.result import Result, measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome(Result):
    held_out_loss: float = measured("loss on held-out examples")
    held_out_accuracy: float = measured("share of right answers on held-out examples", unit="share")

    def verdict(self):
        return report_fakes.Verdict("ok", "Held-out accuracy was measured.")


def with_outcome(accuracies, **changes):
    rows = [(50 * (i + 1), Outcome(held_out_loss=1 - a, held_out_accuracy=a)) for i, a in enumerate(accuracies)]
    fake = finding("outcome", "Outcome", rows)
    changes = {"last_step": rows[-1][0]} | changes
    return report_fakes.evidence(findings=[*report_fakes.evidence().findings, fake], **changes)


@pytest.fixture(scope="module")
def overfitted():
    return document(with_outcome([0.5, 0.9, 0.7]), drawings=False)


def test_the_headline_counts_stories_in_plain_words(made):
    assert made["state"]["headline"] == "Something is wrong with this run" and made["state"]["level"] == "alarm"
    assert len(made["state"]["stories"]) <= 3 and made["state"]["stories"][0]["audit"] == made["verdict"]["audit"]


def test_the_headline_says_the_cause_where_it_is_known():
    class Caused(Collapse):
        def verdict(self):
            return dataclasses.replace(super().verdict(), cause="learning_rate_too_high")

    rows = series(Caused, [900], collapsed=0.3, headroom=1.0, margins=numpy.ones(4), level="alarm")
    one = document(report_fakes.evidence(findings=[finding("collapse", "Collapse", rows)]), drawings=False)
    assert one["state"]["headline"] == "Something is wrong with this run: learning rate too high"
    more = [finding(name, name, rows) for name in ("one", "two")]
    headline = document(report_fakes.evidence(findings=more), drawings=False)["state"]["headline"]
    assert headline == "Two things are wrong with this run, first: learning rate too high"


def test_what_follows_is_said_once_and_not_as_the_cause_itself():
    found = [{"cause": c, "name": "Check"} for c in ("not finite", "not finite", "labels wrong", "")]
    assert said_once("labels wrong", found) == ["not finite", "Check"]


def test_a_run_without_a_finding_is_not_called_good():
    quiet = document(report_fakes.evidence(findings=[]), drawings=False)
    assert quiet["state"]["headline"] == "Nothing could be judged" and quiet["state"]["stories"] == []


def test_the_best_step_is_named_and_marked(overfitted):
    assert (
        "The held-out accuracy was best at step 100 (90 %) and is 70 % at the end."
        in overfitted["state"]["sentence"]
    )
    best = overfitted["outcome"]["best"]
    assert (best["step"], best["what"], best["is_last"]) == (100, "accuracy", False)
    assert [panel["name"] for panel in overfitted["outcome"]["panels"]] == ["loss", "accuracy"]
    assert "best: step 100, 90 %" in render(overfitted)


def test_a_best_step_at_the_end_is_said_so():
    made = document(with_outcome([0.5, 0.7, 0.9]), drawings=False)
    assert "The held-out accuracy is at its best at the end: 90 %." in made["state"]["sentence"]


def test_an_accuracy_that_was_measured_long_ago_is_not_that_of_the_end():
    said = document(with_outcome([0.5, 0.9, 0.7], last_step=900), drawings=False)["state"]["sentence"]
    assert "was 70 % at step 150, where it was last measured; it was best at step 100 (90 %)." in said
    said = document(with_outcome([0.5, 0.7], last_step=900), drawings=False)["state"]["sentence"]
    assert "The held-out accuracy was 70 % at step 100, where it was last measured." in said


def test_a_single_value_is_said_and_not_drawn():
    made = document(with_outcome([0.7]), drawings=False)
    assert [panel["name"] for panel in made["outcome"]["panels"]] == ["loss"]
    assert "The held-out accuracy is at its best at the end: 70 %." in made["state"]["sentence"]


@pytest.mark.parametrize("accuracies", [[0.97, 0.98, 1.0], [0.084, 0.9, 0.9969], [0.01, 0.5, 1.0]])
def test_the_highest_accuracy_that_is_marked_is_one(accuracies):
    made = document(with_outcome(accuracies), drawings=False)
    (panel,) = (p for p in made["outcome"]["panels"] if p["name"] == "accuracy")
    assert panel["ticks"][-1]["text"] == "1" and panel["lines"][0]["ticks"] == panel["ticks"]


def test_since_when_the_loss_is_not_finite_is_in_the_headline_sentence():
    history = report_fakes.history(steps=100)
    history.loss[60:], history.loss_finite[60:] = numpy.nan, False
    said = document(report_fakes.evidence(history=history), drawings=False)["state"]["sentence"]
    assert f"and is NaN or infinite from step {history.steps[60]:,} on." in said
    assert "Nothing was measured on held-out data" in said
    assert "NaN" not in document(report_fakes.evidence(), drawings=False)["state"]["sentence"]


def test_the_headline_says_how_few_checks_could_judge():
    passed = finding("bare", "Bare", series(report_fakes.Bare, [1, 2], ratio=1.0))
    made = document(report_fakes.evidence(findings=[passed], outcomes=[]), drawings=False)
    assert made["state"]["headline"] == "Nothing wrong was found by the one check that could judge"


def test_checkpoint_files_are_called_that():
    about = {"name": "2 checkpoints", "checkpoints": [{"step": 0}, {"step": 1}]}
    made = document(report_fakes.evidence(history=None, metadata=about, metrics={}), drawings=False)
    assert made["state"]["sentence"] == "Two checkpoints."
    assert not any("No optimizer step" in caveat["text"] for caveat in made["caveats"])


def test_of_checkpoints_that_were_measured_the_best_is_said():
    about = {"name": "3 checkpoints", "checkpoints": [{"step": 50 * i} for i in (1, 2, 3)]}
    made = document(with_outcome([0.5, 0.9, 0.7], history=None, metadata=about, metrics={}), drawings=False)
    said = "Three checkpoints. The held-out accuracy was best at step 100 (90 %) and is 70 % at the end."
    assert made["state"]["sentence"] == said


def test_numbers_that_the_user_logged_are_shown_by_their_names():
    metrics = {"val/loss": [(10, 2.0), (20, 1.0), (30, 3.0)], "train_acc": [(10, 0.1)], "temperature": [(10, 1.0)]}
    courses = outcome_courses(report_fakes.evidence(findings=[], metrics=metrics))
    assert [(c.label, c.role) for c in courses["loss"]] == [("training", "training"), ("val/loss", "held_out")]
    assert [(c.label, c.role) for c in courses["accuracy"]] == [("train_acc", "training")]
    assert best_step(courses)["step"] == 20


def test_an_old_verdict_says_so_in_its_headline():
    rows = series(Collapse, [50, 100], collapsed=0.3, headroom=1.0, margins=numpy.ones(4), level="alarm")
    made = document(report_fakes.evidence(findings=[finding("collapse", "Softmax collapse", rows)]), drawings=False)
    assert made["audits"][0]["old"] and made["state"]["stories"][0]["as_of"] == "step 100 of 900"
    html = render(made)
    assert "as of step 100 of 900" in html and "old: last measured at step 100" in html
    new = [(s + 800, r) for s, r in rows]
    fresh = document(report_fakes.evidence(findings=[finding("collapse", "Softmax collapse", new)]), drawings=False)
    assert not fresh["audits"][0]["old"] and "as of step" not in render(fresh)


def test_words_are_found_longest_first_and_only_whole():
    assert words_in("The gradient norm of the Hessian") == ["gradient norm", "Hessian"]
    assert words_in("deadline, undead, NC44") == [] and words_in("Dead units") == ["dead"]
    found = words_of([{"sentence": "Held-out accuracy", "advice": "early stopping"}])
    assert [row["word"] for row in found] == ["early stopping", "held-out"]


def test_every_word_has_an_id_of_its_own():
    ids = [word_id(word) for word in WORDS]
    assert len(set(ids)) == len(ids) and all(meaning.endswith(".") for meaning in WORDS.values())


def test_a_word_leads_to_its_meaning_where_it_first_stands(overfitted):
    html = render(overfitted)
    assert 'href="#word-held-out"' in html and 'id="word-held-out"' in html


def test_a_long_sentence_is_shortened_at_its_end():
    text = "First sentence here. " * 30
    assert shortened(text).endswith("here. …") and len(shortened(text)) < 270 and shortened("Short.") == "Short."
    assert shortened("word " * 100).endswith("word …")


def test_no_axis_of_rounding_errors():
    about = scale(numpy.array([0.1 + 0.2, 0.3]))
    assert about["high_end"] - about["low_end"] > 0.01
    ticks = [tick["text"] for tick in scale(numpy.array([2.3001, 2.3062]))["ticks"]]
    assert len(set(ticks)) == len(ticks) > 2
    assert Axis(1, 10).span == 10
