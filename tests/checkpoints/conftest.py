"""A small model with every kind of entry, and objects that leave a trace when a pickle is allowed to run."""

import pathlib

import pytest
import torch
from torch import nn


class Net(nn.Module):
    """A convolution with BatchNorm, and a classifier tied to an embedding."""

    def __init__(self, classes=5):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.embedding = nn.Embedding(classes, 4)
        self.head = nn.Linear(4, classes, bias=False)
        self.head.weight = self.embedding.weight


class Bomb:
    """Unpickled by a loader that runs code, it makes the file `path`."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(self.path),)


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.norm.running_mean.copy_(torch.tensor([0.5, -0.5]))
    return model


@pytest.fixture
def other():
    torch.manual_seed(1)
    return Net()


@pytest.fixture
def bomb(tmp_path):
    """The bomb; after the test nothing may have gone off."""
    trace = tmp_path / "it-ran"
    yield Bomb(trace)
    assert not trace.exists(), "loading ran code from the file"


@pytest.fixture
def same():
    """Asserts that two models have bit-identical states."""

    def check(a, b):
        a, b = a.state_dict(), b.state_dict()
        assert list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)

    return check
