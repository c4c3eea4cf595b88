"""A penalty on the weights beside the loss: measured as it is, told where it wins, silent where it does not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.instruments.causes import Cause


def trained(added, factor=1.0, steps=60, scaler=False):
    """A short watched training whose loss is factor * cross-entropy + added(model, outputs)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    values = []
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=scaler)
    with diag.watch(model, instruments=["loss_terms"]) as watcher:
        for _ in range(steps):
            x = torch.randn(32, 8)
            outputs = model(x)
            loss = F.cross_entropy(outputs, x[:, :3].argmax(1))
            extra = added(model, outputs)
            values.append((float(extra.detach()), factor * float(loss.detach())))
            optimizer.zero_grad()
            scaler.scale(factor * loss + extra).backward()
            scaler.step(optimizer)
            scaler.update()
    return watcher.run.series("loss_terms")[-1][1], values


def l1(factor):
    return lambda model, outputs: factor * sum(p.abs().mean() for p in model.parameters())


@pytest.mark.parametrize("scaler", [False, True])
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_the_penalty_is_what_the_loss_leaves_of_the_whole(factor, scaler):
    result, values = trained(l1(30.0), factor, scaler=scaler)
    penalties, losses = (sorted(v[i] for v in values[:3]) for i in (0, 1))
    assert result.penalty == pytest.approx(penalties[1], rel=1e-4)  # a difference of float32 numbers
    assert result.loss == pytest.approx(losses[1], rel=1e-4)
    verdict = result.verdict()
    assert verdict.level == "alarm" and verdict.cause == Cause.LOSS_TERM_DOMINATES


@pytest.mark.parametrize(
    "added", [l1(0.01), lambda m, o: 50 + 1e-4 * sum(p.square().sum() for p in m.parameters())]
)
def test_a_penalty_that_leaves_the_weights_their_size_is_fine(added):
    assert trained(added)[0].verdict().level == "ok"


@pytest.mark.parametrize("added", [lambda m, o: 0 * o.sum(), lambda m, o: 3 * o.square().mean()])
def test_a_term_of_the_outputs_is_no_penalty_on_the_weights(added):
    assert trained(added)[0].verdict().level == "not_applicable"
