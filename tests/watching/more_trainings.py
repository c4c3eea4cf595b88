"""More networks and loops for the comparison with an unwatched twin: other optimizers, dtypes, layouts, averages.

Each loop takes the model and `step(i)`, called after each step, and gives the optimizer and plain numbers.
"""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence

STEPS = 5


def data(n=48):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(3))
    return x, x[:, :3].argmax(1)


def mlp(first=None):
    return nn.Sequential(first or nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def frozen():
    model = mlp()
    model[0].requires_grad_(False)
    return model


class ChannelsLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(2, 4, 2), nn.Linear(8, 3)
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        images = x.reshape(len(x), 1, 2, 3).expand(-1, 2, -1, -1).contiguous(memory_format=torch.channels_last)
        return self.last(F.relu(self.conv(images)).flatten(1))


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8, dtype=torch.cfloat) * 0.3)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        return self.last((x.to(torch.cfloat) @ self.weight).abs())


class HalfInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp().to(torch.bfloat16)

    def forward(self, x):
        return self.body(x.to(torch.bfloat16)).float()


class PackedInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.last = nn.LSTM(2, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        lengths = (x[:, 0] > 0).long().cpu() + 2
        packed = pack_padded_sequence(x.reshape(len(x), 3, 2), lengths, batch_first=True, enforce_sorted=False)
        return self.last(self.lstm(packed)[1][0][-1])


class Tied(nn.Module):
    """An embedding whose weight is the classifier's, too."""

    def __init__(self):
        super().__init__()
        self.table, self.mixed, self.last = nn.Embedding(3, 8), nn.Linear(8, 8), nn.Linear(8, 3, bias=False)
        self.last.weight = self.table.weight

    def forward(self, x):
        return self.last(torch.tanh(self.mixed(self.table(x.abs().long().clamp(max=2)).mean(1))))


class OfTransformers(nn.Module):
    def __init__(self):
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = transformers.GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=2)
        self.inner = transformers.GPT2LMHeadModel(config)

    def forward(self, x):
        return self.inner(input_ids=x.abs().mul(3).long().clamp(max=8)).logits[:, -1, :3]


class Signs(torch.optim.Optimizer):
    """An optimizer of one's own, which keeps a mean and steps by its signs."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                    mean.lerp_(p.grad, 0.1)
                    p.sub_(mean.sign(), alpha=group["lr"])


def batches():
    x, y = data()
    for i in range(STEPS):
        yield i, x[16 * (i % 3) : 16 * (i % 3) + 16], y[16 * (i % 3) : 16 * (i % 3) + 16]


SGD = functools.partial(torch.optim.SGD, lr=0.1)


def loop(model, step, make=SGD, change=lambda model: None, schedule=None):
    """Plain steps; change(model) between backward pass and step; schedule(optimizer) makes a scheduler."""
    made = make([p for p in model.parameters() if p.requires_grad])
    scheduler = schedule(made) if schedule else None
    losses = []
    for i, x, y in batches():
        made.zero_grad(set_to_none=i % 2 == 0)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        change(model)
        made.step()
        if scheduler is not None:
            scheduler.step()
        losses += [loss.item(), made.param_groups[0]["lr"]]
        step(i)
    return made, losses


def averaging(model, step):
    average = copy.deepcopy(model)

    def after(i):
        with torch.no_grad():
            for a, p in zip(average.parameters(), model.parameters(), strict=True):
                a.lerp_(p, 0.2)
        step(i)

    made, losses = loop(model, after)
    return made, [*losses, *(p.double().sum().item() for p in average.parameters())]


def adversarial(model, step):
    """The watched one tells what another network makes from what is real."""
    maker = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 6))
    ours, theirs = (torch.optim.Adam(m.parameters(), 1e-2) for m in (model, maker))
    losses = []
    for i, x, y in batches():
        made = maker(torch.randn(len(x), 2))
        ours.zero_grad()
        told = F.cross_entropy(model(x), y) + F.cross_entropy(model(made.detach()), torch.zeros_like(y))
        told.backward()
        ours.step()
        theirs.zero_grad()
        F.cross_entropy(model(made), torch.ones_like(y)).backward()
        theirs.step()
        losses.append(told.item())
        step(i)
    return ours, [*losses, *(p.double().sum().item() for p in maker.parameters())]


def compiled(model, step):
    model.compile(backend="eager")
    return loop(model, step)


def clipped(model):
    nn.utils.clip_grad_value_(model.parameters(), 0.01)


def noisy(model):
    for p in model.parameters():
        p.grad.add_(torch.randn_like(p), alpha=0.01)


def optimizer(name, **settings):
    return functools.partial(loop, make=functools.partial(getattr(torch.optim, name), **settings))


MORE = {
    "a frozen layer": (frozen, loop),
    "channels last": (ChannelsLast, loop),
    "complex weights": (Complex, loop),
    "weights in bfloat16": (HalfInside, loop),
    "packed sequences": (PackedInside, loop),
    "a tied embedding": (Tied, loop),
    "a model of transformers": (OfTransformers, loop),
    "an orthogonal layer": (lambda: mlp(parametrizations.orthogonal(nn.Linear(6, 8))), loop),
    "an average of the weights": (mlp, averaging),
    "two networks against each other": (mlp, adversarial),
    "a compiled call": (mlp, compiled),
    "values clipped": (mlp, functools.partial(loop, change=clipped)),
    "noise in the gradients": (mlp, functools.partial(loop, change=noisy)),
    "a schedule": (
        mlp,
        functools.partial(loop, schedule=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=STEPS)),
    ),
    "adam at once": (mlp, optimizer("Adam", lr=1e-2, foreach=True)),
    "adam in one kernel": (mlp, optimizer("Adam", lr=1e-2, fused=True)),
    "decoupled decay, largest moments": (mlp, optimizer("AdamW", lr=1e-2, amsgrad=True, maximize=True)),
    "rmsprop, centred": (mlp, optimizer("RMSprop", lr=1e-2, centered=True, momentum=0.9)),
    "an optimizer of one's own": (mlp, functools.partial(loop, make=Signs)),
}
