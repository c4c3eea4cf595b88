"""Step size, divergence and weight decay on records whose course is known, and on small trainings."""

import dataclasses
import importlib.util
import math
import warnings
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.instruments.causes import Cause
from diag.instruments.optimization.course import median, travel
from diag.snapshot.loop.arithmetic import PolicyFacts, PolicyLook
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.network import StartingWeight

_path = Path(__file__).with_name("optimization_histories.py")
_spec = importlib.util.spec_from_file_location("optimization_histories", _path)
histories = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(histories)
record, falling = histories.record, histories.falling

FLAT = numpy.full(100, 2.3)


@pytest.mark.parametrize(
    ("history", "cause"),
    [
        (record(falling(), 0.4), Cause.LEARNING_RATE_TOO_HIGH),
        (record(FLAT, 1e-5), Cause.LEARNING_RATE_TOO_LOW),
        (record(FLAT, 1e-5, clip=0.01), Cause.CLIPPING_TOO_TIGHT),
        # 1e-5 of a norm of 4 over 16 entries' root is 2.5e-6 an entry, beside a learning rate of 0.1
        (record(FLAT, 1e-5, kind="Adam", eps=1.0), Cause.ADAM_EPSILON_TOO_LARGE),
        (record(falling(), 1e-2), ""),
        (record(falling(), 1e-5), ""),  # small steps that are enough: fine-tuning
        (record(FLAT, 1e-5, kind="Adam", eps=1e-8, rates=2.5e-6), Cause.LEARNING_RATE_TOO_LOW),
        (record(falling()[:20], 1e-5), ""),  # too early to tell
        (record(falling(), 1e-2, clip=0.1), ""),  # clipped at every step, and training all the same
    ],
)
def test_the_size_of_steps(history, cause):
    assert diag.step_size(history=history).verdict().cause == cause


FIRST_LARGE = numpy.concatenate([numpy.geomspace(0.7, 0.1, 15), numpy.full(85, 0.02)])


@pytest.mark.parametrize(
    ("losses", "ratios", "kind", "cause"),
    [
        # A head on a frozen body, by SGD with momentum: the loss overshoots at first, and all but 2 % goes later.
        (numpy.concatenate([[1.0, 2.0, 3.0], 2 * numpy.exp(-numpy.arange(97) / 20)]), FIRST_LARGE, "SGD", ""),
        (
            numpy.concatenate([[1.0, 2.0, 3.0], numpy.full(97, 1.5)]),
            FIRST_LARGE,
            "SGD",
            Cause.LEARNING_RATE_TOO_HIGH,
        ),
        (falling(), 0.4, "SGD", Cause.LEARNING_RATE_TOO_HIGH),  # large to the end
        # Adagrad's first step is the learning rate at every entry, whatever the gradient, and the next are smaller.
        (falling()[:8], 0.4 / numpy.sqrt(numpy.arange(1, 9)), "Adagrad", ""),
        (numpy.full(100, 2.0) + 0.3 * (numpy.arange(100) > 2), FIRST_LARGE, "Adagrad", ""),  # labels that are wrong
        # RMSprop's is ten times the learning rate, as its mean of squares begins at zero.
        (falling()[:8], 0.4 / numpy.sqrt(numpy.arange(1, 9)), "RMSprop", ""),
        (falling(start=2.3, end=0.9), FIRST_LARGE, "RMSprop", ""),
        (falling(), 0.4, "RMSprop", Cause.LEARNING_RATE_TOO_HIGH),
        (numpy.linspace(1, 3, 8), 0.4 / numpy.sqrt(numpy.arange(1, 9)), "Adagrad", Cause.LEARNING_RATE_TOO_HIGH),
    ],
)
def test_large_first_steps_from_which_training_recovered_are_not_too_large(losses, ratios, kind, cause):
    assert diag.step_size(history=record(losses, ratios, kind=kind)).verdict().cause == cause


def test_steps_that_are_small_beside_weights_that_have_grown_are_no_recovery():
    """Adam at a learning rate of 10: the first steps make the weights many times as large."""
    losses = numpy.concatenate([[1.0, 2.0, 3.0], 2 * numpy.exp(-numpy.arange(97) / 20)])
    for last, cause in ((20.0, ""), (400.0, Cause.LEARNING_RATE_TOO_HIGH)):
        result = diag.step_size(history=record(losses, FIRST_LARGE, norm=numpy.linspace(4.0, last, 100)))
        assert result.growth == pytest.approx(last / 4) and result.verdict().cause == cause


