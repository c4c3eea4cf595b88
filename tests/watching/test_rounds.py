"""Which optimizer steps make a row of the record, where several optimizers hold parts of a model or share them."""

import math

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.watching.observe.rounds import Rounds


def played(events):
    """The rounds that a loop makes: each event is an optimizer's number, or None for a training pass; optimizer 1
    steps all parameters. Gives each round with whether it was handed over at its own last step."""
    rounds, found = Rounds(), []

    def hand_over(in_step):
        found.append((tuple(sorted(rounds.stepped)), in_step))
        rounds.close()

    for event in events:
        if event is None:
            if rounds.stepped:
                hand_over(False)
            rounds.gone_on()
            continue
        if rounds.is_again(event):
            hand_over(False)
        if not rounds.is_late(event) and rounds.is_complete(event, everything=event == 1 or 1 in rounds.stepped):
            hand_over(True)
    return found


def test_the_second_of_two_optimizers_is_waited_for_once_it_was_seen():
    assert played([None, 1, 2] * 4) == [((1,), True)] + [((1, 2), True)] * 3
    assert played([None, 2, 1] * 4) == [((1, 2), True)] * 4


def test_one_that_steps_now_and_then_leaves_the_rounds_whole():
    loop = [None, 1, None, 1, None, 1, 2]
    found = played(loop * 5)
    assert len(found) == 15 and [kind for kind, _ in found[3:]] == [(1,), (1,), (1, 2)] * 4
    # Only where nobody can follow is it known at once that a round is over.
    assert [at_once for _, at_once in found[3:6]] == [False, False, True]


def test_optimizers_in_turn_each_make_a_round():
    assert played([None, 1, None, 3] * 3)[2:] == [((1,), True), ((3,), True)] * 2


def test_an_optimizer_that_is_gone_is_not_waited_for_for_ever():
    found = played([None, 1, 2] * 3 + [None, 1] * 60)
    assert found[-1] == ((1,), True) and found[5] == ((1,), False)


def test_without_a_pass_the_same_optimizer_begins_the_next_round():
    assert played([1, 1, 1]) == [((1,), True)] * 3
    assert [kind for kind, _ in played([1, 2] * 4)] == [(1,), (1, 2), (1, 2), (1, 2)]


def test_two_optimizers_that_share_a_tensor_make_one_row_a_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(16, 4), torch.randint(0, 3, (16,))
    both = torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD([model[2].weight], 0.1)
    gradients, updates = [], []
    with diag.watch(model, instruments=[]) as watcher:
        for _ in range(12):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            before = model[2].weight.detach().clone()
            gradients.append([float(p.grad.norm()) for p in model.parameters()])
            for optimizer in both:
                optimizer.step()
            updates.append(float((model[2].weight.detach() - before).norm()))
    history = watcher.run.history
    assert len(history) == 12
    assert history.gradient_norm == pytest.approx(numpy.array(gradients), rel=1e-5)
    total = numpy.sqrt(numpy.square(gradients).sum(1))
    assert history.applied_gradient_norm == pytest.approx(total, rel=1e-5)  # the shared tensor counts once
    # At the first batch nobody could know that a second optimizer would follow.
    assert history.update_norm[1:10, 2] == pytest.approx(updates[1:10], rel=1e-4)


def test_many_small_tensors_have_the_norms_of_each(monkeypatch):
    from diag.watching.observe.norms import norms

    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(int(n), generator=generator) * 10.0 ** (int(n) % 40 - 20) for n in range(1, 300)]
    tensors += [torch.zeros(0), torch.zeros(()), torch.tensor([float("nan")]), torch.tensor([float("inf"), 1.0])]
    tensors += [torch.randn(3, 5, generator=generator).T, torch.randn(4, dtype=torch.float64, generator=generator)]
    exact = numpy.array([float(torch.linalg.vector_norm(t.double())) for t in tensors])
    assert norms(tensors) == pytest.approx(exact, rel=1e-6, nan_ok=True)
    assert norms(tensors[:3]) == pytest.approx(exact[:3], rel=1e-6)


