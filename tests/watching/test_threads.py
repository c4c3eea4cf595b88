"""Trainings in several threads are watched at once, and each record is that of its training alone."""

import threading

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag

STEPS = 60


def network(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def data(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(32, 6, generator=generator), torch.randint(0, 3, (32,), generator=generator)


def train(model, seed, barrier=None, watcher=None):
    """The losses, step by step; the threads meet between every two calls, so that they are as mixed as can be."""
    x, y = data(seed)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(STEPS):
        meet = barrier.wait if barrier is not None else lambda: None
        optimizer.zero_grad()
        outputs = model(x)
        meet()
        # A loss of the kind that is made of others, and of another one in every thread.
        loss = (
            F.cross_entropy(outputs, y, label_smoothing=0.1)
            if seed % 2
            else F.mse_loss(outputs, F.one_hot(y).float())
        )
        meet()
        loss.backward()
        meet()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        meet()
        optimizer.step()
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("budget", [0.05, float("inf")])
def test_two_trainings_in_two_threads_do_not_disturb_each_other(budget):
    barrier, alone, found, errors = threading.Barrier(2), {}, {}, []
    for seed in (1, 2):
        model = network(seed)
        alone[seed] = (train(model, seed), [p.detach().clone() for p in model.parameters()])

    models = {seed: network(seed) for seed in (1, 2)}  # here: two threads that seed one generator would mix

    def work(seed):
        try:
            model = models[seed]
            instruments = ["softmax_collapse", "gradient_coherence"]
            with diag.watch(model, instruments=instruments, budget=budget) as watcher:
                losses = train(model, seed, barrier)
            found[seed] = (losses, [p.detach().clone() for p in model.parameters()], watcher.run)
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors
    for seed in (1, 2):
        losses, weights, run = found[seed]
        assert losses == alone[seed][0] and all(map(torch.equal, weights, alone[seed][1]))
        assert len(run.history) == STEPS
        assert run.history.loss == pytest.approx(numpy.array(losses), rel=1e-6)
        notes = [event.text for event in run.events if event.kind in ("note", "internal error")]
        assert not notes, notes
        told = [event.text for event in run.events if "The loss was observed" in event.text]
        assert len(told) == 1 and ("cross_entropy" if seed % 2 else "mse_loss") in told[0]


def test_a_watch_begun_in_one_thread_follows_a_training_in_another():
    model = network(1)
    watcher = diag.watch(model, instruments=[])
    losses = []
    thread = threading.Thread(target=lambda: losses.extend(train(model, 1)))
    thread.start()
    # Meanwhile this thread has losses and backward passes of its own.
    other, (x, y) = network(2), data(2)
    for _ in range(STEPS):
        F.cross_entropy(other(x), y).backward()
    thread.join(60)
    watcher.close()
    assert watcher.run.history.loss == pytest.approx(numpy.array(losses), rel=1e-6)
    assert not [event.text for event in watcher.run.events if event.kind == "note"]