def test_steps_that_a_schedule_has_made_small_are_not_too_small():
    rates = numpy.concatenate([numpy.full(50, 0.1), numpy.full(50, 1e-5)])
    assert diag.step_size(history=record(FLAT, rates / 10, rates=rates)).verdict().cause == ""


def test_the_ratio_is_that_of_the_record():
    result = diag.step_size(history=record(falling(), 0.03))
    assert result.ratio == pytest.approx(0.03, rel=1e-6) and result.largest_ratio == pytest.approx(0.03, rel=1e-6)
    assert result.tensors == 2 and result.clip_factor == pytest.approx(1.0)


def test_nothing_recorded_gives_no_verdict():
    history = histories.empty_history(histories.LAYERS, 3)
    assert diag.step_size(history=history).verdict().level == "not_applicable"
    assert diag.weight_decay(history=history).verdict().level == "not_applicable"
    assert diag.divergence(history=history).verdict().level == "not_applicable"


@pytest.mark.parametrize(
    ("losses", "left_at"),
    [
        (numpy.concatenate([falling(50), numpy.geomspace(0.2, 1e3, 50)]), 77),
        (numpy.concatenate([falling(50), [math.nan] * 10]), 53),
        (numpy.concatenate([falling(50), [500.0], falling(49)]), 0),  # one bad batch
        (falling(100), 0),
        (numpy.linspace(0.7, 1.7, 100), 0),  # the loss of a generator
    ],
)
def test_a_loss_that_left_for_good(losses, left_at):
    result = diag.divergence(history=record(losses))
    assert result.left_at == pytest.approx(left_at, abs=3)
    assert (result.verdict().level == "alarm") == bool(left_at)


def test_a_loss_that_is_nan_to_the_end_says_since_when():
    losses = numpy.concatenate([falling(50), [math.nan] * 10])
    assert "is no finite number since step 51." in diag.divergence(history=record(losses)).verdict().sentence
    losses[:] = numpy.concatenate([falling(40), numpy.full(10, 90.0), [math.nan] * 10])
    told = diag.divergence(history=record(losses)).verdict().sentence
    assert "5 times that since step 43 and is no finite number since step 51." in told


def test_the_size_of_a_policy_gradient_is_not_called_a_divergence():
    """Its critic is asked for the returns of a policy that changes: the loss grows in trainings that work."""
    losses = numpy.concatenate([numpy.ones(10), numpy.full(90, 50.0)])
    look = PolicyLook(1, math.nan, 0.9, 0.01, True, True, 1.0, True)
    history, loop = record(losses), Loop(100, policy=PolicyFacts((look,)))
    assert diag.divergence(history=history).verdict().level == "alarm"
    assert diag.divergence(history=history, loop=loop).verdict().level == "unknown"
    losses[40:] = math.nan
    assert diag.divergence(history=record(losses), loop=loop).verdict().level != "ok"


def test_momentum_is_named_where_it_is_high():
    losses = numpy.concatenate([falling(30), numpy.full(10, 30.0), falling(60)])
    assert diag.divergence(history=record(losses, momentum=0.999)).verdict().cause == Cause.MOMENTUM_TOO_HIGH
    assert diag.divergence(history=record(losses, momentum=0.9)).verdict().cause == ""


def test_a_loss_below_zero_is_not_judged():
    assert diag.divergence(history=record(numpy.linspace(-1, -50, 40))).verdict().level == "not_applicable"


def steeper(losses, times):
    """A record whose gradient has grown to so many times its first size."""
    made = record(losses)
    growth = numpy.geomspace(1, times, len(losses))[:, None]
    return dataclasses.replace(made, gradient_norm=(made.gradient_norm * growth).astype(numpy.float32))


def without_end(steps=60):
    return numpy.concatenate([falling(20), -numpy.geomspace(1, 1e6, steps - 20)])


