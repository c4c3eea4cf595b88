"""Gradients that float16 cuts to zero are told apart from ones that it holds, from bfloat16 and from a scaler's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.instruments.causes import Cause


def judged(factor, dtype=torch.float16, scaled=False, dead=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
    if dead:
        nn.init.constant_(model[2].bias, -100.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=scaled)
    with diag.watch(model, instruments=["gradient_underflow"]) as watcher:
        for _ in range(12):
            x = torch.randn(64, 16)
            with torch.autocast("cpu", dtype):
                loss = factor * F.cross_entropy(model(x), x[:, :3].argmax(1))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    return watcher.run.series("gradient_underflow")[-1][1].verdict()


def test_a_small_loss_in_float16_without_a_scaler():
    verdict = judged(4e-6)
    assert verdict.cause == Cause.GRADIENT_UNDERFLOW and verdict.level == "alarm"
    assert "0.weight" in verdict.layers


@pytest.mark.parametrize(
    ("given", "level"),
    [
        ({"factor": 1.0}, "ok"),
        ({"factor": 1.0, "dead": True}, "ok"),  # zero gradients of another cause
        ({"factor": 4e-6, "dtype": torch.bfloat16}, "not_applicable"),
        ({"factor": 4e-6, "scaled": True}, "not_applicable"),
    ],
)
def test_what_is_no_underflow(given, level):
    assert judged(**given).level == level
