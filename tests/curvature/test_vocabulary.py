"""The cross-entropy over many words: the same derivatives as torch's, and no logits kept."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.curvature.memory import saved_bytes
from diag.curvature.vocabulary import jacobian
from diag.curvature.vocabulary import loss as vocabulary

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


def dense_gauss_newton(model, loss_fn, tokens, targets):
    """J^T S J from the dense Jacobian of the logits and the dense Hessian of the loss in them; float64."""
    names, values = zip(*model.named_parameters(), strict=True)

    def logits(*values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (tokens,))

    parts = torch.func.jacrev(logits, tuple(range(len(values))))(*values)
    jacobian = torch.cat([part.flatten(3).flatten(0, 2) for part in parts], 1)
    z = logits(*values).detach()
    curvature = torch.func.hessian(lambda z: loss_fn(z.clone(), targets))(z).reshape(z.numel(), -1)
    return (jacobian.T @ curvature @ jacobian).detach()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "written to"])
def test_gauss_newton_products_are_those_of_dense_jacobians(small, monkeypatch, name, bias):
    """float64; with a tied or an own last weight. The largest difference is rounding's."""
    model, (tokens, targets) = problem(bias)
    split = []
    plain_init = jacobian.LastLayer.__init__
    monkeypatch.setattr(jacobian.LastLayer, "__init__", lambda *a: split.append(1) or plain_init(*a))
    gauss_newton = diag.Snapshot(model, LOSSES[name], (tokens, targets)).quantity("gauss_newton")
    dense = dense_gauss_newton(model, LOSSES[name], tokens, targets)
    v = torch.randn(gauss_newton.size, generator=torch.Generator().manual_seed(2)).double()
    torch.testing.assert_close(gauss_newton @ v, dense @ v, rtol=1e-9, atol=1e-12)
    assert split and not gauss_newton.self_test.differenced
    assert max(gauss_newton.self_test.errors.values()) < 1e-4


@pytest.mark.parametrize("frozen", ["head.weight", "head.bias", "words.weight"])
def test_what_is_frozen_counts_in_no_product(small, frozen):
    model, (tokens, targets) = problem(True)
    whole = dense_gauss_newton(model, flat, tokens, targets)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    free = torch.cat([torch.full((n,), name != frozen) for name, n in sizes.items()])
    model.get_parameter(frozen).requires_grad_(False)
    gauss_newton = diag.Snapshot(model, flat, (tokens, targets)).quantity("gauss_newton")
    v = torch.randn(gauss_newton.size, generator=torch.Generator().manual_seed(2)).double()
    torch.testing.assert_close(gauss_newton @ v, whole[free][:, free] @ v, rtol=1e-9, atol=1e-12)


def test_the_second_derivative_can_be_differentiated_again(small):
    torch.manual_seed(0)
    x, w = torch.randn(4, WIDTH).double().requires_grad_(), torch.randn(WORDS, WIDTH).double().requires_grad_()
    labels, counted = torch.tensor([1, 2, 0, 22]), torch.tensor([1.0, 1.0, 0.0, 1.0]).double()

    def loss(x, w):
        return vocabulary.Vocabulary.apply(x, w, None, labels, counted, F.linear(x, w).detach())

    torch.autograd.gradcheck(loss, (x, w))
    torch.autograd.gradgradcheck(loss, (x, w))


@pytest.mark.parametrize("quantity", ["hessian", "gauss_newton"])
def test_no_logits_are_kept(monkeypatch, quantity):
    """The graph of a gradient: with torch's own functions it keeps five tensors of their size, here none."""
    monkeypatch.setattr(vocabulary, "PIECE", 1 << 14)
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 4096)).float()
    tokens = torch.randint(0, 50, (16, 65), generator=torch.Generator().manual_seed(1))
    hessian = diag.Snapshot(model, flat, (tokens[:, :-1], tokens[:, 1:])).quantity(quantity)
    objective, curvature = hessian.objective, hessian._curvature()
    logits = 16 * 64 * 4096 * 4
    kept = []
    for least in (1, 1 << 40):
        monkeypatch.setattr(vocabulary, "LEAST", least)
        with objective.measured():
            kept.append(saved_bytes(lambda part: curvature.graph(part, part.parameters(), part.batches), objective))
    assert kept[0] < 0.1 * logits and kept[1] > 2 * logits
