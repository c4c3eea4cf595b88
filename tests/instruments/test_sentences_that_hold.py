"""Trainings that work, and parts of them that look like faults: nothing false is said, and the fault still is."""

import dataclasses
import importlib.util
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.instruments.causes import Cause
from diag.instruments.loop.batches_repeated import EPOCH
from diag.instruments.network.normalization_statistics import NormalizationStatistics
from diag.snapshot.loop.data import BatchFacts
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.network import ShapeFacts
from diag.snapshot.loop.steps import OptimizerFacts, OutsideChange
from diag.watching.observe.loop.data.stream import Stream
from diag.watching.observe.loop.moment import Moment

_path = Path(__file__).with_name("optimization_histories.py")
_spec = importlib.util.spec_from_file_location("optimization_histories", _path)
histories = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(histories)
record, falling = histories.record, histories.falling
LARGE_AT_FIRST = numpy.concatenate([numpy.geomspace(0.7, 0.1, 15), numpy.full(85, 0.02)])


def test_large_first_steps_are_too_large_only_where_the_loss_suffers():
    level = lambda losses, ratios=LARGE_AT_FIRST: diag.step_size(history=record(losses, ratios)).verdict().level  # noqa: E731
    assert level(falling()) == "ok"  # it fell throughout
    over = numpy.concatenate([[2.0], numpy.geomspace(12, 0.05, 99)])
    assert level(over) == "ok"  # it overshot, and all but a fortieth is gone
    assert level(over[:20], LARGE_AT_FIRST[:20]) == "warning"  # nobody knows yet
    assert level(numpy.concatenate([[2.0], numpy.full(99, 12.0)])) == "alarm"
    told = diag.step_size(
        history=record(numpy.concatenate([[2.0], numpy.full(99, 12.0)]), LARGE_AT_FIRST)
    ).verdict()
    assert "rose to 6 times its first value and is at 6 times that" in told.sentence


def test_tensors_that_begin_at_zero_are_no_measure_of_steps():
    """A bias of many entries is its first step; where all begin at zero there is nothing else to go by."""
    made = record(falling(), 0.01)
    update, distance = made.update_norm.copy(), 0.5 * made.parameter_norm
    for column in (0, 2):
        plain = dataclasses.replace(made, distance=distance)
        update[:, column], distance[:, column] = made.parameter_norm[:, column], made.parameter_norm[:, column]
        result = diag.step_size(history=dataclasses.replace(plain, update_norm=update, distance=distance))
        assert result.tensors == (1 if column == 0 else 2)
        assert result.largest_ratio == pytest.approx(0.01 if column == 0 else 1.0)


class TwoAnswers(nn.Module):
    def __init__(self, dead=False):
        super().__init__()
        self.main, self.aside, self.dead = nn.Linear(4, 1), nn.Linear(4, 3), dead
        nn.init.zeros_(self.aside.weight)

    def forward(self, x):
        return (self.main(x) * (0 if self.dead else 1) + self.dead).squeeze(1), self.aside(x)


@pytest.mark.parametrize(
    ("dead", "alike", "level"), [(False, False, "ok"), (True, False, "alarm"), (True, True, None)]
)
def test_an_output_is_constant_where_all_outputs_are_and_the_inputs_are_not(dead, alike, level):
    torch.manual_seed(0)
    x = torch.randn(16, 4)
    x = x[:1].expand(16, 4) if alike else x
    snapshot = diag.Snapshot(TwoAnswers(dead), lambda o, t: o[0].mean(), (x, torch.zeros(16)))
    result = diag.output_constant(snapshot)
    found = type(result).trend([(100, result)])
    assert found.level == (level or "not_applicable")
    if alike:
        assert "the same inputs" in found.sentence


def test_dead_units_follow_from_a_dropout_that_leaves_nothing_and_are_not_judged_on_one_state():
    shape = ShapeFacts(dropouts=(("drop", 0.95),))
    capacity = diag.capacity(loop=Loop(step=10, shape=shape)).verdict()
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    nn.init.constant_(model[0].bias, -99.0)
    x = torch.randn(16, 4)
    given = (x, torch.zeros(16).long())
    dead = diag.dead_units(diag.Snapshot(model, F.cross_entropy, given)).verdict()
    assert dead.level == "alarm" and capacity.cause in dead.explained_by
    one = diag.Snapshot(model, F.cross_entropy, (x[:1].expand(16, 4), given[1]))
    assert diag.dead_units(one).verdict().level == "not_applicable"


