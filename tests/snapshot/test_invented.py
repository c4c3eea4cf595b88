"""Networks and losses of many kinds: every number against dense float64 autograd, or a refusal that says why."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
import diag.registry
from diag.errors import DiagError

N = 12


def classes(n=N):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, 6, generator=generator)
    return x.double(), torch.randint(0, 3, (n,), generator=generator)


class Hyper(nn.Module):
    """A network whose weights another network makes for each example."""

    def __init__(self):
        super().__init__()
        self.maker = nn.Linear(2, 4 * 3)

    def forward(self, x):
        made = self.maker(x[:, :2]).view(-1, 3, 4)
        return torch.einsum("nkd,nd->nk", made, x[:, 2:].tanh())


class FixedPoint(nn.Module):
    """What a layer comes to when it is called again and again."""

    def __init__(self):
        super().__init__()
        self.inside, self.again, self.last = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = given = self.inside(x)
        for _ in range(12):
            h = torch.tanh(0.3 * self.again(h) + given)
        return self.last(h)


class Flow(nn.Module):
    """A differential equation by four Runge-Kutta steps of one field."""

    def __init__(self):
        super().__init__()
        self.field, self.last = nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 3)

    def forward(self, x):
        h = 0.25
        for _ in range(4):
            a = self.field(x)
            b = self.field(x + h / 2 * a)
            c = self.field(x + h / 2 * b)
            x = x + h / 6 * (a + 2 * b + 2 * c + self.field(x + h * c))
        return self.last(x)


class Experts(nn.Module):
    """Each example goes to the expert that a gate prefers."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(6, 3), nn.ModuleList(nn.Linear(6, 3) for _ in range(3))

    def forward(self, x):
        weights = self.gate(x).softmax(1)
        best = weights.argmax(1)
        out = x.new_zeros(len(x), 3)
        for number, expert in enumerate(self.experts):
            rows = (best == number).nonzero().flatten()
            out = out.index_add(0, rows, expert(x[rows]) * weights[rows, number, None])
        return out


class Spectral(nn.Module):
    """A layer in the space of frequencies, with real weights for both parts."""

    def __init__(self):
        super().__init__()
        self.scale, self.last = nn.Parameter(torch.randn(2, 4)), nn.Linear(6, 3)

    def forward(self, x):
        seen = torch.fft.rfft(x) * torch.complex(*self.scale)
        return self.last(torch.fft.irfft(seen, n=6).tanh())


class Routed(nn.Module):
    """Capsules: votes that are weighed by their agreement, which carries no gradient."""

    def __init__(self):
        super().__init__()
        self.votes = nn.Parameter(0.3 * torch.randn(6, 3, 4))

    def forward(self, x):
        votes = torch.einsum("ni,ikd->nikd", x, self.votes)
        agreed = x.new_zeros(len(x), 6, 3)
        for _ in range(3):
            pooled = (agreed.softmax(2)[..., None] * votes).sum(1)
            agreed = agreed + (votes * pooled[:, None]).sum(-1).detach()
        return pooled.square().sum(-1)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = nn.Linear(3, 4)

    def forward(self, a, b):
        return (self.inside(a).tanh() - self.inside(b).tanh()).square().sum(1)


def margin(distance, same):
    return torch.where(same, distance, F.relu(1 - distance.sqrt()).square()).mean()


def pairs():
    x, y = classes()
    return (x[:, :3], x[:, 3:]), y > 0


class Heads(nn.Module):
    """Three quantiles, each by a head of its own."""

    def __init__(self):
        super().__init__()
        self.body, self.heads = nn.Linear(6, 5), nn.ModuleDict({q: nn.Linear(5, 1) for q in "abc"})

    def forward(self, x):
        h = self.body(x).tanh()
        return {name: head(h)[:, 0] for name, head in self.heads.items()}


def pinball(outputs, y):
    found = 0.0
    for level, z in zip((0.1, 0.5, 0.9), outputs.values(), strict=True):
        found = found + torch.maximum(level * (y - z), (level - 1) * (y - z)).mean()
    return found / 3


def numbers():
    x, _ = classes()
    return x, x.sin().sum(1)


