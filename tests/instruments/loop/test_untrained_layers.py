"""Layers that nothing trains with the numbers that they were drawn with, beside bodies that were trained before."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.instruments.causes import Cause
from diag.instruments.loop.frozen import layers_named
from diag.snapshot.loop.steps import ParameterFacts
from diag.snapshot.state.fresh import looks_fresh


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.head = nn.Linear(32, 3)
        self.cut = False

    def forward(self, x):
        with torch.set_grad_enabled(not self.cut):
            h = self.body(x)
        return self.head(h)


def rows(n=256):
    x = torch.randn(n, 20, generator=torch.Generator().manual_seed(1))
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def fit(model, parameters, steps=40, rate=0.05, loss=F.cross_entropy):
    x, y = rows()
    optimizer = torch.optim.SGD(parameters, rate, momentum=0.9)
    for i in torch.arange(steps):
        some = torch.randint(0, len(x), (32,), generator=torch.Generator().manual_seed(int(i)))
        optimizer.zero_grad()
        loss(model(x[some]), y[some]).backward()
        optimizer.step()


def told(model, train):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with diag.watch(model, instruments=["gradients_reach"]) as watcher:
            train()
    return {f.verdict.cause: f.verdict.sentence for f in watcher.findings}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def test_a_body_that_was_drawn_at_random_and_frozen_is_told(net):
    net.body.requires_grad_(False)
    sentence = told(net, lambda: fit(net, net.head.parameters()))[Cause.PARAMETER_FROZEN]
    assert sentence.startswith("Layers body.0 and body.2 run in training with weights that are as drawn at random")
    assert f"{20 * 64 + 64 * 32:,} numbers" in sentence and "requires_grad is False" in sentence


def test_a_body_whose_draws_were_made_smaller_is_told(net):
    with torch.no_grad():
        for p in net.body.parameters():
            p.mul_(0.3)
    net.body.requires_grad_(False)
    assert Cause.PARAMETER_FROZEN in told(net, lambda: fit(net, net.head.parameters()))


@pytest.mark.parametrize("rate", [0.0, 0.01])
def test_the_smallest_training_blurs_the_bound_of_smaller_draws(rate):
    """Weights of 0.3 times torch's own bound of 1/8, and those moved by a few thousandths."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    with torch.no_grad():
        layer.weight.mul_(0.3).add_(rate * 0.5 * torch.randn(64, 64))
    assert looks_fresh(layer, layer.weight) == ("" if rate else "uniform")


def test_a_body_under_no_grad_that_no_optimizer_holds_is_told(net):
    net.cut = True
    sentence = told(net, lambda: fit(net, net.head.parameters()))[Cause.PARAMETER_FROZEN]
    assert "no gradient comes there and no optimizer holds them" in sentence


def test_an_embedding_of_zeros_that_is_frozen_is_told():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(100, 16), nn.Flatten(), nn.Linear(32, 3))
    nn.init.zeros_(model[0].weight)
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[2].parameters(), 0.1)

    def train():
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randint(0, 100, (8, 2))), torch.randint(0, 3, (8,))).backward()
            optimizer.step()

    assert "zero everywhere" in told(model, train)[Cause.PARAMETER_FROZEN]


def test_a_body_that_was_trained_before_it_was_frozen_is_in_order(net):
    fit(net, net.parameters())
    net.body.requires_grad_(False)
    assert not told(net, lambda: fit(net, net.head.parameters()))


def test_a_teacher_with_random_weights_beside_its_student_is_in_order(net):
    class Distilled(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = Net(), Net().requires_grad_(False)

        def forward(self, x):
            return self.student(x) - self.teacher(x)

    model = Distilled()

    def loss(out, _):
        return out.square().mean()

    assert not told(model, lambda: fit(model, model.student.parameters(), loss=loss))


def test_a_body_that_is_not_called_or_is_trained_later_is_in_order(net):
    net.spare = nn.Linear(64, 64).requires_grad_(False)
    assert not told(net, lambda: fit(net, net.head.parameters() if net.cut else net.parameters()))
    net.body.requires_grad_(False)

    def in_turn():
        fit(net, net.parameters(), steps=10)
        net.body.requires_grad_(True)
        fit(net, net.parameters(), steps=10)

    assert not told(net, in_turn)


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(64, 48), nn.Conv2d(8, 16, 3), nn.Conv1d(16, 40, 5), nn.Embedding(200, 32),
        nn.Embedding(300, 24, padding_idx=0), nn.EmbeddingBag(200, 32), nn.Linear(2000, 30),
    ],
    ids=str,
)  # fmt: skip
def test_what_torch_draws_looks_fresh_and_what_was_changed_does_not(module):
    found = []
    for seed in range(20):
        torch.manual_seed(seed)
        module.reset_parameters()
        found.append(looks_fresh(module, module.weight))
    assert sum(kind in ("uniform", "normal") for kind in found) >= 19  # chance leaves out one in a few hundred
    with torch.no_grad():  # one direction of six tenths of the size, as a short training leaves
        size, sign = module.weight.square().mean().sqrt(), module.weight.sign()[1:2]
        module.weight += 0.6 * size * sign * torch.ones(len(module.weight)).view(-1, *[1] * (sign.ndim - 1))
    assert looks_fresh(module, module.weight) == ""


@pytest.mark.parametrize("draw", [nn.init.xavier_uniform_, nn.init.kaiming_uniform_])
def test_other_uniform_draws_look_fresh_as_do_those_of_recurrent_layers(draw):
    torch.manual_seed(0)
    linear, gru = nn.Linear(64, 48), nn.GRU(24, 40)
    draw(linear.weight)
    assert looks_fresh(linear, linear.weight) == "uniform"
    assert looks_fresh(gru, gru.weight_ih_l0) == looks_fresh(gru, gru.weight_hh_l0) == "uniform"


def test_few_numbers_halves_and_loaded_ones_tell_nothing():
    torch.manual_seed(0)
    small, half = nn.Linear(20, 20), nn.Linear(64, 64).half()
    loaded = nn.Linear(64, 64)
    nn.init.normal_(loaded.weight, std=1 / math.sqrt(3 * 64))
    assert [looks_fresh(m, m.weight) for m in (small, half, loaded)] == ["", "", ""]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["fc.weight", "fc.bias"], "Layer fc"),
        (["0.weight", "2.weight"], "Layers 0 and 2"),
        (["scale"], "Parameter scale"),
        (["scale", "shift"], "Parameters scale and shift"),
        (["fc.weight", "scale"], "Layers and parameters fc and scale"),
    ],
)
def test_a_sentence_begins_with_what_its_names_are(names, said):
    assert layers_named([ParameterFacts(name, (4,), "float32", True) for name in names]) == said