def test_a_loss_that_falls_without_end_has_a_term_of_the_wrong_sign():
    verdict = diag.divergence(history=steeper(without_end(), 1e3)).verdict()
    assert verdict.level == "alarm" and verdict.cause == Cause.LOSS_ASCENDED
    assert "began at 2.3" in verdict.sentence and "reached -1,000,000" in verdict.sentence
    broken = numpy.concatenate([without_end(), [math.nan] * 20])
    assert diag.divergence(history=steeper(broken, 1e3)).verdict().cause == Cause.LOSS_ASCENDED


@pytest.mark.parametrize(
    ("losses", "growth"),
    [
        (without_end(), 3.0),  # a critic that tells two distributions apart by more and more: its gradient stays
        (numpy.linspace(2, -300, 60), 1e3),  # the logarithm of a density
        (numpy.concatenate([without_end(), falling(30)]), 1e3),  # it came back
        (without_end()[15:26], 1e3),  # too few steps
    ],
)
def test_a_loss_below_zero_may_be_sound(losses, growth):
    assert diag.divergence(history=steeper(losses, growth)).verdict().cause != Cause.LOSS_ASCENDED


@pytest.mark.parametrize(
    ("losses", "norm", "decay", "level"),
    [
        (FLAT, numpy.geomspace(4, 0.01, 100), 0.5, "alarm"),
        (numpy.concatenate([falling(50), falling(50)[::-1]]), numpy.geomspace(4, 1, 100), 0.5, "warning"),
        (falling(), numpy.geomspace(4, 1, 100), 0.5, "ok"),  # regularised while it learns
        (FLAT, numpy.geomspace(4, 3, 100), 0.5, "ok"),
        (FLAT, numpy.geomspace(4, 0.01, 100), 0.0, "not_applicable"),
    ],
)
def test_decay_that_wins(losses, norm, decay, level):
    verdict = diag.weight_decay(history=record(losses, norm=norm, weight_decay=decay)).verdict()
    assert verdict.level == level
    assert (verdict.cause == Cause.WEIGHT_DECAY_TOO_STRONG) == (level in ("alarm", "warning"))


def test_steps_of_weights_that_begin_next_to_nothing_are_large_for_any_learning_rate():
    usual, small = (Loop(step=100, start=2 * (StartingWeight("w", g, False, 0.0, True),)) for g in (0.6, 0.01))
    assert (
        diag.step_size(history=record(falling(), 0.4), loop=usual).verdict().cause == Cause.LEARNING_RATE_TOO_HIGH
    )
    assert diag.step_size(history=record(falling(), 0.4), loop=small).verdict().cause == ""
    # Batches differ by a quarter, and the first has one of the lower losses.
    noisy = numpy.concatenate([[0.8], 1 + 0.25 * numpy.random.default_rng(0).standard_normal(99)])
    assert diag.step_size(history=record(noisy, 0.4), loop=small).verdict().cause == ""
    rising = record(falling()[::-1], 0.4)
    assert diag.step_size(history=rising, loop=small).verdict().cause == Cause.LEARNING_RATE_TOO_HIGH


@pytest.mark.parametrize(("down", "cause"), [(0.0, Cause.LEARNING_RATE_TOO_LOW), (1.0, "")])
def test_of_losses_around_zero_steps_are_too_small_where_nothing_falls_beyond_noise(down, cause):
    """A policy's loss has no share to fall by: 1 is eight standard errors of a third of 100 here."""
    noise = 0.5 * numpy.random.default_rng(0).standard_normal(100)
    verdict = diag.step_size(history=record(noise - down * numpy.linspace(0, 1.5, 100), 1e-5)).verdict()
    assert verdict.cause == cause
    assert ("not fallen by more than it scatters" in verdict.sentence) == bool(cause)
    assert "trainings that work" not in verdict.sentence


@pytest.mark.parametrize(("overshoot", "cause"), [(3.2, Cause.LEARNING_RATE_TOO_HIGH), (2.3, "")])
def test_steps_without_warmup_whose_loss_rises_at_once_and_comes_back_in_part(overshoot, cause):
    losses = numpy.concatenate([[2.3], numpy.full(5, overshoot), numpy.full(94, 2.3)])
    ratios = numpy.concatenate([numpy.full(5, 0.17), numpy.full(95, 0.01)])
    assert diag.step_size(history=record(losses, ratios)).verdict().cause == cause


