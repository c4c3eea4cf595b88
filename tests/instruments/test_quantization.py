"""Quantised training against numbers by hand, and layers found as they are written."""

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.instruments.quantization import Quantization, quantization, surrogate, surrogate_slope
from diag.result import Level
from diag.snapshot.inside.quantised import QuantisedWeight, quantised_weights
from diag.testing import check_result, classification, leaves_no_trace, refusal


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(context, w):
        context.save_for_backward(w)
        return w.sign()

    @staticmethod
    def backward(context, g):
        (w,) = context.saved_tensors
        return g * (w.abs() <= 1)


class Binary(nn.Linear):
    def forward(self, x):
        return F.linear(x, Sign.apply(self.weight), self.bias)


class Bits(nn.Linear):
    """Three bits with a learned scale, straight through by detaching."""

    def __init__(self, a, b):
        super().__init__(a, b)
        self.scale = nn.Parameter(torch.tensor(0.1))

    def forward(self, x):
        steps = (self.weight / self.scale).clamp(-4, 3)
        return F.linear(x, self.scale * (steps + (steps.round() - steps).detach()), self.bias)


def layer(w, upstream):
    w, g = torch.tensor(w), torch.tensor(upstream)
    return QuantisedWeight("a", w, w.sign(), 2, g, g * (w.abs() <= 1), {})


def test_error_and_instability_by_hand():
    """w = (.25, -1): f_1 = w, f_2 = (.5, -1), f_2' = (1, .5); |gradient| at o = 1 is (2, 4), at o = 2 (2, 2)."""
    found = quantization([layer([0.25, -1.0], [2.0, -4.0])])
    at = dict(zip(found.exponents, zip(found.errors, found.instabilities, strict=True), strict=True))
    assert at[1.0] == pytest.approx((0.75, 1.0)) and at[2.0] == pytest.approx((0.5, 0.0))
    assert found.error == pytest.approx(0.75) and found.instability == pytest.approx(1.0) and found.blocked == 0
    check_result(found)
    assert found.verdict().level is Level.DESCRIPTION


@pytest.mark.parametrize("o", [1.0, 2.0, 3.0])
def test_the_slope_is_the_derivative_and_is_clipped(o):
    """Autograd in float64 between the bounds; 0 beyond the clip; the chord through 0 within the inner one."""
    w = torch.tensor([-1.2, -0.4, 0.11, 0.9, 1.49], dtype=torch.float64, requires_grad=True)
    (exact,) = torch.autograd.grad(surrogate(w, o).sum(), w)
    torch.testing.assert_close(surrogate_slope(w.detach(), o), exact, atol=1e-14, rtol=1e-12)
    edge = surrogate_slope(torch.tensor([1.6, -0.05], dtype=torch.float64), o)
    assert edge[0] == 0 and float(edge[1]) == pytest.approx(0.1 ** (1 / o) / 0.1)


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 12), nn.ReLU(), Binary(12, 10), nn.ReLU(), Bits(10, 9), nn.ReLU(), nn.Linear(9, 3)
    )


def test_quantised_layers_are_found_with_their_gradients():
    """dL/dw = dL/dQ where |w| <= 1, by the layer's own backward; plain layers are left alone; several batches."""
    net, (x, y) = model(), classification().data
    given = diag.Snapshot(net, F.cross_entropy, [(x[:50], y[:50]), (x[50:], y[50:])])
    with leaves_no_trace(net):
        first, second = quantised_weights(given)
    assert (first.name, first.levels, second.name) == ("2", 2, "4") and 3 < second.levels <= 8
    F.cross_entropy(net(x), y).backward()
    torch.testing.assert_close(first.gradient, net[2].weight.grad, atol=1e-6, rtol=1e-4)
    inside = first.latent.abs() <= 1
    torch.testing.assert_close(first.upstream[inside], net[2].weight.grad[inside], atol=1e-6, rtol=1e-4)
    assert second.scales["scale"] == pytest.approx(float(net[4].scale.grad), rel=1e-3, abs=1e-6)


def test_larger_exponents_are_nearer_to_the_sign():
    """For |w| < 1, |w|^(1/o) rises to 1 with o: the error falls strictly."""
    found = quantization(diag.Snapshot(model(), F.cross_entropy, classification().data))
    assert (numpy.diff(found.errors) < 0).all() and found.num_layers == 2 and "4.scale" in found.scale_gradients


def test_disorder_counts_changes_of_sign():
    def at(g):
        q = layer([0.5, -0.5], [1.0, 1.0])
        return quantization([QuantisedWeight("a", q.latent, q.used, 2, q.upstream, q.gradient, {"s": g})])

    series = [(i, at(g)) for i, g in enumerate([1.0, -1.0, -2.0, 3.0, 1.0])]
    assert Quantization.disorder(series) == {"a.s": 0.5}


def test_two_losses_pull_on_a_scale():
    """By gradients that add up: 3 and -1 keep 2 of 4; a loss and itself keep all, a loss and its opposite
    nothing."""

    def at(g):
        q = layer([0.5, -0.5], [1.0, 1.0])
        return quantization([QuantisedWeight("a", q.latent, q.used, 2, q.upstream, q.gradient, {"s": g})])

    assert at(3.0).scale_conflict(at(-1.0)) == {"a.s": 0.5}
    plain = diag.Snapshot(model(), F.cross_entropy, classification().data)
    first, opposite = quantization(plain), quantization(plain.replace(loss_fn=lambda z, y: -F.cross_entropy(z, y)))
    assert first.scale_conflict(first) == {"4.scale": 1.0}
    assert first.scale_conflict(opposite)["4.scale"] == pytest.approx(0, abs=1e-5)


def test_a_network_that_quantises_nothing_is_refused():
    assert "no layer of the model computes with a quantised copy" in refusal(
        quantization, classification().snapshot()
    )