@pytest.mark.parametrize(
    ("steps_apart", "loaders", "level", "said"),
    [
        (1, 0, "ok", ""),
        (0, 0, "ok", ""),
        (EPOCH, 0, "warning", "30 batches before"),
        (30, 1, "warning", "every 30 batches"),
    ],
)
def test_what_one_step_uses_comes_in_no_order(steps_apart, loaders, level, said):
    facts = BatchFacts(calls=90, lag=30, steps_apart=steps_apart, repeats=30, loaders=loaders)
    verdict = diag.batches_repeated(loop=Loop(step=90, batches=facts)).verdict()
    assert verdict.level == level and said in verdict.sentence


def test_steps_are_counted_from_the_first_batch_where_a_later_one_makes_all_numbers_count():
    """Mostly zeros, the second batch is told from others by all of its numbers, and from then on every batch is."""
    generator, sparse = torch.Generator().manual_seed(0), torch.zeros(64, 32)
    sparse[3, 3] = 1.0
    batches = Stream(moment := Moment())
    for step, batch in enumerate(3 * [torch.randn(64, 32, generator=generator), sparse], 1):
        batches.add(step, batches.key(step, batch), fetched=True)
        moment.ended(step)
    assert (batches.lag, batches.steps_apart, batches.repeats) == (2, 2, 4)


def test_masks_numbers_and_times_are_no_rows_of_numbers():
    torch.manual_seed(0)
    rows, mask = torch.randn(64, 5), 255.0 * (torch.rand(64, 5) > 0.5)
    for others in ({"a": mask}, {"ids": 900 * torch.rand(64, 5)}, {"timestep": 900 * torch.rand(64, 5)}):
        assert diag.input_scale(inputs={"x": rows, **others}).verdict().level == "ok"
    told = diag.input_scale(inputs={"x": 500 * rows, "mask": mask}).verdict()
    assert told.cause == Cause.INPUTS_NOT_NORMALIZED and "'x'" in told.sentence
    grid = torch.linspace(0, 1, 5).expand(64, 5)
    assert diag.input_scale(inputs={"grid": grid, "x": rows}).verdict().level == "ok"
    assert diag.input_scale(inputs={"grid": grid, "x": grid}).verdict().cause == Cause.INPUTS_CONSTANT


def game(backwards):
    one, two = (
        OptimizerFacts("Adam", held=(n,), steps=100, looked=100, passes=1) for n in ("0.weight", "2.weight")
    )
    return Loop(step=100, backwards=backwards, optimizers=(one, two))


def test_the_losing_side_of_a_game_does_not_diverge():
    rising = record(numpy.geomspace(1.0, 12.0, 100))
    assert diag.divergence(history=rising, loop=game(200)).verdict().level == "unknown"
    assert diag.divergence(history=rising, loop=game(100)).verdict().level == "alarm"  # two optimizers, one loss
    lost = record(numpy.concatenate([numpy.geomspace(1.0, 12.0, 90), [numpy.nan] * 10]))
    assert diag.divergence(history=lost, loop=game(200)).verdict().level == "alarm"
    outside = dataclasses.replace(
        game(100), optimizers=(game(100).optimizers[0], OptimizerFacts("Adam", foreign=4, steps=9))
    )
    assert len(outside.sides) == 2 and diag.divergence(history=rising, loop=outside).verdict().level == "unknown"


def test_gradients_do_not_vanish_in_a_training_that_is_done_nor_over_two_networks():
    layers = {f"{i}.weight": 256 for i in range(8)}
    made = histories.empty_history(layers, 100)
    small_first = numpy.ones((100, 8)) * numpy.where(numpy.arange(8) < 4, 1e-5, 1.0)
    made = dataclasses.replace(made, gradient_norm=small_first.astype(numpy.float32))
    with_loss = lambda end: dataclasses.replace(made, loss=falling(end=end), loss_finite=numpy.ones(100, bool))  # noqa: E731
    assert diag.gradient_depth(history=with_loss(1.0)).verdict().cause == Cause.GRADIENTS_VANISH
    done = diag.gradient_depth(history=with_loss(1e-4)).verdict()
    assert done.level == "not_applicable" and "the loss is below 1 % of its first value" in done.sentence
    sides = [
        OptimizerFacts("Adam", held=tuple(layers)[s], steps=99, looked=99, passes=1)
        for s in (slice(4), slice(4, 8))
    ]
    loop = Loop(step=99, backwards=198, optimizers=tuple(sides))
    assert diag.gradient_depth(history=with_loss(1.0), loop=loop).verdict().level == "ok"