def test_a_gradient_of_zero_says_nothing_of_steps_and_decay():
    history = record(FLAT, 1e-5, norm=numpy.geomspace(4, 0.01, 100), weight_decay=0.5)
    nothing = dataclasses.replace(history, gradient_norm=0 * history.gradient_norm)
    assert diag.step_size(history=nothing).verdict().level == "not_applicable"
    assert diag.weight_decay(history=nothing).verdict().level == "description"
    assert diag.step_size(history=history).verdict().cause == Cause.LEARNING_RATE_TOO_LOW


@pytest.mark.parametrize(("decay", "level"), [(1e-3, "description"), (0.5, "alarm")])
def test_decay_inside_the_gradient_wins_only_with_a_penalty_of_the_size_of_the_loss(decay, level):
    history = record(FLAT, norm=numpy.geomspace(4, 0.01, 100), kind="Adam", weight_decay=decay)
    result = diag.weight_decay(history=history)
    assert result.penalty == pytest.approx(decay / 2 * 4 * 4**2 / 2.3, rel=1e-6)
    assert result.verdict().level == level


def watched(lr, optimizer=torch.optim.Adam, **settings):
    torch.manual_seed(0)
    x = torch.randn(256, 10)
    y = (x @ torch.randn(10, 4)).argmax(1)
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 4))
    opt = optimizer(model.parameters(), lr=lr, **settings)
    with diag.watch(model, instruments=["step_size", "divergence", "weight_decay"]) as watcher:
        for step in range(60):
            rows = slice(64 * (step % 4), 64 * (step % 4) + 64)
            opt.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            opt.step()
    return {s.finding.verdict.cause for s in watcher.run.stories()}


@pytest.mark.parametrize(
    ("settings", "causes"),
    [
        ({"lr": 1e-2}, set()),
        ({"lr": 1.0}, {Cause.LEARNING_RATE_TOO_HIGH}),
        ({"lr": 1e-6}, {Cause.LEARNING_RATE_TOO_LOW}),
        ({"lr": 1e-2, "eps": 10.0}, {Cause.ADAM_EPSILON_TOO_LARGE}),
        ({"lr": 1e-2, "optimizer": torch.optim.AdamW, "weight_decay": 50.0}, {Cause.WEIGHT_DECAY_TOO_STRONG}),
        ({"lr": 0.1, "optimizer": torch.optim.SGD, "momentum": 0.9}, set()),
    ],
)
def test_on_a_small_training(settings, causes):
    assert watched(**settings) == causes


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_the_median_leaves_out_what_is_not_a_number(axis):
    """To the bit that of numpy.nanmedian, also of infinite values, of none, and of nothing but NaN."""
    random = numpy.random.default_rng(0)
    for rows, columns in [(1, 1), (2, 5), (7, 4), (6, 6), (0, 3), (3, 0)]:
        x = random.normal(size=(rows, columns))
        x[random.random(x.shape) < 0.4] = math.nan
        x[random.random(x.shape) < 0.2] = math.inf
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            expected = numpy.nanmedian(x, axis=axis)
        assert numpy.array_equal(median(x, axis), expected, equal_nan=True)


def on_the_way(losses, distance, ratio=1e-3, rates=0.1, **optimizer):
    """A record with steps of `ratio` of a norm of 4, and `distance` from the start (T,) or the share of the way."""
    history = record(losses, ratio, rates=rates, **optimizer)
    way = numpy.cumsum(history.update_norm, 0)
    return dataclasses.replace(
        history, distance=(numpy.broadcast_to(distance, len(way))[:, None] * way).astype("f4")
    )


def ended(fresh, step=200, over=True):
    start = (StartingWeight("0.weight", 0.58, False, -0.1, True, fresh),)
    return Loop(step=step, ended=over, start=start)


NEARLY_FLAT = numpy.linspace(2.3, 2.2, 200)


