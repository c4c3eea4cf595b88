"""Losses recorded over consecutive steps of a watched run, and opposing signals judged on them.

Oracle 2a (SCIENCE 2.5): f = w s, half of the labels +1 and half -1, loss 1/2 (f - y)^2, so H = s^2 and gradient
descent multiplies w by 1 - eta s^2: above eta s^2 = 1 the two halves trade places at every step, below they stay.
"""

import math
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.result import Level
from diag.watching.observe.examples import StepExamples

S = 2.0


def scalar(n=80):
    """(model, x, y) of the oracle; w starts near its minimum at 0."""
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(1e-2)
    y = torch.ones(n, 1, dtype=torch.float64)
    y[n // 2 :] = -1
    return model, torch.full((n, 1), S, dtype=torch.float64), y


def halved(outputs, targets):
    return 0.5 * F.mse_loss(outputs, targets)


def descend(model, optimizer, x, y, steps, loss=halved, hook=None):
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        if hook is not None:
            hook(step)
        optimizer.step()


def watched(product, steps, optimizer=None, loss=halved, budget=math.inf, **settings):
    """The run of `steps` at learning rate `product` / s^2, with a window of 8 steps."""
    model, x, y = scalar()
    optimizer = (optimizer or torch.optim.SGD)(model.parameters(), product / S**2)
    wanted = {"opposing_signals": {"k": 20, "window": 8} | settings}
    with diag.watch(model, probe=(x, y), instruments=wanted, budget=budget, every=1) as watcher:
        descend(model, optimizer, x, y, steps, loss)
    return watcher.run


def last(run):
    return run.series("opposing_signals")[-1]


def test_two_groups_trade_places_at_the_edge():
    run = watched(1.95, steps=26)
    # The first measurement is a kick; then two steps are looked at, and eight recorded.
    modes = [(step, result.mode) for step, result in run.series("opposing_signals")]
    assert modes == [(1, "static"), (12, "online"), (23, "online")]
    result = run.series("opposing_signals")[1][1]
    assert result.steps == tuple(range(4, 13)) and result.trace.shape == (9, 3)
    assert result.swap == 1.0 and result.persist == 0.0
    assert result.antiphase < -0.999 and result.lag_one < -0.999
    # eta s^2 / 2; what is measured is half of mse_loss, as training descends it.
    assert result.edge_first == pytest.approx(0.975, rel=1e-6) == result.edge_last
    assert result.sharpness == pytest.approx(S**2, rel=1e-6)
    assert "Training descends 0.5 times the mean of this loss" in texts(run)
    # The model is at hand: each half's slope along the one direction, equal and opposite.
    assert result.slope_a == pytest.approx(-result.slope_b, rel=0.1) and not result.same_side
    verdict = result.verdict()
    assert verdict.level == Level.OK and "ordinary edge of stability" in verdict.sentence


def test_two_groups_stay_below_the_edge():
    _, result = last(watched(0.6, steps=20, mode="online"))
    assert result.mode == "online" and result.swap == 0.0 and result.persist == 1.0
    verdict = result.verdict()
    assert verdict.level == Level.NOT_APPLICABLE
    assert "is 0.3 of its threshold at step 10 and 0.3 of it at step 18, outside 0.95 to 1.5" in run_sentence(
        result
    )


def run_sentence(result):
    return " ".join([result.verdict().sentence, *result.notes])


def test_a_kick_is_judged_where_the_record_cannot_be():
    _, result = last(watched(0.6, steps=12))
    assert result.mode == "static" and math.isnan(result.edge_first)
    assert "Recorded from step 4 to 12: swap 0, persist 1" in run_sentence(result)
    assert "a kick is judged instead, because the sharpness is 0.3 of its threshold" in run_sentence(result)


def test_the_optimizers_own_threshold():
    """Momentum beta is stable up to (2 + 2 beta) / eta."""
    run = watched(0.9, 14, lambda p, lr: torch.optim.SGD(p, lr, momentum=0.5), mode="online")
    _, result = run.series("opposing_signals")[0]
    assert result.edge_first == pytest.approx(0.9 / 3, rel=1e-6)


def test_an_optimizer_without_a_known_threshold():
    _, result = last(watched(0.1, 14, torch.optim.Adagrad, mode="online"))
    assert result.verdict().level == Level.NOT_APPLICABLE
    assert "the threshold of Adagrad is not known here" in run_sentence(result)


def test_a_term_that_the_recorded_loss_lacks():
    weights = iter(range(1, 100))

    def other(outputs, targets):
        return F.mse_loss(outputs, targets) + next(weights)

    _, result = last(watched(0.9, 14, loss=other, mode="online"))
    assert "training descends another loss than the one recorded" in run_sentence(result)


def test_a_probe_set_of_half_the_batch():
    """What training descends of the recorded loss is then told by the loss function's own value."""
    model, x, y = scalar(160)
    optimizer = torch.optim.SGD(model.parameters(), 1.95 / S**2)
    wanted = {"opposing_signals": {"k": 20, "window": 8}}
    half = slice(40, 120)  # as many of each label
    with diag.watch(model, probe=(x[half], y[half]), instruments=wanted, budget=math.inf, every=1) as watcher:
        descend(model, optimizer, x, y, 14)
    _, result = last(watcher.run)
    assert result.mode == "online" and result.num_examples == 80
    assert result.edge_last == pytest.approx(0.975, rel=1e-6)


def test_mini_batches_are_told():
    run = minibatches()
    assert {result.mode for _, result in run.series("opposing_signals")} == {"static"}
    assert any("taken on different mini-batches, so opposing_signals judges no" in e.text for e in run.events)
    _, result = last(minibatches(mode="online"))
    assert result.mode == "online" and result.verdict().level == Level.NOT_APPLICABLE
    assert (
        "different mini-batches, whose noise is in the changes"
        in {p.name: p.detail for p in result.preconditions}["the same examples at every step"]
    )


def minibatches(steps=24, **settings):
    model, x, y = scalar(160)
    x = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    wanted = {"opposing_signals": {"k": 20, "window": 8} | settings}
    with diag.watch(model, probe=(x, y), instruments=wanted, budget=math.inf) as watcher:
        for step in range(steps):
            rows = torch.randperm(160, generator=torch.Generator().manual_seed(step))[:40]
            descend(model, optimizer, x[rows], y[rows], 1)
    return watcher.run


def test_a_run_that_ends_in_a_window():
    """Of a window from step 4 on, four recorded steps are judged, and three are not."""
    step, result = last(watched(1.95, steps=8))
    assert (step, result.mode, result.steps) == (8, "online", (4, 5, 6, 7, 8))
    step, result = last(watched(1.95, steps=7))
    assert (step, result.mode) == (7, "static")
    run = watched(1.95, steps=4, mode="online")
    assert not run.series("opposing_signals")
    assert "ended before enough consecutive steps were recorded" in run.outcomes[0][1].reason


def test_measuring_in_a_window():
    model, x, y = scalar()
    optimizer = torch.optim.SGD(model.parameters(), 1.95 / S**2)
    wanted = {"opposing_signals": {"k": 20}}
    with diag.watch(model, probe=(x, y), instruments=wanted, budget=math.inf, every=1) as watcher:
        descend(model, optimizer, x, y, 6)
        watcher.measure()  # two steps of a window are no record
        descend(model, optimizer, x, y, 4)
        watcher.measure()
    found = [(step, result.mode) for step, result in watcher.run.series("opposing_signals")]
    assert found == [(1, "static"), (6, "static"), (10, "online")]


def test_parameters_changed_behind_the_watch():
    model, x, y = scalar()
    optimizer = torch.optim.SGD(model.parameters(), 1.95 / S**2)
    wanted = {"opposing_signals": {"k": 20}}
    with diag.watch(model, probe=(x, y), instruments=wanted, budget=math.inf, every=1) as watcher:
        descend(model, optimizer, x, y, 10)
        with torch.no_grad():
            model.weight.fill_(3.0)
    assert last(watcher.run)[1].mode == "static"
    assert "given up at step 10 (The model's parameters have changed since" in texts(watcher.run)


def texts(run):
    return " ".join(event.text for event in run.events)


def test_steps_that_a_scaler_leaves_out():
    model, x, y = scalar()
    model, x, y = model.float(), x.float(), y.float()
    optimizer = torch.optim.SGD(model.parameters(), 1.95 / S**2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    wanted = {"opposing_signals": {"k": 20, "window": 8, "mode": "online"}}
    with diag.watch(model, probe=(x, y), instruments=wanted, budget=math.inf, every=1) as watcher:
        for step in range(1, 16):
            optimizer.zero_grad()
            scaler.scale(halved(model(x), y)).backward()
            if step == 7:
                model.weight.grad.fill_(math.inf)
            scaler.step(optimizer)
            scaler.update()
    _, result = watcher.run.series("opposing_signals")[0]
    assert result.steps == (1, 2, 3, 4, 5, 6, 8, 9, 10)
    assert result.swap == 1.0 and result.edge_last == pytest.approx(0.975, rel=1e-3)


def test_several_optimizers_have_no_one_threshold():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y = torch.randn(80, 2, dtype=torch.float64), torch.randn(80, 1, dtype=torch.float64)
    first, second = (torch.optim.SGD(model[i].parameters(), 0.1) for i in (0, 2))
    wanted = {"opposing_signals": {"mode": "online", "window": 4}}
    with diag.watch(model, probe=(x, y), instruments=wanted, budget=math.inf, every=1) as watcher:
        for _ in range(12):
            model.zero_grad()
            F.mse_loss(model(x), y).backward()
            first.step()
            second.step()
    assert "The optimizer does not hold parameter" in run_sentence(last(watcher.run)[1])


class Ticks:
    """A clock that each look at it puts forward, so that nothing depends on how busy the machine is."""

    def __init__(self, seconds):
        self.now, self.seconds = 0.0, seconds

    def __call__(self):
        self.now += self.seconds
        return self.now


def test_a_budget_pays_for_the_window(monkeypatch):
    """Nothing can be afforded: one measurement at the end, in the mode that needs no record."""
    monkeypatch.setattr("diag.watching.measure.runner.SPARE", 60.0)
    monkeypatch.setattr("diag.watching.measure.schedule.LEAST_LIMIT_SECONDS", 60.0)
    clock = Ticks(1e-3)
    monkeypatch.setattr(time, "perf_counter", clock)
    monkeypatch.setattr("diag.watching.guard.perf_counter", clock)
    run = watched(1.95, steps=30, budget=1e-9)
    assert [result.mode for _, result in run.series("opposing_signals")] == ["static"]
    # Its steps are so short that no share of them pays for a window.
    monkeypatch.setattr("diag.watching.watcher.checked_schedule", lambda *numbers: numbers)
    run = watched(1.95, steps=60, budget=50.0)
    online = [cost for cost in run.costs if cost.instrument == "opposing_signals"]
    spent = dict(zip([s for s, _ in run.series("opposing_signals")], [c.seconds for c in online], strict=True))
    by_step = dict(run.series("opposing_signals"))
    assert any(result.mode == "online" for result in by_step.values())
    for step, result in by_step.items():
        if result.mode == "online":  # what the record took is charged besides the instrument's own time
            assert spent[step] > result.provenance.seconds


def test_a_window_that_breaks(monkeypatch):
    from diag.instruments.opposing_signals.loss_record import Recording

    def broken(self, snapshot, step):
        raise RuntimeError("a stone in the shoe")

    monkeypatch.setattr(Recording, "add", broken)
    run = watched(1.95, steps=30)
    assert {result.mode for _, result in run.series("opposing_signals")} == {"static"}
    assert "The window of steps that opposing_signals was recording was given up at step 5 (a stone" in texts(run)
    assert not [e for e in run.events if e.kind == "internal error"]


def full_batch(model):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(96, 1, 8, 8, generator=generator)
    y = x[:, 0, :2, :2].flatten(1).argmax(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(24):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_is_bit_identical(compiled, helpers):
    """Dropout draws, BatchNorm's buffers move: neither may show that losses were recorded between the steps."""

    def train(model):
        full_batch(torch.compile(model) if compiled else model)

    unwatched, _ = helpers.final_state(train, watched=False)
    wanted = {"opposing_signals": {"window": 5, "mode": "online"}}
    watched_, run = helpers.final_state(train, True, budget=math.inf, every=1, instruments=wanted)
    helpers.assert_identical(watched_, unwatched)
    assert len(run.series("opposing_signals")) >= 2
    assert not [e for e in run.events if e.kind == "internal error"]


@pytest.mark.slow
def test_planted_digits_through_the_watch():
    """R2.1 of SCIENCE 2.5: at the edge of stability the planted rows dominate the steps and trade places."""
    from diag import datasets

    data = datasets.load_dataset("digits").shuffled(0)[slice(0, 1000)]
    x, y = data.inputs.flatten(1), data.labels
    extra = torch.zeros(len(x), 16)
    rows = [(y == c).nonzero().flatten()[:20] for c in (3, 8)]
    extra[torch.cat(rows)] = 6.0
    x = torch.cat([x - x.mean(0), extra], 1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(80, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    targets = F.one_hot(y, 10).float()
    optimizer = torch.optim.SGD(model.parameters(), 0.2)
    wanted = {"opposing_signals": {"k": 20}}
    loss = lambda outputs, wanted_: 5 * F.mse_loss(outputs, wanted_)  # noqa: E731  1/2 squared error, summed over outputs
    with diag.watch(model, probe=(x, targets), instruments=wanted, budget=math.inf) as watcher:
        descend(model, optimizer, x, targets, 320, loss)
    online = [(step, r) for step, r in watcher.run.series("opposing_signals") if r.mode == "online"]
    step, result = online[-1]
    assert step > 250 and 0.95 < result.edge_last < 1.05
    planted = [set(r.tolist()) for r in rows]
    assert {frozenset(result.group_a), frozenset(result.group_b)} == {frozenset(p) for p in planted}
    assert result.share > 0.7 and result.swap > 0.9 and result.curvature_share > 0.9
    assert result.verdict().level == Level.WARNING and "trade places" in result.verdict().sentence


# Which steps used the same examples.


def seen(*steps):
    """What is seen of steps, each a list of micro-batches."""
    examples = StepExamples()
    examples.look(True)
    for batches in steps:
        for batch in batches:
            examples.forward_called((batch,), {})
        examples.stepped([], False)
    return examples


def test_the_same_examples_in_any_order_and_any_pieces():
    x = torch.randn(60, 7)
    shuffled = x[torch.randperm(60)]
    assert seen([x], [shuffled], shuffled.split(20)).same(3)
    assert seen([x]).same(2) is None
    assert not seen([x], [x[:59]]).same(2) and not seen([x[:30]], [x[30:]]).same(2)
    assert not seen([x], []).same(2)
    assert seen([x], [shuffled]).per_step == 60


def test_one_hot_inputs_and_token_numbers():
    """Every one-hot batch has the same sum and the same sum of squares."""
    one_hot, tokens = F.one_hot(torch.arange(40) % 10), torch.arange(240).reshape(40, 6)
    assert not seen([one_hot[:20] * 0 + one_hot[0]], [one_hot[:20]]).same(2)
    assert seen([tokens], [tokens.flip(0)]).same(2) and not seen([tokens[:20]], [tokens[20:]]).same(2)