def test_a_loss_without_lower_bound_may_fall_at_one_pace():
    line = record(numpy.concatenate([numpy.full(10, 20.0), -3e4 * numpy.arange(90)]))
    one = OptimizerFacts("SGD", held=("0.weight",), steps=100)
    alone, two = Loop(step=100, optimizers=(one,)), Loop(step=100, optimizers=(one, one))
    slowing = record(numpy.concatenate([numpy.full(10, 20.0), -3e6 * (1 - numpy.exp(-numpy.arange(90) / 20))]))
    endless = diag.divergence(history=line, loop=alone).verdict()
    assert endless.cause == Cause.LOSS_ASCENDED and "and falls as fast as before" in endless.sentence
    assert diag.divergence(history=slowing, loop=alone).verdict().cause != Cause.LOSS_ASCENDED
    assert diag.divergence(history=line, loop=two).verdict().cause != Cause.LOSS_ASCENDED


def statistics(**changes):
    usual = {"layer": "n", "factor": 1.0, "unseen": 0.0, "momentum": 0.1, "batches": 50}
    usual |= {"shifted": "n", "shift": 0.2, "shifted_batches": 50}
    return NormalizationStatistics(**usual | changes)


def test_running_statistics_of_other_data_and_of_one_batch_come_before_the_steps():
    steps = diag.step_size(
        history=record(numpy.concatenate([[2.0], numpy.full(99, 12.0)]), LARGE_AT_FIRST)
    ).verdict()
    for changes in ({"shift": 2.0}, {"momentum": 1.0, "factor": 9.0}):
        made = statistics(**changes)
        verdict = type(made).trend([(10, made), (30, made)])
        assert verdict.cause == Cause.NORMALIZATION_STATISTICS_BAD and verdict.cause in steps.explained_by
    moving = [(10, statistics(shift=2.0)), (30, statistics(shift=2.0, shifted_batches=70))]
    assert NormalizationStatistics.trend(moving).cause == ""
    assert NormalizationStatistics.trend([(10, statistics()), (30, statistics())]).cause == ""


def test_an_optimizer_that_stops_by_itself_is_no_fault():
    """L-BFGS on a quadratic that has float32 for its noise: it ends before the loop does."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 1), torch.randn(64, 4)
    y = x @ torch.randn(4, 1) + 0.1 * torch.randn(64, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=20, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    with diag.watch(model, instruments=["weights_move"]) as watcher:
        for _ in range(40):
            optimizer.step(closure)
    assert not watcher.findings


def test_a_task_whose_gradients_are_zeroed_reaches_the_loss():
    torch.manual_seed(0)
    body, heads = nn.Linear(6, 16), nn.ModuleList([nn.Linear(16, 3), nn.Linear(16, 2)])
    model = nn.ModuleDict({"body": body, "heads": heads})
    optimizer, x = torch.optim.Adam(model.parameters(), 1e-2), torch.randn(64, 6)
    with diag.watch(model, instruments=["gradients_reach", "gradient_accumulation"]) as watcher:
        for _ in range(30):
            for head in heads:
                optimizer.zero_grad()
                out = head(body(x).relu())
                nn.functional.cross_entropy(out, x[:, : out.shape[1]].argmax(1)).backward()
            optimizer.step()
    assert {str(f.verdict.cause) for f in watcher.findings} == {Cause.ACCUMULATION_LOST}


def test_a_learning_rate_of_zero_is_no_schedule_that_ended_early():
    loop = Loop(step=150, ended=True, optimizers=(OptimizerFacts("SGD", held=("0.weight",), steps=150),))
    causes = {
        name: diag.learning_rate_schedule(history=record(falling(150), rates=rates), loop=loop).verdict().cause
        for name, rates in {
            "zero": numpy.zeros(150),
            "gone": numpy.where(numpy.arange(150) < 20, 0.1, 1e-5),
        }.items()
    }
    assert causes == {"zero": Cause.LEARNING_RATE_ZERO, "gone": Cause.SCHEDULE_ENDED_EARLY}


def test_what_is_taken_back_is_said_of_the_steps_that_it_was_found_in():
    """Earlier steps that were looked at, and not taken back, are no part of the statement."""
    loop = Loop(
        step=40,
        optimizers=(OptimizerFacts("SGD", held=("0.weight",), steps=40),),
        outside=(OutsideChange(20, ("0.weight",), evaluated=False),),
        outside_times=20,
        taken_back=(-0.3, 0.1, *[0.95] * 7, 0.9),
    )
    verdict = diag.outside_changes(loop=loop).verdict()
    assert verdict.level == "alarm" and "each of the last 8 steps" in verdict.sentence
    assert "by 90% or more of that step" in verdict.sentence
