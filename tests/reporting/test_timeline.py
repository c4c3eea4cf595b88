"""Curves, lanes and ticks on the one axis that a report shares."""

import dataclasses
import math

import numpy
import report_fakes
from hypothesis import given, settings
from hypothesis import strategies as st

from diag.reporting.timeline import Axis, axis_of, decimate, scale, step_ticks, timeline, whole_norm
from diag.run.entries import Event

FLOATS = st.floats(-1e6, 1e6) | st.just(math.nan) | st.just(math.inf)


def test_a_step_stands_in_the_middle_of_its_part_of_the_axis():
    axis = Axis(11, 20)
    assert [axis.position(s) for s in (11, 15, 20)] == [0.05, 0.45, 0.95]
    assert axis.position(10.5) == 0.0 and axis.position(20.5) == 1.0


@settings(deadline=None, max_examples=40)
@given(st.lists(FLOATS, min_size=1, max_size=300), st.integers(1, 40))
def test_decimation_keeps_every_extreme(values, at_most):
    steps, values = numpy.arange(1, len(values) + 1), numpy.array(values)
    got = decimate(Axis(1, len(values)), steps, values, ~numpy.isfinite(values), at_most)
    usable = values[numpy.isfinite(values)]
    assert len(got["at"]) <= at_most
    if len(usable):
        # Values are kept with four digits: half a unit of the fourth is a relative 5e-4.
        low = [v for v in got.get("low", got["middle"]) if v is not None]
        high = [v for v in got.get("high", got["middle"]) if v is not None]
        assert math.isclose(min(low), usable.min(), rel_tol=1e-3)
        assert math.isclose(max(high), usable.max(), rel_tol=1e-3)
    assert bool(got["broken"]) == (len(usable) < len(values))


def test_a_short_series_is_kept_whole_and_a_hole_stays_a_hole():
    values = numpy.array([3.0, numpy.nan, 1.0])
    got = decimate(Axis(1, 3), numpy.array([1, 2, 3]), values, numpy.array([False, True, False]))
    assert got == {"at": [0.16667, 0.5, 0.83333], "middle": [3.0, None, 1.0], "broken": [0.5]}


def test_a_few_steps_close_together_on_a_long_axis_stay_apart():
    got = decimate(Axis(1, 1000), numpy.array([10, 11, 12]), numpy.array([1.0, 2.0, 3.0]))
    assert got["middle"] == [1.0, 2.0, 3.0]


def test_a_value_that_was_not_seen_is_no_broken_one():
    assert decimate(Axis(1, 2), numpy.array([1, 2]), numpy.array([1.0, numpy.nan]))["broken"] == []


def test_the_scale_is_logarithmic_where_positive_values_span_a_factor_of_thirty():
    assert scale(numpy.array([0.01, 1.0]))["log"]
    assert not scale(numpy.array([0.5, 1.0]))["log"]
    assert not scale(numpy.array([-1.0, 1000.0]))["log"]
    for values in ([0.01, 1.0], [0.5, 1.0], [3.0, 3.0], [0.0, 0.0], [-1.0, 1000.0], [1e-30, 1e30]):
        ticks = scale(numpy.array(values))["ticks"]
        assert ticks and all(0 <= t["at"] <= 1 for t in ticks)


def test_ticks_are_round_steps_on_the_axis():
    assert [t["text"] for t in step_ticks(Axis(1, 900))] == ["200", "400", "600", "800"]
    assert [t["text"] for t in step_ticks(Axis(1, 3))] == ["1", "2", "3"]
    assert all(0 <= t["at"] <= 1 for t in step_ticks(Axis(99_000, 123_456)))


def test_the_whole_norm_is_the_root_of_the_sum_of_squares():
    table = numpy.array([[3.0, 4.0], [numpy.nan, 2.0], [numpy.nan, numpy.nan]], "f4")
    numpy.testing.assert_array_equal(whole_norm(table), [5.0, 2.0, numpy.nan])
    long = numpy.random.default_rng(0).random((9000, 3))
    numpy.testing.assert_allclose(whole_norm(long), numpy.linalg.norm(long, axis=1), rtol=1e-12)


def test_the_axis_holds_history_and_findings():
    evidence = report_fakes.evidence()
    assert axis_of(evidence.history, evidence.findings, 900) == Axis(1, 900)
    assert axis_of(None, evidence.findings, 0) == Axis(50, 900)
    assert axis_of(None, [], 0) is None
    assert axis_of(None, evidence.findings[1:2], 0) is None  # one moment is no course


def test_lanes_curves_and_events_share_the_axis():
    evidence = report_fakes.evidence()
    got = timeline(Axis(1, 900), evidence.history, evidence.findings, evidence.events)
    assert [c["name"] for c in got["curves"]] == ["loss", "gradient_norm", "learning_rate"]
    lane = got["lanes"][0]
    assert (lane["first_step"], lane["last_step"], len(lane["measured"])) == (50, 900, 18)
    assert lane["start"] < lane["measured"][0]["at"] < lane["measured"][-1]["at"] < lane["end"] == 1.0
    assert [e["step"] for e in got["events"]] == [300, 512]
    assert got["curves"][0]["broken"] == [Axis(1, 900).position(701)] or len(got["curves"][0]["broken"]) == 1


def test_a_constant_learning_rate_and_what_was_not_observed_have_no_curve():
    history = report_fakes.history(50)
    still = dataclasses.replace(history, learning_rate=numpy.full(50, 0.1), loss=numpy.full(50, numpy.nan))
    got = timeline(Axis(1, 50), still, [], [])
    assert [c["name"] for c in got["curves"]] == ["gradient_norm"]


def test_very_many_events_are_counted():
    events = [Event(i, "skipped step", "left out") for i in range(1, 101)]
    got = timeline(Axis(1, 100), None, [], events)
    assert len(got["events"]) == 40 and got["events_left_out"] == 60
