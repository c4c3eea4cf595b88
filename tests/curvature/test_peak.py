"""The peak of memory, tensor by tensor: a rebuilt product needs no more than a gradient, and caps are kept."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from diag.curvature import memory as curvature_memory
from diag.curvature.matrices import Hessian
from diag.linalg.lanczos import eigenpairs, run_lanczos
from diag.snapshot.reading.forms import as_batches


class LiveBytes(TorchDispatchMode):
    """The bytes of all storages that came to be inside and are still alive: now, and at most."""

    __module__ = "diag.testing"  # modes of others do not see what diag computes

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage):
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes()
            self.now += self.alive[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key):
        self.now -= self.alive.pop(key)


def wide():
    """Vectors are what counts: 50,000 parameters, so that one vector is more than the bounds leave open, and few
    activations."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 200), nn.ReLU(), nn.Linear(200, 240), nn.GELU(), nn.Linear(240, 3))
    return model, torch.randn(256, 20), torch.randint(3, (256,))


def convolutional():
    """Activations are what counts: 700 parameters."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.SiLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    return model, torch.randn(64, 1, 16, 16), torch.randint(3, (64,))


class Transformer(nn.Module):
    """Both count: an encoder layer with attention, 80,000 parameters."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


def transformer():
    torch.manual_seed(0)
    return Transformer(), torch.randn(32, 24, 64), torch.randint(3, (32,))


def gradient_peak(model, x, y):
    model.eval()
    with LiveBytes() as live:
        grads = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters()))
    del grads
    return live.peak


def test_live_bytes_counts_a_backward_pass():
    """tanh's output and its gradient, the sum's expanded gradient (one float), the result: of 1,000 floats each."""
    x = torch.randn(1000, requires_grad=True)
    with LiveBytes() as live:
        kept = torch.autograd.grad(x.tanh().sum(), x)
    assert 2 * 4000 <= live.peak <= 3 * 4000 + 64
    assert live.now == pytest.approx(4000 * len(kept), abs=64)


@pytest.mark.parametrize("build", [wide, convolutional, transformer])
def test_rebuilt_graphs_need_a_gradient_and_four_vectors_beside_the_basis(build, monkeypatch):
    model, x, y = build()
    model.eval()
    whole = Hessian(model, nn.functional.cross_entropy, list(as_batches((x, y))))
    gradient = gradient_peak(model, x, y)
    # Just too little for the graph of all the data, so that no product is cut smaller than need be.
    short = whole.memory_plan.graph_bytes - 1
    monkeypatch.setattr(curvature_memory, "available_memory", lambda device: short)
    rebuilt = Hessian(model, nn.functional.cross_entropy, list(as_batches((x, y))), checked=whole.self_test)
    assert not rebuilt.memory_plan.retained
    with LiveBytes() as live:
        run = run_lanczos(rebuilt, None, max_products=6)
    basis = run.space.basis.numel() * run.space.basis.itemsize
    assert live.peak <= gradient + basis + 4 * 4 * rebuilt.size + 4096  # scalars and the small matrices


@pytest.mark.parametrize("build", [wide, transformer])
def test_caps_are_kept(build):
    """`memory` of the operator holds graphs, `memory` of the run holds basis and work vectors."""
    model, x, y = build()
    batches = list(as_batches((x, y)))
    free = Hessian(model, nn.functional.cross_entropy, batches)
    wanted = {"magnitude": 3, "tolerance": 1e-2}
    truth = eigenpairs(free, **wanted)
    graphs, vectors = free.memory_plan.graph_bytes // 3, 14 * 4 * free.size
    capped = Hessian(model, nn.functional.cross_entropy, batches, memory=graphs, checked=free.self_test)
    assert not capped.memory_plan.retained
    with LiveBytes() as live:
        found = eigenpairs(capped, **wanted, memory=vectors, vectors=False)
    assert live.peak <= graphs + vectors + 65536  # T and its eigenvectors
    assert ((found.values - truth.values).abs() <= 2e-2 * truth.values[0]).all()