class Speech(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(6, 4)

    def forward(self, x):
        return self.last(x).log_softmax(-1)  # (n, time, letters)


def letters():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(N, 7, 6, generator=generator).double(), torch.randint(1, 4, (N, 3), generator=generator)


def aligned(outputs, targets):
    size = len(outputs)
    times, lengths = torch.full((size,), 7), torch.full((size,), 3)
    return F.ctc_loss(outputs.transpose(0, 1), targets, times, lengths, reduction="none").mean() / 3


class Risk(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.last = nn.Linear(6, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.last(self.inside(x).tanh())[:, 0]


def proportional(risk, time):
    """Cox's partial likelihood: each example is compared with those that lived longer."""
    order = time.argsort(descending=True)
    return -(risk[order] - risk[order].logcumsumexp(0)).mean()


CE = nn.CrossEntropyLoss()
# name: (network, loss, data, whether examples have losses of their own)
CASES = {
    "weights made by a network": (Hyper, CE, classes, True),
    "a fixed point": (FixedPoint, CE, classes, True),
    "a differential equation": (Flow, CE, classes, True),
    "experts with a gate": (Experts, CE, classes, True),
    "frequencies": (Spectral, CE, classes, True),
    "capsules": (Routed, CE, classes, True),
    "pairs with a margin": (Pair, margin, pairs, True),
    "quantiles by several heads": (Heads, pinball, numbers, True),
    "an alignment of letters": (Speech, aligned, letters, True),
    "a likelihood over ranks": (Risk, proportional, numbers, False),
}


def made(name):
    torch.manual_seed(0)
    make, loss, data, own = CASES[name]
    x, y = data()
    return make().double(), loss, (x, y), x if isinstance(x, tuple) else (x,), own


def flat(gradients, model):
    parts = zip(gradients, model.parameters(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in parts])


def dense_hessian(model, loss, args, y):
    parameters = list(model.parameters())
    value = loss(model(*args), y)
    gradient = flat(torch.autograd.grad(value, parameters, create_graph=True), model)
    rows = [flat(torch.autograd.grad(g, parameters, retain_graph=True, allow_unused=True), model) for g in gradient]
    return torch.stack(rows)


def by_differences(model, loss, args, y, h=1e-5):
    """The Hessian of a loss that torch cannot differentiate twice, by central differences of the gradient."""
    parameters = list(model.parameters())
    at = nn.utils.parameters_to_vector(parameters).detach()

    def gradient(vector):
        nn.utils.vector_to_parameters(vector, parameters)
        return flat(torch.autograd.grad(loss(model(*args), y), parameters), model)

    rows = [(gradient(at + h * e) - gradient(at - h * e)) / (2 * h) for e in torch.eye(len(at), dtype=at.dtype)]
    nn.utils.vector_to_parameters(at, parameters)
    found = torch.stack(rows)
    return (found + found.T) / 2


@pytest.mark.parametrize("name", CASES)
def test_gradient_and_curvature_are_those_of_autograd(name):
    model, loss, data, args, _ = made(name)
    snapshot = diag.Snapshot(model, loss, data)
    expected = flat(torch.autograd.grad(loss(model(*args), data[1]), list(model.parameters())), model)
    torch.testing.assert_close(flat(snapshot.quantity("gradient").values(), model), expected, rtol=1e-9, atol=1e-12)
    if name == "capsules":
        with pytest.raises(DiagError, match="detached terms"):
            diag.hessian_spectrum(snapshot, num_eigenvalues=1)
        return
    found = diag.hessian_spectrum(snapshot, num_eigenvalues=1).eigenvalues
    dense = dense_hessian if name != "an alignment of letters" else by_differences
    values = torch.linalg.eigvalsh(dense(model, loss, args, data[1]))
    assert found[0] == pytest.approx(values[-1].item(), rel=2e-3, abs=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_single_examples_or_a_refusal(name):
    model, loss, data, args, own = made(name)
    snapshot = diag.Snapshot(model, loss, data)
    if not own:
        with pytest.raises(DiagError, match="examples"):
            snapshot.quantity("per_example_gradients")
        return
    found = snapshot.quantity("per_example_gradients").norms()
    for i in range(N):
        one = loss(model(*(a[i : i + 1] for a in args)), data[1][i : i + 1])
        gradients = torch.autograd.grad(one, list(model.parameters()), allow_unused=True)
        assert float(found[i]) == pytest.approx(float(flat(gradients, model).norm()), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_every_instrument_measures_or_says_what_to_do(name):
    model, loss, data, _, _ = made(name)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    other = {n: p + 0.1 * torch.randn_like(p) for n, p in before.items()}
    snapshot = diag.Snapshot(
        model, loss, data, other=other, previous=other, optimizer=torch.optim.SGD(model.parameters(), 0.1)
    )
    for instrument, outcome in diag.registry.measure_all(snapshot).items():
        assert type(outcome).__name__ != "Failed", (instrument, outcome)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


@pytest.mark.parametrize("name", CASES)
def test_paths_begin_at_the_loss_of_the_network(name):
    model, loss, data, args, _ = made(name)
    other = {n: p + 0.1 * torch.randn_like(p) for n, p in model.state_dict().items()}
    snapshot = diag.Snapshot(model, loss, data, other=other)
    losses = diag.mode_connectivity(snapshot).losses
    assert losses[0] == pytest.approx(loss(model(*args), data[1]).item(), rel=1e-6)
    model.load_state_dict(other)
    assert losses[-1] == pytest.approx(loss(model(*args), data[1]).item(), rel=1e-6)
    assert math.isfinite(losses.max())
