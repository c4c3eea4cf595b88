"""Training is bit for bit the unwatched one, with every instrument measuring in mid-run: thirty networks and loops.

Among them are networks that keep something in Python, hooks of others, tied and derived weights, and loops that
step in unusual ways. Losses, weights, buffers, gradients, the optimizer's state, what modules keep, and the next
draw of each generator of random numbers are compared.
"""

import copy
import functools
import itertools
import math
import random

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as all_modules
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import diag
from diag.registry import instruments
from tests.watching.more_trainings import MORE

STEPS = 5


def data(n=48):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(3))
    return x, x[:, :3].argmax(1)


def mlp(first=None):
    return nn.Sequential(first or nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


class Net(nn.Module):
    """An MLP; `around(self, h)` is what a configuration adds to it between its layers."""

    def __init__(self, around=lambda self, h: h, **kept):
        super().__init__()
        self.first, self.last, self.around = nn.Linear(6, 8), nn.Linear(8, 3), around
        for name, value in kept.items():
            if isinstance(value, torch.Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x):
        return self.last(torch.tanh(self.around(self, self.first(x))))


def annealed(self, h):
    self.n += 1
    return h / (1 + 0.1 * self.n)


def bank_in_a_list(self, h):
    mean = sum(self.bank) / len(self.bank) if self.bank else 0
    self.bank.append(h.detach().mean(0))
    del self.bank[:-3]
    return h - mean


def bank_in_a_buffer(self, h):
    with torch.no_grad():
        self.bank[self.at % 4] = h.mean(0)
    self.at += 1
    return h - self.bank.mean(0)


def bound_again(self, h):
    self.count = self.count + 1
    return h * (1 + 0.1 * torch.sin(self.count))


def drawn(self, h):
    noise = torch.randn(h.shape, generator=self.torch) * 0.1
    return h + noise + self.python.random() + float(self.numpy.random())


def drawn_globally(self, h):
    return h * (1 + 0.1 * random.random()) + 0.1 * float(numpy.random.rand()) + 0.1 * torch.randn(h.shape)


def counted(self, h):
    return h * (1 + 0.1 * next(self.counter))


@functools.lru_cache
def table(n):
    return torch.rand(n, 1)


def cached(self, h):
    if h.shape[1] not in self.cache:
        self.cache[h.shape[1]] = torch.rand(())
    return h * self.cache[h.shape[1]] + table(len(h))


def carried(self, h):
    kept, self.memory = self.memory, h.detach().mean(0)
    return h if kept is None else h + kept


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.Linear(8, 8)
        self.first, self.layers, self.last = nn.Linear(6, 8), nn.ModuleList([layer] * 4), nn.Linear(8, 3)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = layer.weight

    def forward(self, x):
        x = self.first(x)
        for layer in (*self.layers, self.tied):
            x = torch.tanh(layer(x))
        return self.last(x)


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.Dropout(0.3)
        self.last = nn.Linear(16, 3)

    def forward(self, x):
        return self.last(self.drop(F.relu(self.norm(self.conv(x[:, None])))).flatten(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.last = nn.GRU(2, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.gru(x.reshape(len(x), 3, 2))[0][:, -1])


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.TransformerEncoderLayer(2, 1, 4, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.layer(x.reshape(len(x), 3, 2)).flatten(1))


class Renormalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.last = nn.Embedding(9, 8, max_norm=0.5), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.table(x.abs().mul(3).long().clamp(max=8)).mean(1))


def hooked(model, kind):
    """A network with a hook of someone else that keeps what it sees in `model.seen`."""
    model.seen = seen = []
    first, weight = next(model.children()), next(model.parameters())
    if kind == "forward":
        first.register_forward_hook(lambda m, a, o: seen.append(float(o.sum())))
        first.register_forward_pre_hook(lambda m, a: seen.append(len(a[0])))
    elif kind == "backward":
        first.register_full_backward_hook(lambda m, i, o: seen.append(float(o[0].sum())))
    elif kind == "tensor":
        weight.register_hook(lambda g: seen.append(float(g.sum())))
        weight.register_hook(lambda g: g.clamp(-0.01, 0.01))
    elif kind == "accumulated":
        weight.register_post_accumulate_grad_hook(lambda p: seen.append(float(p.grad.sum())))
    elif kind == "keeping":

        def keep(module, args, output):
            seen[:] = [output]

        first.register_forward_hook(keep)
    return model


def with_mask(model):
    prune.l1_unstructured(model[0], "weight", 0.4)
    return model


def checkpointed(reentrant):
    def around(self, h):
        return checkpoint(torch.sin, h, use_reentrant=reentrant)

    return Net(around)


SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
Adam = functools.partial(torch.optim.Adam, lr=1e-2)


def loop(model, step, optimizer=SGD, loss_of=F.cross_entropy):
    """`STEPS` plain steps; step(i) after each."""
    made, (x, y) = optimizer(model.parameters()), data()
    losses = []
    for i in range(STEPS):
        part = slice(16 * (i % 3), 16 * (i % 3) + 16)
        made.zero_grad()
        loss = loss_of(model(x[part]), y[part])
        loss.backward()
        made.step()
        losses.append(loss.item())
        step(i)
    return made, losses


def with_what_a_hook_kept(model, step):
    return loop(model, step, loss_of=lambda z, y: F.cross_entropy(z, y) + 0.1 * model.seen[0].square().mean())


def accumulating(model, step):
    made, (x, y) = Adam(model.parameters()), data()
    for i in range(2 * STEPS):
        (F.cross_entropy(model(x[8 * (i % 6) : 8 * (i % 6) + 8]), y[8 * (i % 6) : 8 * (i % 6) + 8]) / 2).backward()
        if i % 2:
            made.step()
            made.zero_grad()
            step(i // 2)
    return made, []


def closing(model, step):
    made, (x, y) = torch.optim.LBFGS(model.parameters(), max_iter=3), data()

    def closure():
        made.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    losses = []
    for i in range(STEPS):
        losses.append(float(made.step(closure)))
        step(i)
    return made, losses


def sharpness_aware(model, step):
    made, (x, y) = SGD(model.parameters()), data()
    for i in range(STEPS):
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            moves = [0.05 * p.grad / p.grad.norm() for p in model.parameters()]
            for p, move in zip(model.parameters(), moves, strict=True):
                p.add_(move)
        made.zero_grad()
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for p, move in zip(model.parameters(), moves, strict=True):
                p.sub_(move)
        made.step()
        made.zero_grad()
        step(i)
    return made, []


def scaled(model, step):
    made, (x, y), scaler = Adam(model.parameters()), data(), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i in range(STEPS):
        made.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(made)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(made)
        scaler.update()
        step(i)
    return made, []


def with_hooks_of_all_modules(model, step):
    seen = model.seen = []
    handles = [
        all_modules.register_module_forward_hook(lambda m, a, o: seen.append(type(m).__name__)),
        all_modules.register_module_full_backward_hook(lambda m, i, o: seen.append(len(o))),
    ]
    try:
        return loop(model, step)
    finally:
        for handle in handles:
            handle.remove()


# name: (the network, the loop). Those of SLOW are left to the long run of the tests.
FAST = {
    "one module under several names": (Shared, loop),
    "an annealing counter": (lambda: Net(annealed, n=0), loop),
    "a memory bank in a list": (lambda: Net(bank_in_a_list, bank=[]), loop),
    "a memory of the last batch": (lambda: Net(carried, memory=None), loop),
    "its own generators": (
        lambda: Net(drawn, python=random.Random(1), torch=torch.Generator(), numpy=numpy.random.default_rng(1)),
        loop,
    ),
    "caches": (lambda: Net(cached, cache={}), loop),
    "forward hooks": (lambda: hooked(mlp(), "forward"), loop),
    "what a hook kept in the loss": (lambda: hooked(mlp(), "keeping"), with_what_a_hook_kept),
    "tensor hooks": (lambda: hooked(mlp(), "tensor"), loop),
}  # fmt: skip
SLOW = {
    "weight norm, parametrized": (lambda: mlp(parametrizations.weight_norm(nn.Linear(6, 8))), loop),
    "batch norm and dropout": (Convolutional, loop),
    "momentum": (mlp, loop),
    "adam": (mlp, functools.partial(loop, optimizer=Adam)),
    "a memory bank in a buffer": (lambda: Net(bank_in_a_buffer, at=0, bank=torch.zeros(4, 8)), loop),
    "a buffer that is bound again": (lambda: Net(bound_again, count=torch.zeros(())), loop),
    "draws from the global generators": (lambda: Net(drawn_globally), loop),
    "an iterator": (lambda: Net(counted, counter=itertools.count()), loop),
    "backward hooks": (lambda: hooked(mlp(), "backward"), loop),
    "hooks after accumulation": (lambda: hooked(mlp(), "accumulated"), loop),
    "hooks of all modules": (mlp, with_hooks_of_all_modules),
    "spectral norm, parametrized": (lambda: mlp(parametrizations.spectral_norm(nn.Linear(6, 8))), loop),
    "spectral norm by a hook": (lambda: mlp(nn.utils.spectral_norm(nn.Linear(6, 8))), loop),
    "weight norm by a hook": (lambda: mlp(nn.utils.weight_norm(nn.Linear(6, 8))), loop),
    "pruning": (lambda: with_mask(mlp()), loop),
    "a recurrent network": (Recurrent, loop),
    "attention": (Attentive, loop),
    "an embedding that is renormalised": (Renormalised, loop),
    "checkpoints": (lambda: checkpointed(False), loop),
    "reentrant checkpoints": (lambda: checkpointed(True), loop),
    "accumulation": (Convolutional, accumulating),
    "a closure": (mlp, closing),
    "two passes a step": (mlp, sharpness_aware),
    "autocast and a scaler": (mlp, scaled),
}
CASES = [pytest.param(*v, id=k) for k, v in FAST.items()] + [
    pytest.param(*v, id=k, marks=pytest.mark.slow) for k, v in (SLOW | MORE).items()
]


def trained(make, train, measure):
    """All that training leaves, as plain data; measure(i) after step i."""
    torch.manual_seed(0)
    numpy.random.seed(0)
    random.seed(0)
    table.cache_clear()
    model = make()
    began = copy.deepcopy({k: v for k, v in vars(model).items() if k in KEPT})
    watcher = measure and diag.watch(model, budget=1e-9, probe=data(12), instruments=list(instruments()))
    optimizer, losses = train(model, (lambda i: watcher.measure() if i == STEPS // 2 else None) if watcher else id)
    if watcher:
        watcher.close()
    draws = [torch.rand(1).item(), numpy.random.rand(), random.random()]
    kept = {k: plain(v) for k, v in vars(model).items() if k in KEPT}
    assert not began or kept != {k: plain(v) for k, v in began.items()} or "cache" in kept
    gradients = [plain(p.grad) for p in model.parameters()]
    state = {n: plain(t) for n, t in model.state_dict().items()}
    moments = plain(list(optimizer.state.values()))
    found = {
        "losses": losses,
        "state": state,
        "gradients": gradients,
        "moments": moments,
        "kept": kept,
        "draws": draws,
    }
    return found, watcher


KEPT = ("n", "bank", "at", "memory", "python", "torch", "numpy", "counter", "cache", "seen")


def plain(value):
    """Values that can be compared: tensors and generators as bytes."""
    if isinstance(value, torch.Tensor):
        return (
            value.dtype,
            tuple(value.shape),
            value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes(),
        )
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, numpy.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return repr(value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "train"), CASES)
def test_training_is_bit_identical_with_every_instrument_in_mid_run(make, train):
    unwatched, _ = trained(make, train, measure=False)
    watched, watcher = trained(make, train, measure=True)
    for part in unwatched:
        assert watched[part] == unwatched[part], f"{part} differ"
    run = watcher.run
    assert not [e.text for e in run.events if e.kind == "internal error"]
    assert math.isfinite(sum(unwatched["draws"])) and len(run.history) >= STEPS
    measured = [n for n in instruments() if any(step == STEPS // 2 + 1 for step, _ in run.series(n))]
    assert "softmax_collapse" in measured and len(measured) > 5


def test_there_are_thirty():
    assert len(CASES) >= 30
