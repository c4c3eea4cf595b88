"""What an instrument says it costs is what it takes: products with one layer's weights are counted as they run.

A forward pass over the data multiplies each example once by the weights of a layer, a gradient three times
(forward, and backward by the input and by the weights); `passes` and the costs of quantities are stated in the
same unit. The counted layer has sizes that nothing else has.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import diag
from diag.registry import instruments

N, BEFORE, AFTER = 64, 13, 17
aten = torch.ops.aten
FIRST_FACTOR = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.baddbmm: 1}


class Passes(TorchDispatchMode):
    """Counts the rows that are multiplied by weights of BEFORE x AFTER numbers, whichever way round."""

    __module__ = "diag.testing"  # modes of others do not see what diag computes

    def __init__(self):
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        first = FIRST_FACTOR.get(func.overloadpacket)
        if first is not None:
            sizes = [*args[first].shape, args[first + 1].shape[-1]]
            if BEFORE in sizes and AFTER in sizes:
                self.rows += math.prod(sizes) // (BEFORE * AFTER)
        return func(*args, **(kwargs or {}))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))

    def forward(self, h):
        return h + self.inner(h)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(BEFORE, 1, batch_first=True)

    def forward(self, h):
        tokens = h.view(len(h), 1, BEFORE).expand(-1, 3, -1)
        return self.inner(tokens, tokens, tokens, need_weights=False)[0].mean(1)


class Rounded(nn.Linear):
    def forward(self, h):
        w = self.weight
        return F.linear(h, w + (w.sign() - w).detach(), self.bias)


def classifier(*middle):
    torch.manual_seed(0)
    layers = (nn.Linear(5, BEFORE), nn.Tanh(), *middle, nn.Linear(BEFORE, AFTER), nn.Tanh(), nn.Linear(AFTER, 3))
    model = nn.Sequential(*layers)
    previous = {name: value + 0.01 for name, value in model.state_dict().items()}
    return diag.Snapshot(model, F.cross_entropy, (torch.randn(N, 5), torch.arange(N) % 3), previous=previous)


def denoiser():
    torch.manual_seed(0)
    clean = torch.randn(N, 5)
    model = nn.Sequential(nn.Linear(5, BEFORE), nn.ReLU(), nn.Linear(BEFORE, AFTER), nn.ReLU(), nn.Linear(AFTER, 5))
    return diag.Snapshot(model, F.mse_loss, (clean + 0.3 * torch.randn(N, 5), clean))


MEASURED = {
    "attention": lambda: classifier(Attending()),
    "boundary_tilting": classifier,
    "collapse_by_layer": classifier,
    "denoising": denoiser,
    "depth_use": lambda: classifier(Block(BEFORE), Block(BEFORE)),
    "gradient_conflict": classifier,
    "initialization": classifier,
    "input_magnitude": classifier,
    "naive_loss_minimization": classifier,
    "neural_collapse": classifier,
    "quantization": lambda: classifier(Rounded(BEFORE, BEFORE)),
    "representation": classifier,
    "sharpness": classifier,
    "softmax_collapse": classifier,
    "trajectory": classifier,
    "trust_radius": classifier,
}


def stated(instrument):
    """Forward passes over the data, by the instrument itself or by the quantities that it needs."""
    passes = instrument.expected_passes({})
    return sum(cost.passes for cost in instrument.costs) if passes is None else passes


@pytest.mark.parametrize("name", MEASURED)
def test_it_takes_no_more_than_it_says(name):
    instrument, snapshot = instruments()[name], MEASURED[name]()
    snapshot.explain()  # what any first look at a model and its data takes
    with Passes() as counted:
        instrument(snapshot)
    assert 0 < counted.rows / N <= stated(instrument), f"{counted.rows / N:.1f} of {stated(instrument):.1f}"