def test_gradients_that_take_too_long_are_read_now_and_then(monkeypatch):
    monkeypatch.setattr("diag.watching.observe.steps.READING_FREE", 0.0)
    monkeypatch.setattr("diag.watching.observe.steps.READING_SHARE", 0.0)
    model = nn.Linear(4, 3)
    x, y = torch.randn(16, 4), torch.randint(0, 3, (16,))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with diag.watch(model, instruments=[]) as watcher:
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    history = watcher.run.history
    seen = history.steps[~numpy.isnan(history.gradient_norm).any(1)]
    assert seen[:10].tolist() == list(range(1, 11)) and len(seen) < 40  # geometric
    assert not numpy.isnan(history.loss).any()
    assert any("recorded at some of the steps only" in note for note in history.notes)


class Words(nn.Module):
    """The first parameter's first numbers never get a gradient: those of the padding."""

    def __init__(self):
        super().__init__()
        self.words, self.norm, self.head = nn.Embedding(900, 8, padding_idx=0), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.norm(self.words((x.abs() * 9).long() + 1).mean(1)))


class FirstUnused(nn.Module):
    def __init__(self):
        super().__init__()
        self.unused, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(x)


def switched_off():
    """The first unit of the first layer is dead."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        model[0].weight[0], model[0].bias[0] = 0.0, -1.0
    return model


def smooth():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def plain_step(model, optimizer, backward):
    backward()
    optimizer.step()


def clipped_step(model, optimizer, backward):
    """Clipping multiplies all of them by what is not a number."""
    backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def clamped_step(model, optimizer, backward):
    """Clipping makes infinite ones finite again."""
    backward()
    nn.utils.clip_grad_value_(model.parameters(), 1.0)
    optimizer.step()


@pytest.mark.parametrize(
    ("make", "make_step"),
    [
        (smooth, plain_step),
        (Words, plain_step),
        (switched_off, plain_step),
        (FirstUnused, plain_step),
        (smooth, clipped_step),
        (smooth, clamped_step),
    ],
)
def test_gradients_that_are_not_finite_are_read_at_their_step(make, make_step, monkeypatch):
    """Also where the gradients of most steps are not read, and the loss of that step is finite."""
    monkeypatch.setattr("diag.watching.observe.steps.READING_FREE", 0.0)
    monkeypatch.setattr("diag.watching.observe.steps.READING_SHARE", 0.0)
    monkeypatch.setattr("diag.watching.measure.schedule.OFTEN_SHARE", 0.0)  # however long they take: 35, 53
    torch.manual_seed(0)
    model = make()
    x, y = torch.randn(16, 4), torch.randint(0, 3, (16,))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    names = [name for name, _ in model.named_parameters()]
    with diag.watch(model, instruments=[]) as watcher:
        for step in range(1, 60):
            optimizer.zero_grad()
            outputs = model(x)
            if step == 49:  # the root of a zero has the slope infinity, and its value is finite
                outputs.register_hook(lambda gradient: gradient.abs() * math.inf)
            loss = F.cross_entropy(outputs, y)
            make_step(model, optimizer, loss.backward)
    history = watcher.run.history
    finite = history.gradient_finite.all(1)
    assert math.isfinite(history.loss[48])
    assert numpy.flatnonzero(~finite)[0] == 48 and not history.gradient_finite[48, len(names) - 1]
    assert numpy.isnan(history.gradient_norm[46:48]).all()


def test_where_gradients_are_not_finite_is_told_before_they_are_clipped(monkeypatch):
    """Clipping by their norm makes all of them NaN."""
    monkeypatch.setattr("diag.watching.observe.steps.READING_FREE", 0.0)
    monkeypatch.setattr("diag.watching.observe.steps.READING_SHARE", 0.0)
    monkeypatch.setattr("diag.watching.measure.schedule.OFTEN_SHARE", 0.0)
    torch.manual_seed(0)
    model = smooth()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y = torch.randn(16, 4), torch.randint(0, 3, (16,))
    with diag.watch(model, instruments=[]) as watcher:
        for step in range(1, 51):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if step == 49:
                model[0].weight.grad[2, 1] = math.inf
            clipped_step(model, optimizer, lambda: None)
    history = watcher.run.history
    assert history.gradient_finite[48].tolist() == [False, True, True, True]
    assert numpy.isfinite(history.gradient_norm[48, 1:]).all()
