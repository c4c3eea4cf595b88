"""What follows from what is told once, in the order in which a reader should hear it."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diag.result import Confidence, Level, Verdict
from diag.run.stories import stories


@dataclass(frozen=True)
class Found:
    instrument: str
    verdict: Verdict
    first_step: int = 1
    began: int | None = None


def found(name, level=Level.ALARM, *, step=None, cause="", by=(), confidence=Confidence.WEAK_EMPIRICAL, first=1):
    verdict = Verdict(level, f"{name}.", cause=cause, explained_by=by, step=step, confidence=confidence)
    return Found(name, verdict, first)


def told(findings):
    return [(s.finding.instrument, [c.instrument for c in s.consequences]) for s in stories(findings)]


def test_a_divergence_with_what_follows_is_one_story():
    rate = found("rate", step=8, cause="learning_rate_too_high")
    dead = found("dead", step=30, cause="units_dead", by=("learning_rate_too_high",))
    vanish = found("vanish", step=31, cause="gradients_vanish", by=("units_dead",))
    assert told([vanish, dead, rate]) == [("rate", ["dead", "vanish"])]


def test_a_cause_that_began_later_explains_nothing():
    rate = found("rate", step=50, cause="learning_rate_too_high")
    dead = found("dead", step=30, cause="units_dead", by=("learning_rate_too_high",))
    assert told([rate, dead]) == [("dead", []), ("rate", [])]


def test_alarms_before_warnings_arithmetic_before_thresholds_early_before_late():
    late = found("late", step=90)
    early = found("early", step=3)
    sure = found("sure", step=100, confidence=Confidence.ARITHMETIC)
    mild = found("mild", Level.WARNING, step=1, confidence=Confidence.ARITHMETIC)
    assert [name for name, _ in told([late, mild, early, sure])] == ["sure", "early", "late", "mild"]


def test_when_it_began_is_seen_in_the_course_where_the_verdict_does_not_say():
    rate = found("rate", step=8, cause="learning_rate_too_high")
    dead = found("dead", cause="units_dead", by=("learning_rate_too_high",))
    assert told([rate, dead]) == [("dead", []), ("rate", [])]  # measured since step 1
    late = Found("dead", dead.verdict, first_step=1, began=10)
    assert told([rate, late]) == [("rate", ["dead"])]


def test_a_story_is_as_bad_as_its_worst_part():
    cause = found("cause", Level.WARNING, step=1, cause="a")
    effect = found("effect", Level.ALARM, step=2, by=("a",))
    other = found("other", Level.WARNING, step=1, confidence=Confidence.ARITHMETIC)
    assert told([other, effect, cause]) == [("cause", ["effect"]), ("other", [])]
    assert stories([cause, effect])[0].level is Level.ALARM


def test_two_that_explain_each_other_make_one_story():
    a, b = found("a", step=1, cause="a", by=("b",)), found("b", step=1, cause="b", by=("a",))
    assert told([b, a]) == [("a", ["b"])]


@pytest.mark.parametrize("level", [Level.OK, Level.UNKNOWN, Level.DESCRIPTION, Level.NOT_APPLICABLE])
def test_what_raises_no_warning_is_no_story(level):
    assert stories([found("quiet", level, cause="a"), found("effect", by=("b",))]) != []
    assert told([found("quiet", level)]) == []


CAUSES = st.sampled_from(["a", "b", "c", "d"])
LEVELS = st.sampled_from([Level.ALARM, Level.WARNING, Level.OK])
PLANS = st.lists(st.tuples(CAUSES, st.lists(CAUSES, max_size=3), st.integers(1, 5) | st.none(), LEVELS), max_size=7)


@settings(deadline=None)
@given(PLANS)
def test_every_finding_is_told_exactly_once(plans):
    findings = [found("x", level, step=step, cause=cause, by=by) for cause, by, step, level in plans]
    parts = [f for s in stories(findings) for f in (s.finding, *s.consequences)]
    expected = [f for f in findings if f.verdict.level is not Level.OK]
    assert sorted(map(id, parts)) == sorted(map(id, expected))
