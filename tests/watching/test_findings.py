"""What is found at one step is told together: the cause loudly, what follows from it quietly."""

import logging

import pytest

from diag.registry import find
from diag.result import Confidence, Level, Verdict
from diag.watching.measure.findings import Findings


@pytest.fixture
def findings():
    events = []
    made = Findings(None, lambda *event: events.append(event), lambda *note: None)
    made.events = events
    return made


def say(findings, name, cause, by=(), level=Level.ALARM, step=10):
    verdict = Verdict(level, f"{cause} happened.", advice="Do it.", cause=cause, explained_by=by,
                      confidence=Confidence.ARITHMETIC)  # fmt: skip
    findings.verdict(find(name), verdict, step)


def test_the_cause_is_loud_and_its_consequence_quiet(findings, caplog):
    with caplog.at_level(logging.INFO, "diag"):
        say(findings, "dead_units", "b", by=("a",))
        say(findings, "step_size", "a")
        findings.tell()
        say(findings, "output_constant", "c", by=("b",), step=30)
        findings.tell()
    told = [(r.levelname, r.message) for r in caplog.records]
    assert told == [
        ("ERROR", "Step 10: a happened. Do it."),
        ("INFO", "Step 10: b happened."),
        ("INFO", "Step 30: c happened."),
    ]
    assert [f.verdict.cause for f in findings.found] == ["a", "b", "c"]
    assert [e[0] for e in findings.events] == [10, 10, 30]


def test_nothing_new_is_nothing_said(findings, caplog):
    for _ in range(3):
        say(findings, "step_size", "a")
        findings.tell()
    assert len(findings.found) == 1
