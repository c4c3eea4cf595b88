"""Spikes of the loss, made at known steps, and courses that have none."""

import dataclasses
import importlib.util
from pathlib import Path

import numpy
import pytest

import diag
from diag.instruments.causes import Cause
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.steps import OptimizerFacts

_spec = importlib.util.spec_from_file_location(
    "optimization_histories", Path(__file__).with_name("optimization_histories.py")
)
histories = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(histories)


def course(steps=400, noise=0.05, seed=0):
    """Falls from 2.3 to 0.4, with normal noise."""
    return numpy.geomspace(2.3, 0.4, steps) + noise * numpy.random.default_rng(seed).normal(size=steps)


def with_spike(losses, at=200, height=4.0, length=20):
    """The losses, with a spike that decays linearly to nothing over `length` steps."""
    losses = losses.copy()
    losses[at : at + length] += height * numpy.linspace(1, 0, length, endpoint=False)
    return losses


def found(losses, **more):
    return diag.loss_spikes(histories.record(losses, **more))


def test_a_spike_is_told_with_its_steps_and_what_it_undid():
    """Steps are numbered from 1. The course is the median of the 16 losses before."""
    losses = with_spike(course())
    result = found(losses)
    assert result.starts.tolist() == [201]
    before = numpy.median(losses[184:200])
    assert result.courses[0] == pytest.approx(before) and result.peaks[0] == losses[200:220].max()
    assert result.undone == pytest.approx((result.peaks[0] - before) / (numpy.median(losses[:5]) - before))
    assert 216 <= result.ends[0] <= 221
    verdict = result.verdict()
    assert (verdict.level, verdict.cause, verdict.step) == (diag.Level.WARNING, Cause.LOSS_SPIKE, 201)
    assert "which undid all that training had gained until then" in verdict.sentence
    assert "jumped at step 201: from" in verdict.sentence and f"back at step {result.ends[0]}." in verdict.sentence


def test_a_rise_that_stays_is_another_course():
    losses = course()
    losses[300:] += 3
    assert not len(found(losses).starts)
    assert len(found(with_spike(course(), at=100, length=40)).starts)
    assert not len(found(with_spike(course(), at=100, length=80)).starts)  # more than half of what went before


def test_several_are_counted_and_the_highest_is_described():
    losses = with_spike(with_spike(course()), at=320, height=8.0)
    result = found(losses)
    assert result.starts.tolist() == [201, 321]
    assert "at step 321" in result.verdict().sentence and "It did so 2 times" in result.verdict().sentence


def test_a_learning_rate_that_rose_is_said():
    rates = numpy.where(numpy.arange(400) < 198, 0.01, 0.1)
    assert (
        "as the learning rate went from 0.01 to 0.1" in found(with_spike(course()), rates=rates).verdict().sentence
    )


def test_where_no_learning_rate_was_recorded_there_is_none():
    result = found(with_spike(course()), rates=numpy.nan)
    assert numpy.isnan(result.rates).all() and "learning rate" not in result.verdict().sentence


@pytest.mark.parametrize(
    "losses",
    [
        course(),
        course(noise=0.5, seed=1),
        with_spike(course(), length=2),  # one bad batch, and a half
        with_spike(course(), height=0.3),  # far above the noise, of no consequence
        with_spike(course(noise=0.5), height=2.0),
        with_spike(with_spike(course()), at=300, height=2.1, length=1),  # half as high elsewhere
        with_spike(course(), height=0.6) * numpy.exp(numpy.random.default_rng(2).normal(size=400)),  # by factors
        with_spike(numpy.linspace(2.3, 2.0, 400)),  # nothing was gained that could be undone
        numpy.where(numpy.arange(400) % 4 == 0, 3.0, course()),  # one task in four is harder
        numpy.full(400, 0.7),
        numpy.geomspace(0.4, 2.3, 400),
        numpy.random.default_rng(0).standard_cauchy(400),
        -numpy.geomspace(2.3, 0.4, 400),
    ],
    ids=[
        "ordinary",
        "noisy",
        "one batch",
        "small",
        "within noise",
        "elsewhere",
        "factors",
        "no gain",
        "tasks",
        "flat",
        "rising",
        "heavy tails",
        "negative",
    ],
)
def test_what_is_no_spike(losses):
    verdict = found(losses).verdict()
    assert verdict.level is diag.Level.OK and not verdict.cause


def test_noise_alone_makes_none():
    """600 draws with tails as heavy as Student's t with three degrees of freedom: three steps in a row above ten
    deviations, and a quarter of the fall, do not happen."""
    rng = numpy.random.default_rng(3)
    for _ in range(600):
        losses = numpy.geomspace(2.3, 0.4, 300) + 0.1 * rng.standard_t(3, 300)
        assert not len(found(losses).starts)


def test_long_records_are_read_by_medians():
    losses = with_spike(course(100_000), at=60_000, length=2_000)
    result = found(losses)
    assert len(result.starts) == 1 and abs(int(result.starts[0]) - 60_001) <= 25
    assert 61_700 < result.ends[0] < 62_100


def test_few_losses_are_not_judged():
    verdict = found(course(16)).verdict()
    assert verdict.level is diag.Level.NOT_APPLICABLE and "fewer than 17 losses" in verdict.sentence


def test_losses_that_were_not_seen_are_left_out():
    losses = with_spike(course())
    losses[::2] = numpy.nan
    record = histories.record(losses)
    record = dataclasses.replace(record, loss_finite=numpy.ones(400, bool))
    assert diag.loss_spikes(record).starts.tolist() == [202]


def test_the_sides_of_a_game_are_not_judged():
    sides = [OptimizerFacts("Adam", held=("a",), steps=99), OptimizerFacts("Adam", foreign=4, steps=99)]
    loop = Loop(step=99, backwards=198, optimizers=tuple(sides))
    verdict = diag.loss_spikes(histories.record(with_spike(course())), loop).verdict()
    assert verdict.level is diag.Level.NOT_APPLICABLE and "sides of a game" in verdict.sentence
