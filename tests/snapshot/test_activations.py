"""Statistics of activations against the activations themselves, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.snapshot.activations import MODEL_OUTPUT


class Mixed(nn.Module):
    """Functions called as modules, as functions and as methods, one of them twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.head = nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Linear(3, 2)

    def forward(self, x):
        h = self.act(self.conv(x))
        h = F.relu(h - 0.5).mean((2, 3))
        return self.head(h.tanh().sigmoid())


@pytest.fixture
def mixed():
    torch.manual_seed(0)
    return Mixed().double(), torch.randn(12, 1, 6, 6, dtype=torch.float64)


def snapshot_of(model, x, **settings):
    return diag.Snapshot(model, F.cross_entropy, (x, torch.zeros(len(x), dtype=torch.long)), **settings)


@pytest.mark.parametrize("micro_batch", [None, 5, 1])
def test_every_statistic_is_that_of_the_values(mixed, micro_batch):
    model, x = mixed
    found = snapshot_of(model, x, micro_batch=micro_batch).quantity("activations")
    conv = model.conv(x)
    h = F.relu(F.relu(conv) - 0.5).mean((2, 3))
    expected = [
        ("conv", "convolution", conv), ("act", "relu", F.relu(conv)), ("", "relu", F.relu(F.relu(conv) - 0.5)),
        ("", "tanh", h.tanh()), ("", "sigmoid", h.tanh().sigmoid()), ("head", "linear", model(x)),
        (MODEL_OUTPUT, MODEL_OUTPUT, model(x)),
    ]  # fmt: skip
    assert [(a.name, a.function) for a in found] == [(n, f) for n, f, _ in expected]
    for a, (_, _, values) in zip(found, expected, strict=True):
        rows = values.movedim(1, -1).reshape(-1, values.shape[1]).detach()
        assert a.units == rows.shape[1]
        assert a.mean == pytest.approx(float(rows.mean()), abs=1e-12)
        assert a.std == pytest.approx(float(rows.std(correction=0)), abs=1e-9)
        assert a.largest == pytest.approx(float(rows.abs().max()))
        assert a.zero == pytest.approx(float((rows == 0).double().mean()))
        assert a.dead == pytest.approx(float((rows == 0).all(0).double().mean()))
        spread = (rows.var(0, correction=0).mean() / rows.square().mean()).sqrt()
        assert a.spread == pytest.approx(float(spread), abs=1e-9)


def test_values_that_are_not_finite_are_counted_and_left_out():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    x = torch.randn(5, 2)
    x[2] = torch.inf
    found = snapshot_of(model, x).quantity("activations")
    assert found[0].non_finite == 3 and found[0].largest < 1e3


def test_the_model_is_left_as_it_was(mixed):
    model, x = mixed
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    snapshot_of(model, x).quantity("activations")
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_without_known_functions_is_refused():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return (x * self.w).sum(1)

    with pytest.raises(diag.errors.MissingQuantity, match="no layer and no nonlinearity"):
        snapshot_of(Scale(), torch.randn(4, 3)).quantity("activations")
