"""Small trainings that know nothing of diag, run once watched and once not."""

import contextlib
import copy
import math
import random

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import diag


@pytest.fixture(autouse=True)
def gradients_are_read_at_every_step(monkeypatch):
    """However long it takes on a machine that does other things as well."""
    monkeypatch.setattr("diag.watching.observe.steps.READING_FREE", 1.0)


class Net(nn.Module):
    """A conv net with everything that carries state: dropout draws, BatchNorm moves its buffers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(6 * 36, 4)

    def forward(self, x):
        return self.fc(self.drop(F.relu(self.norm(self.conv(x)))).flatten(1))


def images(n=192):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, 1, 8, 8, generator=generator)
    return x, (x[:, 0, :2, :2].flatten(1)).argmax(1)


def loader(workers=0, batch_size=16):
    return DataLoader(TensorDataset(*images()), batch_size, shuffle=True, num_workers=workers)


def plain(model, optimizer, epochs=2, data=None):
    for _ in range(epochs):
        for x, y in data or loader():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


def adam(model):
    plain(model, torch.optim.Adam(model.parameters(), 1e-2))


def sgd_momentum(model):
    plain(model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True))


def clipped(model):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for x, y in loader():
        optimizer.zero_grad()
        nn.CrossEntropyLoss(label_smoothing=0.1)(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()


def autocast_bf16(model):
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for x, y in loader():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()


def grad_scaler(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
    for x, y in loader():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()


def accumulation(model):
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for i, (x, y) in enumerate(loader(batch_size=8)):
        (F.cross_entropy(model(x), y) / 3).backward()
        if i % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()


def workers(model):
    plain(model, torch.optim.Adam(model.parameters(), 1e-2), epochs=1, data=loader(workers=2))


def python_and_numpy_noise(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for x, y in loader():
        optimizer.zero_grad()
        x = x * (1 + 0.1 * random.random()) + 0.1 * float(numpy.random.randn())
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


TRAININGS = {
    f.__name__: f
    for f in (
        adam,
        sgd_momentum,
        clipped,
        autocast_bf16,
        grad_scaler,
        accumulation,
        workers,
        python_and_numpy_noise,
    )
}


def final_state(train, watched, make=Net, **arguments):
    """Train from fixed seeds; the weights, buffers and the next draw of each generator, and the run."""
    torch.manual_seed(0)
    numpy.random.seed(0)
    random.seed(0)
    model = make()
    context = diag.watch(model, **arguments) if watched else contextlib.nullcontext()
    with context as watcher:
        train(model)
    draws = torch.tensor([torch.rand(1).item(), numpy.random.rand(), random.random()], dtype=torch.float64)
    state = copy.deepcopy(model.state_dict()) | {"next draws": draws}
    return state, (watcher.run if watched else None)


def assert_identical(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name} differs"


@pytest.fixture
def trainings():
    return TRAININGS


@pytest.fixture
def tiny():
    """(model, x, y): a float64 network small enough to check by hand."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.randn(40, 6, dtype=torch.float64)
    return model, x, x[:, :3].argmax(1)


@pytest.fixture
def watch_all():
    """diag.watch with an unlimited budget: measurements at every scheduled step."""
    made = []

    def start(model, **arguments):
        watcher = diag.watch(model, **({"budget": math.inf} | arguments))
        made.append(watcher)
        return watcher

    yield start
    for watcher in made:
        watcher.close()


@pytest.fixture
def helpers():
    class Helpers:
        Net, images, loader, plain = Net, staticmethod(images), staticmethod(loader), staticmethod(plain)
        final_state, assert_identical = staticmethod(final_state), staticmethod(assert_identical)

        @staticmethod
        def texts(run, kind=None):
            return " ".join(e.text for e in run.events if kind in (None, e.kind))

        @staticmethod
        def is_torch_untouched():
            """Whether nothing of diag is left in torch."""
            from torch.optim import optimizer as o

            bodies = [F.cross_entropy.__code__.co_name, F.mse_loss.__code__.co_name]
            patched = [torch.autograd.backward, nn.utils.clip_grad_value_, torch.amp.GradScaler.step]
            hooks = [*o._global_optimizer_pre_hooks.values(), *o._global_optimizer_post_hooks.values()]
            return (
                "_detour" not in bodies
                and not any(f.__code__.co_filename.endswith("patches.py") for f in patched)
                and not any("diag" in getattr(h, "__module__", "") for h in hooks)
            )

    return Helpers
