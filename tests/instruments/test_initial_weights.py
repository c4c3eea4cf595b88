"""The weights that training begins with: constant, too large, too small, and the starts that are meant."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import diag
from diag.instruments.causes import Cause
from diag.snapshot.loop.facts import Loop
from diag.watching.observe.loop.start import starting_weights


def mlp(*widths):
    torch.manual_seed(0)
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def judged(model):
    return diag.initial_weights(loop=Loop(step=1, start=starting_weights(model))).verdict()


def changed(change, model=None):
    model = model or mlp(64, 32, 32, 10)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                change(p)
    return model


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda p: p.zero_(), Cause.INITIALIZATION_CONSTANT),
        (lambda p: p.fill_(0.1), Cause.INITIALIZATION_CONSTANT),
        (lambda p: p.mul_(8), Cause.INITIALIZATION_SCALE),
        (lambda p: p.mul_(0.01), Cause.INITIALIZATION_SCALE),
        (lambda p: None, ""),
        (lambda p: nn.init.orthogonal_(p), ""),
        (lambda p: nn.init.kaiming_normal_(p), ""),
        (lambda p: nn.init.normal_(p, std=0.02), ""),
    ],
)
def test_the_start_is_judged_by_its_size_and_spread(change, cause):
    assert judged(changed(change)).cause == cause


def test_the_gain_is_the_standard_deviation_times_the_root_of_the_fan_in():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 64, 3), nn.Flatten(), nn.LSTM(32, 64))
    convolution, *recurrent = starting_weights(model)
    # uniform between -b and b with b = 1 / sqrt(fan-in): variance b^2 / 3; 4,608 entries, so 1.5 % either way
    assert convolution.gain == pytest.approx(3**-0.5, rel=0.05)
    # torch starts an LSTM between -1 / sqrt(hidden) and that: variance 1 / (3 * 64), times the fan-in
    assert [w.gain for w in recurrent] == pytest.approx([(32 / 64 / 3) ** 0.5, 3**-0.5], rel=0.05)


class LowRank(nn.Module):
    """A layer with an update that begins at zero, as LoRA's."""

    def __init__(self):
        super().__init__()
        self.linear, self.down, self.up = nn.Linear(16, 16), nn.Linear(16, 4), nn.Linear(4, 16)
        nn.init.zeros_(self.up.weight)


def test_branches_that_end_in_zero_are_meant():
    assert judged(nn.Sequential(*[LowRank() for _ in range(4)])).level == "ok"


class Equalized(nn.Linear):
    """Multiplies its weight, which starts at size one, by a constant in its forward pass."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight / self.in_features**0.5, self.bias)


def test_a_layer_that_makes_its_weight_first_is_not_judged():
    made = [nn.init.normal_(Equalized(64, 64).weight) is None or Equalized(64, 64) for _ in range(3)]
    assert judged(nn.Sequential(*made)).level == "not_applicable"
    normed = nn.Sequential(*[parametrizations.spectral_norm(nn.Linear(32, 32)) for _ in range(3)])
    assert judged(changed(lambda p: p.mul_(50), normed)).level == "not_applicable"
    embedding, head = nn.Embedding(50, 32), nn.Linear(32, 50, bias=False)
    head.weight = embedding.weight
    assert starting_weights(nn.Sequential(embedding, head)) == ()


def test_a_watch_sees_the_start_and_not_where_a_run_goes_on(tmp_path):
    model = changed(lambda p: p.zero_())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train():
        loss = nn.functional.cross_entropy(model(torch.randn(8, 64)), torch.arange(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for number, cause in enumerate((Cause.INITIALIZATION_CONSTANT, "")):
        with diag.watch(model, run=tmp_path / "run", resume=number > 0, instruments=["initial_weights"]) as watcher:
            train()
        told = [f.verdict.cause for f in watcher.findings]
        assert told == [cause] * bool(cause)
