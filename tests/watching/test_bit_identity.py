"""Watched training ends with the very weights, buffers and random states of unwatched training."""

import math

import pytest
import torch
from torch import nn

CHEAP = ["softmax_collapse", "neural_collapse"]
NAMES = (
    "adam",
    "sgd_momentum",
    "clipped",
    "autocast_bf16",
    "grad_scaler",
    "accumulation",
    "workers",
    "python_and_numpy_noise",
)


@pytest.mark.parametrize("name", NAMES)
def test_training_is_bit_identical(name, trainings, helpers):
    unwatched, _ = helpers.final_state(trainings[name], watched=False)
    # Measuring at every third step is far dearer than any budget allows; nothing may show it.
    watched, run = helpers.final_state(
        trainings[name], True, budget=math.inf, every=3, instruments=CHEAP, probe=helpers.images(64)
    )
    helpers.assert_identical(watched, unwatched)
    assert len(run.series("softmax_collapse")) >= 3
    assert run.history is not None and len(run.history) > 3
    assert not [e for e in run.events if e.kind == "internal error"]


def test_training_is_bit_identical_with_every_instrument(trainings, helpers):
    unwatched, _ = helpers.final_state(trainings["adam"], watched=False)
    watched, run = helpers.final_state(trainings["adam"], True, budget=1.0)
    helpers.assert_identical(watched, unwatched)
    assert run.instruments


def test_the_comparison_can_fail(trainings, helpers, monkeypatch):
    from diag.snapshot import preserve

    unwatched, _ = helpers.final_state(trainings["adam"], watched=False)
    original = preserve.preserved

    def careless(*models, mode="eval"):
        torch.rand(3)
        return original(*models, mode=mode)

    from diag.snapshot import forward

    monkeypatch.setattr(forward, "preserved", careless)
    watched, _ = helpers.final_state(trainings["adam"], True, budget=math.inf, instruments=CHEAP)
    assert any(not torch.equal(watched[n], unwatched[n]) for n in unwatched)


def test_gradients_modes_and_flags_are_left_alone(watch_all, helpers):
    model = helpers.Net()
    model.norm.eval()
    model.conv.bias.requires_grad_(False)
    x, y = helpers.images(32)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    watcher = watch_all(model, every=1, instruments=["softmax_collapse"])
    nn.functional.cross_entropy(model(x), y).backward()
    kept = [p.grad for p in model.parameters()]
    values = [None if g is None else g.clone() for g in kept]
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        optimizer.step()
        watcher.close()
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert all(p.grad is g for p, g in zip(model.parameters(), kept, strict=True))
    assert all(g is None or torch.equal(g, v) for g, v in zip(kept, values, strict=True))
    assert model.training and not model.norm.training and not model.conv.bias.requires_grad
    assert watcher.run.series("softmax_collapse")
