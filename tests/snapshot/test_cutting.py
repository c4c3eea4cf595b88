"""An input is cut into examples only where calling the model on a part shows that it belongs to them.

Masks with as many positions as there are sequences, nodes of one graph, packed sequences and time-major data: each
number against one computed without any cutting, or a refusal that says what ties the examples.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence

import diag
import diag.registry
from diag.errors import InvalidInput, Unsupported
from diag.snapshot.cutting import Cutting
from diag.snapshot.reading.forms import as_batch

T = N = 8


class Masked(nn.Module):
    """Attention over T positions under a mask (T, T) that comes with the inputs."""

    def __init__(self):
        super().__init__()
        self.inside, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x, mask):
        h = self.inside(x)
        scores = (h @ h.transpose(1, 2)).masked_fill(mask, -torch.inf)
        return self.last((scores.softmax(-1) @ h).mean(1))


class Graph(nn.Module):
    """Layers over all nodes at once: (nodes, 4) and their adjacency (nodes, nodes), or their edges (2, m)."""

    def __init__(self, deep=False):
        super().__init__()
        self.first, self.last, self.deep = nn.Linear(4, 6), nn.Linear(6, 3), deep

    def forward(self, x, among):
        if among.is_floating_point():
            h = torch.tanh(self.first(among @ x if self.deep else x))
            return self.last(among @ h)
        h = torch.tanh(self.first(x))
        return self.last(h.index_add(0, among[1], h[among[0]]))


class Packed(nn.Module):
    def __init__(self, tags=False):
        super().__init__()
        self.gru, self.last, self.tags = nn.GRU(4, 5), nn.Linear(5, 3), tags

    def forward(self, packed):
        every, state = self.gru(packed)
        return self.last(every.data if self.tags else state[-1])


class TimeMajor(nn.Module):
    def __init__(self, tags=False):
        super().__init__()
        self.gru, self.last, self.tags = nn.GRU(4, 5), nn.Linear(5, 3), tags

    def forward(self, x):
        every, _ = self.gru(x)
        return self.last(every if self.tags else every[-1])


def masked():
    return Masked(), (torch.randn(N, T, 4), torch.triu(torch.ones(T, T), 1).bool()), torch.randint(0, 3, (N,))


def neighbours():
    """Of one layer: each node's row of the adjacency is its own, and the features belong to all."""
    return Graph(), (torch.randn(12, 4), torch.rand(12, 12) / 12), torch.randint(0, 3, (12,))


def adjacency():
    return Graph(deep=True), (torch.randn(12, 4), torch.rand(12, 12) / 12), torch.randint(0, 3, (12,))


def edges():
    return Graph(), (torch.randn(12, 4), torch.randint(0, 12, (2, 30))), torch.randint(0, 3, (12,))


def packed():
    sequences = [torch.randn(n, 4) for n in (3, 7, 2, 5, 4, 6, 1, 8, 3)]
    return Packed(), (pack_sequence(sequences, enforce_sorted=False),), torch.randint(0, 3, (9,))


def packed_tags():
    _, (sequences,), _ = packed()
    return Packed(tags=True), (sequences,), torch.randint(0, 3, (len(sequences.data),))


def time_major():
    return TimeMajor(), (torch.randn(7, N, 4),), torch.randint(0, 3, (N,))


def time_major_square():
    return TimeMajor(), (torch.randn(N, N, 4),), torch.randint(0, 3, (N,))


