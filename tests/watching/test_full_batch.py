"""Whether steps use all examples is known to a watch, which judges the edge of stability or says why not."""

import math

import pytest
import torch
from torch import nn

import diag
from diag.result import Level


def run_of(batches, per_step=1, steps=12):
    """The last result of a run whose steps go through `batches(step)`, `per_step` of them each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with diag.watch(model, budget=math.inf, every=4, instruments=["edge_of_stability"]) as watcher:
        for step in range(steps):
            optimizer.zero_grad()
            for x, y in batches(step):
                (nn.functional.cross_entropy(model(x), y) / per_step).backward()
            optimizer.step()
    return watcher.run.series("edge_of_stability")[-1][1]


def data(n=700):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(1))
    return x, x[:, :3].argmax(1)


def parts(x, y, size):
    return list(zip(x.split(size), y.split(size), strict=True))


@pytest.mark.parametrize("size", [700, 350])
def test_full_batches_are_judged_also_where_the_probe_is_smaller(size):
    """In one pass or accumulated over two."""
    x, y = data()
    result = run_of(lambda step: parts(x, y, size), 700 // size)
    assert result.verdict().level is Level.OK and result.unmet() is None
    assert result.ratio == pytest.approx(result.sharpness * 0.1 / 2, rel=1e-6)


def test_batches_that_differ_are_not_taken_for_all():
    x, y = data()
    result = run_of(lambda step: parts(x, y, 50)[step : step + 1])
    assert result.verdict().level is Level.NOT_APPLICABLE
    assert "the batches of training differ from step to step" in result.verdict().sentence


def test_batches_in_the_same_order_in_every_epoch_are_not_full_batches():
    x, y = data(100)
    result = run_of(lambda step: parts(x, y, 50)[step % 2 : step % 2 + 1])
    assert result.verdict().level is Level.NOT_APPLICABLE


def test_a_closure_that_is_called_again_makes_no_mini_batches():
    """Line searches call it more often in one step than in another, always on all the data."""
    torch.manual_seed(0)
    x, y = data(96)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=6, tolerance_change=1e-2)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    names = ["edge_of_stability", "opposing_signals"]
    with diag.watch(model, budget=math.inf, every=4, instruments=names) as watcher:
        for _ in range(30):
            optimizer.step(closure)
    run = watcher.run
    said = [*(e.text for e in run.events), *(o.reason for _, o in run.outcomes)]
    said += [note for name in names for _, result in run.series(name) for note in result.notes]
    said += [result.verdict().sentence for name in names for _, result in run.series(name)]
    assert not [text for text in said if "mini-batch" in text or "differ from step to step" in text]
    assert "LBFGS" in run.series("edge_of_stability")[-1][1].verdict().sentence
