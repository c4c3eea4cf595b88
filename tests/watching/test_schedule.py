"""The schedule against a simulated clock: the budget holds whatever measurements turn out to take."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import diag
import diag.registry
from diag.watching.measure.measuring import FIXED, Measurements, chosen_instruments
from diag.watching.measure.schedule import MeasurementSchedule, next_due
from diag.watching.measure.step_time import StepTime


def test_scheduled_steps_are_geometric_and_multiples():
    steps = [1]
    while steps[-1] < 1000:
        steps.append(next_due(steps[-1], None))
    assert steps[:10] == list(range(1, 11)) and len(steps) < 70
    assert max(b / a for a, b in pairwise(steps[20:])) < 1.15
    assert next_due(100, 7) == 105 and next_due(100, 1000) == 110 and next_due(105, 7) == 112


def simulate(costs, budget, steps, estimates=None, seconds=1.0, every=None):
    """Run a training of `steps` steps of `seconds` each; what each measurement took, and the steps it ran at."""
    schedule = MeasurementSchedule(costs, budget, every)
    for name in costs:
        schedule.estimate(name, (estimates or costs)[name])
    clock, ran, spent = 0.0, {name: [] for name in costs}, 0.0
    worst = 0.0
    for step in range(1, steps + 1):
        clock += seconds
        schedule.earn(clock)
        for name in schedule.affordable(step):
            clock += costs[name]
            spent += costs[name]
            schedule.spent(name, step, costs[name])
            ran[name].append(step)
            worst = max(worst, spent - budget * clock)
    return ran, spent, clock, worst


COSTS = st.dictionaries(st.sampled_from("abcde"), st.floats(0.001, 50.0), min_size=1)


@given(COSTS, st.floats(0.01, 0.5), st.sampled_from([None, 1, 10]))
@settings(deadline=None, max_examples=40)
def test_the_budget_holds_where_estimates_are_right(costs, budget, every):
    _, spent, clock, worst = simulate(costs, budget, 400, every=every)
    assert spent <= budget * clock + 1e-6 and worst <= 1e-6


@given(COSTS, st.floats(0.01, 0.2), st.floats(0.001, 1.0))
@settings(deadline=None, max_examples=40)
def test_wrong_estimates_cost_at_most_one_measurement_each(costs, budget, factor):
    ran, spent, clock, _ = simulate(costs, budget, 400, {n: c * factor for n, c in costs.items()})
    beyond = sum(costs[n] for n in costs if ran[n])
    assert spent <= budget * clock + beyond


def test_a_dear_measurement_is_reached_and_cheap_ones_do_not_wait():
    ran, spent, clock, _ = simulate({"cheap": 0.01, "dear": 20.0}, 0.05, 2000, every=5)
    assert ran["cheap"][0] == 1 and len(ran["cheap"]) > 100
    assert ran["dear"] and ran["dear"][0] <= 850  # it earns at least half of 0.05 s a step
    assert spent <= 0.05 * clock


def test_the_time_that_is_not_used_is_not_lost():
    ran, spent, clock, _ = simulate({"cheap": 0.001, "dear": 10.0}, 0.05, 3000)
    assert spent > 0.5 * 0.05 * clock and len(ran["dear"]) >= 5


def test_an_infinite_budget_measures_at_every_scheduled_step():
    schedule = MeasurementSchedule(["a"], math.inf, every=2)
    steps = []
    for step in range(1, 21):
        schedule.earn(float(step))
        if schedule.affordable(step):
            steps.append(step)
            schedule.spent("a", step, 100.0)
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 18, 20]
    assert MeasurementSchedule(["a"], 0.0).affordable(1) == []


def test_a_postponed_measurement_leaves_its_time_to_the_others():
    schedule = MeasurementSchedule(["a", "b"], 0.1)
    schedule.estimate("a", 4.0)
    schedule.estimate("b", 5.0)
    schedule.earn(100.0)
    # 5 s at once pay for a, 5 s of savings for b.
    assert schedule.affordable(1) == ["a", "b"]
    schedule.postpone("a", math.inf)
    assert schedule.affordable(1) == ["b"] and schedule.left == pytest.approx(10.0)


def test_cheap_measurements_run_while_many_dear_ones_wait():
    costs = {"cheap": 0.2, "other": 0.3} | {f"dear{i}": 60.0 + i for i in range(8)}
    ran, spent, clock, _ = simulate(costs, 0.05, 60)
    assert len(ran["cheap"]) >= 2 and len(ran["other"]) >= 2 and spent <= 0.05 * clock
    ran, spent, clock, _ = simulate(costs, 0.05, 20_000)
    assert all(ran.values()) and spent <= 0.05 * clock


def test_first_costs_are_estimated_from_the_training_step():
    names = ["softmax_collapse", "neural_collapse"]
    runs = Measurements(
        chosen_instruments(names), lambda n: MeasurementSchedule(n, 0.05), lambda *a: None, print, print
    )
    runs.estimate(seconds_per_step=0.3, examples_per_step=64, probe_size=512, slower=1.0)
    forward = 0.1 * 512 / 64
    for name in names:
        passes = diag.registry.find(name).cost.count("one forward pass")
        assert runs.schedule.accounts[name].estimate >= FIXED + passes * forward - 1e-12


def test_the_time_spent_is_recorded(helpers, trainings):
    _, run = helpers.final_state(trainings["adam"], True, budget=math.inf, instruments=["softmax_collapse"])
    measured = sum(c.seconds for c in run.costs if c.instrument == "softmax_collapse")
    assert 0 < measured < run.watch_seconds < run.wall_seconds


def test_a_budget_of_zero_measures_nothing(helpers, trainings):
    _, run = helpers.final_state(trainings["adam"], True, budget=0, probe=helpers.images(32))
    measured = [r for r in run.records if not diag.registry.find(r.instrument).from_record]
    assert {record.step for record in measured} <= {1, 10, 24} and len(run.history) == 24  # the checks' floor
    assert all(diag.registry.find(r.instrument).kind is diag.registry.Kind.CHECK for r in run.records)


def test_what_a_step_takes_stays_known(monkeypatch):
    """Steps at which nothing is due are not timed; of those that are looked at two in a row are, so that one is."""
    timed, paused = [], []
    ended, pause = StepTime.step_ended, StepTime.pause

    def step_ended(self, read):
        longer = ended(self, read)
        timed.append((len(paused), self.timed))
        return longer

    monkeypatch.setattr(StepTime, "step_ended", step_ended)
    monkeypatch.setattr(StepTime, "pause", lambda self: (paused.append(1), pause(self)))
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with diag.watch(model, instruments=["softmax_collapse"]):
        for _ in range(1500):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(torch.ones(6, 4)), torch.tensor([0, 1, 2] * 2)).backward()
            optimizer.step()
    after = [is_timed for rested, is_timed in timed if rested]
    assert paused and after
    # Each look is followed by one more step at least, which is timed; the run may end in between.
    assert after.count(True) >= after.count(False) - 1