def bags():
    x = torch.randint(0, 20, (30,))

    class Bags(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag, self.last = nn.EmbeddingBag(20, 4), nn.Linear(4, 3)

        def forward(self, x, offsets):
            return self.last(self.bag(x, offsets))

    return Bags(), (x, torch.arange(0, 30, 3)), torch.randint(0, 3, (10,))


def batch_statistics():
    norm = nn.BatchNorm1d(6, track_running_stats=False)
    return nn.Sequential(nn.Linear(4, 6), norm, nn.Linear(6, 3)), (torch.randn(N, 4),), torch.randint(0, 3, (N,))


INDEPENDENT = {"a mask for all": masked, "rows of an adjacency": neighbours, "packed sequences": packed}
TIED = {
    "a graph's adjacency": adjacency,
    "a graph's edges": edges,
    "tags of packed sequences": packed_tags,
    "time first": time_major,
    "time first, as many steps as sequences": time_major_square,
    "bags that begin at offsets": bags,
}
WHAT_TIES = {
    "tags of packed sequences": "the targets do not hold one entry for each example",
    "time first": "no axis of the inputs holds the examples first",
    "the statistics of the batch": r"1 \(BatchNorm1d\) normalises by the statistics of the batch",
}


def made(make):
    torch.manual_seed(0)
    model, args, y = make()
    model, args = model.double(), tuple(doubled(a) for a in args)
    return model, args, y


def doubled(value):
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    return value.to(torch.float64)


def dense_hessian(model, args, y):
    values = dict(model.named_parameters())
    shapes = [p.shape for p in values.values()]

    def loss(vector):
        parts = vector.split([s.numel() for s in shapes])
        point = {n: v.view(s) for n, v, s in zip(values, parts, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, point, args), y)

    at = torch.cat([p.detach().reshape(-1) for p in values.values()])
    return torch.autograd.functional.hessian(loss, at)


@pytest.mark.parametrize("micro_batch", [None, 3])
@pytest.mark.parametrize("name", [n for n in [*INDEPENDENT, *TIED] if "bags" not in n])  # not differentiable twice
def test_loss_and_curvature_are_those_of_the_whole_batch(name, micro_batch):
    model, args, y = made((INDEPENDENT | TIED)[name])
    loss = F.cross_entropy(model(*args), y)
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    snapshot = diag.Snapshot(model, nn.CrossEntropyLoss(), (args, y), micro_batch=micro_batch)
    for (parameter, found), expected in zip(snapshot.quantity("gradient").items(), gradient, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10, msg=parameter)
    top = torch.linalg.eigvalsh(dense_hessian(model, args, y))[-1].item()
    assert diag.hessian_spectrum(snapshot, num_eigenvalues=1).eigenvalues[0] == pytest.approx(top, rel=2e-3)


@pytest.mark.parametrize("name", INDEPENDENT)
def test_gradients_of_single_examples_are_those_of_single_losses(name):
    model, args, y = made(INDEPENDENT[name])
    losses = F.cross_entropy(model(*args), y, reduction="none")
    own = [torch.autograd.grad(value, list(model.parameters()), retain_graph=True) for value in losses]
    norms = torch.stack([torch.cat([g.reshape(-1) for g in each]).norm() for each in own])
    snapshot = diag.Snapshot(model, nn.CrossEntropyLoss(), (args, y))
    assert snapshot.num_examples == len(y)
    torch.testing.assert_close(snapshot.quantity("per_example_gradients").norms(), norms, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", [*TIED, "the statistics of the batch"])
def test_examples_that_cannot_be_taken_apart_have_no_gradients_of_their_own(name):
    model, args, y = made(TIED.get(name, batch_statistics))
    snapshot = diag.Snapshot(model, nn.CrossEntropyLoss(), (args, y))
    reason = WHAT_TIES.get(
        name, "a mean, attention or sorting over the batch, one graph or one mask for all ties them"
    )
    with pytest.raises(Unsupported, match=f"depend on the others of its batch, .*: {reason}"):
        snapshot.quantity("per_example_gradients")


def test_tags_of_time_major_sequences_are_refused():
    torch.manual_seed(0)
    x, y = torch.randn(7, N, 4), torch.randint(0, 3, (7, N))
    loss = lambda z, y: F.cross_entropy(z.reshape(-1, 3), y.reshape(-1))  # noqa: E731
    model = TimeMajor(tags=True)
    snapshot = diag.Snapshot(model, loss, (x, y))
    accuracy = (model(x).argmax(-1) == y).float().mean().item()
    assert diag.softmax_collapse(snapshot).accuracy == pytest.approx(accuracy)
    with pytest.raises(InvalidInput, match="second axis of the inputs"):
        diag.gradient_coherence(snapshot)


def test_tokens_with_the_examples_first_are_not_taken_for_time_major():
    torch.manual_seed(0)
    x, y = torch.randint(0, 9, (6, 5)), torch.randint(0, 3, (6, 5))
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3))
    batch = Cutting().settled(model, as_batch((x, y)))
    assert (batch.size, batch.coupled, batch.shared) == (6, False, frozenset())


def test_a_model_that_draws_random_numbers_tells_nothing():
    class Drawing(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(4, 3)

        def forward(self, x):
            return self.last(x + torch.randn_like(x))

    batch = Cutting().settled(Drawing(), as_batch((torch.randn(6, 4), torch.zeros(6).long())))
    assert not batch.coupled


def test_one_form_is_tried_once_and_the_model_left_as_it_was(monkeypatch):
    torch.manual_seed(0)
    calls, forward = [], nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda m, x: calls.append(len(x)) or forward(m, x))
    model, cutting = nn.Linear(4, 3), Cutting()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    for _ in range(3):
        cutting.settled(model, as_batch((torch.ones(6, 4), torch.zeros(6).long())))
    assert calls == [6, 3] and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


@pytest.mark.parametrize("make", [masked, packed, adjacency, time_major])
def test_a_watched_run_measures_the_whole_batch(make):
    model, args, y = made(make)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with diag.watch(model, budget=1e-9, instruments=["hessian_spectrum", "softmax_collapse"]) as watcher:
        for i in range(4):
            if i == 3:
                top = torch.linalg.eigvalsh(dense_hessian(model, args, y))[-1].item()
                watcher.measure()
            optimizer.zero_grad()
            F.cross_entropy(model(*args), y).backward()
            optimizer.step()
    found = watcher.run.series("hessian_spectrum")[-1][1]
    assert found.eigenvalues[0] == pytest.approx(top, rel=2e-3)
    assert watcher.run.series("softmax_collapse")[-1][1].margins.shape == (len(y),)


@pytest.mark.parametrize("name", [*INDEPENDENT, *TIED])
def test_every_instrument_measures_or_refuses(name):
    model, args, y = made((INDEPENDENT | TIED)[name])
    snapshot = diag.Snapshot(model, nn.CrossEntropyLoss(), (args, y), other=copy.deepcopy(model).state_dict())
    for instrument, outcome in diag.registry.measure_all(snapshot).items():
        assert type(outcome).__name__ != "Failed", (instrument, outcome)


def test_a_part_of_packed_sequences_is_packed_again():
    _, (sequences,), y = packed()
    batch = as_batch((sequences, y))
    assert batch.size == 9
    part = batch.slice(2, 5).args[0]
    for found, expected in zip(
        torch.nn.utils.rnn.unpack_sequence(part),
        torch.nn.utils.rnn.unpack_sequence(sequences)[2:5],
        strict=True,
    ):
        assert torch.equal(found, expected)
    with pytest.raises(InvalidInput, match=r"A batch is an object; expected \(inputs, targets\)"):
        as_batch(object())
