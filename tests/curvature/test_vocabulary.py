"""The cross-entropy over many words: the same derivatives as torch's, and no logits kept."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.curvature import vocabulary
from diag.curvature.memory import saved_bytes

WORDS, WIDTH = 23, 5


@pytest.fixture
def small(monkeypatch):
    """Any number of logits counts as many, and pieces are of three rows."""
    monkeypatch.setattr(vocabulary, "LEAST", 1)
    monkeypatch.setattr(vocabulary, "PIECE", 3 * WORDS)


class Words(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.words, self.mix = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=bias)
        if not bias:
            self.head.weight = self.words.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.mix(self.words(tokens))))


def flat(outputs, targets, **more):
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), **more)


LOSSES = {
    "mean": flat,
    "some ignored": lambda z, t: flat(z, t, ignore_index=3),
    "sum": lambda z, t: F.cross_entropy(z.view(-1, WORDS), t.reshape(-1), reduction="sum") / t.numel(),
    "none": lambda z, t: (F.cross_entropy(z.reshape(-1, WORDS), t.flatten(), reduction="none") ** 2).mean(),
    "a temperature": lambda z, t: flat(z / 0.7, t),
    "weighted": lambda z, t: flat(z, t, weight=torch.linspace(1, 2, WORDS, dtype=z.dtype)),
    "smoothed": lambda z, t: flat(z, t, label_smoothing=0.1),
    "written to": lambda z, t: flat(z.mul_(0.7), t),
}


STANDS_IN = ("mean", "some ignored", "sum", "none")


def problem(bias):
    torch.manual_seed(0)
    tokens = torch.randint(0, WORDS, (4, 4), generator=torch.Generator().manual_seed(1))
    return Words(bias).double(), (tokens[:, :-1], tokens[:, 1:])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_products_are_those_of_torchs_own_derivatives(small, monkeypatch, name, bias):
    """float64; torch's double backward is an independent way, and both differ by rounding alone."""
    model, (tokens, targets) = problem(bias)
    taken = []
    plain_apply = vocabulary.Vocabulary.apply
    monkeypatch.setattr(vocabulary.Vocabulary, "apply", lambda *a: taken.append(1) or plain_apply(*a))
    hessian = diag.Snapshot(model, LOSSES[name], (tokens, targets)).quantity("hessian")
    parameters = list(model.parameters())
    loss = LOSSES[name](model(tokens), targets)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    v = torch.randn(hessian.size, generator=torch.Generator().manual_seed(2)).double()
    plain = torch.cat([p.flatten() for p in torch.autograd.grad(gradient @ v, parameters)])
    torch.testing.assert_close(hessian @ v, plain, rtol=1e-9, atol=1e-12)
    assert bool(taken) == (name in STANDS_IN)


def test_the_second_derivative_can_be_differentiated_again(small):
    torch.manual_seed(0)
    x, w = torch.randn(4, WIDTH).double().requires_grad_(), torch.randn(WORDS, WIDTH).double().requires_grad_()
    labels, counted = torch.tensor([1, 2, 0, 22]), torch.tensor([1.0, 1.0, 0.0, 1.0]).double()

    def loss(x, w):
        return vocabulary.Vocabulary.apply(x, w, None, labels, counted, F.linear(x, w).detach())

    torch.autograd.gradcheck(loss, (x, w))
    torch.autograd.gradgradcheck(loss, (x, w))


def test_no_logits_are_kept(monkeypatch):
    """The graph of a gradient: with torch's own functions it keeps five tensors of their size, here none."""
    monkeypatch.setattr(vocabulary, "PIECE", 1 << 14)
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 4096)).float()
    tokens = torch.randint(0, 50, (16, 65), generator=torch.Generator().manual_seed(1))
    hessian = diag.Snapshot(model, flat, (tokens[:, :-1], tokens[:, 1:])).quantity("hessian")
    objective, curvature = hessian.objective, hessian._curvature()
    logits = 16 * 64 * 4096 * 4
    kept = []
    for least in (1, 1 << 40):
        monkeypatch.setattr(vocabulary, "LEAST", least)
        with objective.measured():
            kept.append(saved_bytes(lambda part: curvature.graph(part, part.parameters(), part.batches), objective))
    assert kept[0] < 0.1 * logits and kept[1] > 2 * logits