@pytest.mark.parametrize(
    ("history", "loop", "told"),
    [
        (on_the_way(NEARLY_FLAT, 0.2), ended(True), True),  # 4 % of its size away
        (on_the_way(NEARLY_FLAT, 0.2), ended(False), False),  # loaded weights: fine-tuning
        (on_the_way(NEARLY_FLAT, 0.2), ended(None), False),  # not known
        (on_the_way(NEARLY_FLAT, 0.2), ended(True, over=False), False),  # training goes on
        (on_the_way(NEARLY_FLAT[:60], 0.2), ended(True), False),  # a quick look
        (on_the_way(falling(200), 0.2), ended(True), False),  # little was enough
        (on_the_way(NEARLY_FLAT, 0.2, ratio=1e-2), ended(True), False),  # 40 % away
        (on_the_way(NEARLY_FLAT, 0.95, ratio=7e-4), ended(None), True),  # 13 %, straight
        (on_the_way(numpy.linspace(2.3, 1.6, 200), 0.95, ratio=7e-4), ended(None), False),  # a third is gone
        (on_the_way(NEARLY_FLAT, 0.05), ended(True), False),  # put back again and again
        (on_the_way(NEARLY_FLAT, 0.5, ratio=7e-4), ended(None), False),  # not straight
        (on_the_way(falling(200), 0.95, ratio=7e-4), ended(None), False),  # straight, and it learned
    ],
)
def test_a_training_that_is_over_and_has_hardly_left_its_start(history, loop, told):
    verdict = diag.step_size(history, loop=loop).verdict()
    assert (verdict.cause == Cause.LEARNING_RATE_TOO_LOW) == told
    assert ("hardly left their start" in verdict.sentence) == told


@pytest.mark.parametrize(
    ("rates", "kind", "divided"), [(0.1, "SGD", True), (1e-5, "SGD", False), (0.1, "Adam", False)]
)
def test_where_the_rate_is_usual_the_gradient_is_what_is_small(rates, kind, divided):
    history = on_the_way(NEARLY_FLAT / 1000, 0.2, rates=rates, kind=kind, eps=1e-8)
    verdict = diag.step_size(history, loop=ended(True)).verdict()
    assert ("the first loss was 0.0023" in verdict.sentence) == divided
    assert ("divided once too often" in verdict.advice) == divided


def test_the_way_and_the_distance_are_those_of_a_walk():
    """Steps of length one along one axis for the first tensor, on a circle that closes for the second."""
    angle = numpy.linspace(0, 2 * math.pi, 101)[1:]
    history = record(numpy.ones(100), 0.25)
    distance = numpy.ones_like(history.distance)
    distance[:, 0], distance[:, 2] = numpy.arange(1, 101), 100 / math.pi * numpy.abs(numpy.sin(angle / 2))
    far, straight = travel(dataclasses.replace(history, distance=distance))
    assert straight == pytest.approx(0.5, abs=1e-3)  # the median of 1 and 0
    assert far == pytest.approx(12.5, abs=0.01)  # of 100 and 0, over a norm of 4


def test_a_record_without_distances_has_no_way():
    assert all(math.isnan(x) for x in travel(record(FLAT)))


def blown_up(peak, steps=60):
    """The record of a training whose first ten steps are as large as the weights; its loss comes back to a half."""
    losses = numpy.concatenate([[1.0], numpy.full(9, peak), numpy.full(max(steps - 10, 0), 0.05)])[:steps]
    ratios = numpy.concatenate([numpy.full(10, 0.5), numpy.full(max(steps - 10, 0), 1e-3)])[:steps]
    return record(losses, ratios)


@pytest.mark.parametrize(("peak", "cause"), [(1000.0, Cause.LEARNING_RATE_TOO_HIGH), (8.0, "")])
def test_steps_that_replaced_the_weights_stay_found_when_the_record_no_longer_holds_them(peak, cause):
    early, late = diag.step_size(history=blown_up(peak, 10)), diag.step_size(history=blown_up(peak))
    thin = dataclasses.replace(
        late, largest_ratio=0.09, largest_at=41, began_at=0
    )  # as of a record that has been thinned
    assert thin.verdict().cause == ""
    verdict = type(thin).trend([(10, early), (60, thin)])
    assert verdict.cause == cause
    assert not cause or (verdict.step == 1 and "50 %" in verdict.sentence)
    assert type(thin).trend([(60, thin)]).cause == ""
