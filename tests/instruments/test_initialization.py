"""Initialisation against the recursions of wide networks, exact identities and dense Jacobians."""

import math

import numpy
import pytest
import torch
from torch import nn

import diag
from diag.errors import InvalidInput
from diag.instruments.initialization import Initialization, initialization, relative_variance
from diag.result import Level
from diag.testing import check_result, leaves_no_trace, refusal


def stack(width, depth, variance, act, *, inputs=None, bias=0.0, seed=0, dtype=torch.float32):
    """Linear layers of one width with weights of variance `variance` / fan-in, `act` between them."""
    torch.manual_seed(seed)
    layers = []
    for i in range(depth):
        layer = nn.Linear(inputs or width if i == 0 else width, width)
        nn.init.normal_(layer.weight, std=math.sqrt(variance / layer.in_features))
        nn.init.normal_(layer.bias, std=math.sqrt(bias)) if bias else nn.init.zeros_(layer.bias)
        layers += [layer, act()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def measure(model, n=64, inputs=None, dtype=torch.float32):
    width = inputs or model[0].in_features
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    return initialization(diag.Snapshot(model, None, (x, torch.zeros(n, dtype=torch.long))))


@pytest.mark.parametrize("variance", [1.0, 2.0])
def test_relu_has_both_susceptibilities_of_half_the_variance(variance):
    """Width 500: a layer's mean fluctuates by sqrt(5 / 500) = 10 %, four layers' geometric mean by 5 %; 3 of
    them."""
    found = measure(stack(500, 5, variance, nn.ReLU))
    assert found.perpendicular_growth == pytest.approx(variance / 2, rel=0.15)
    assert found.parallel_growth == pytest.approx(variance / 2, rel=0.15)
    assert found.weight_variances == pytest.approx([variance] * 5, rel=0.02) and found.is_plain


def test_a_homogeneous_stack_has_the_parallel_susceptibility_of_its_kernels():
    """Without biases K' is proportional to K for ReLU: chi_par = K' / K exactly; float64."""
    found = measure(stack(30, 4, 2.0, nn.ReLU, dtype=torch.float64), dtype=torch.float64)
    assert found.parallel[:-1] == pytest.approx(found.kernels[1:] / found.kernels[:-1], rel=1e-10)


def test_the_kernel_of_tanh_falls_as_one_over_twice_the_depth():
    """C_W = 1: K -> 1 / (2 l); at width 500 one net fluctuates by about sqrt(2 l / 500) of the slow mode: 25 %."""
    found = measure(stack(500, 30, 1.0, nn.Tanh))
    for layer in (15, 30):
        assert found.kernels[layer - 1] == pytest.approx(1 / (2 * layer), rel=0.25)
    assert 0.85 < found.perpendicular[20] <= 1.02


def test_susceptibilities_are_those_of_dense_jacobians():
    """chi_perp = |J|_F^2 / width over the examples, from 8 sign vectors of 10 x 7 entries: within five standard
    errors of a Hutchinson estimate; chi_par from J directly, to float64 rounding."""
    model = stack(7, 3, 1.5, nn.Tanh, bias=0.2, dtype=torch.float64)
    x = torch.randn(10, 7, generator=torch.Generator().manual_seed(1)).double()
    found = initialization(diag.Snapshot(model, None, (x, torch.zeros(10, dtype=torch.long))))
    z = model[0](x).detach()
    step = nn.Sequential(model[1], model[2])
    jacobians = torch.stack([torch.func.jacrev(step)(row) for row in z]).detach()
    grams = jacobians @ jacobians.transpose(1, 2)
    exact = float(jacobians.square().sum() / 70)
    off = grams - torch.diag_embed(grams.diagonal(dim1=1, dim2=2))
    error = math.sqrt(2 * float(off.square().sum()) / 8) / 70
    assert abs(found.perpendicular[0] - exact) < 5 * error
    after = step(z).detach()
    parallel = float(torch.einsum("ni,nij,nj->", after, jacobians, z) / z.square().sum())
    assert found.parallel[0] == pytest.approx(parallel, rel=1e-10)
    assert found.bias_variances[0] == pytest.approx(float(model[0].bias.detach().square().mean()), rel=1e-12)


@pytest.mark.parametrize(("relu", "rate"), [(False, 2), (True, 5)])
def test_fluctuation_over_draws(relu, rate):
    """(1 + rate / n)^L - 1 for n = 20, L = 5 over 20,000 nets whose first layer is iid: heavy tails, 10 %."""
    n, depth, nets = 20, 5, 20_000
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(nets, n, 1, generator=generator)

    def size(z):
        return (2 * z.relu().square() if relu else z.square()).mean((1, 2))

    for _ in range(depth - 1):
        w = torch.randn(nets, n, n, generator=generator) * math.sqrt((2 if relu else 1) / n)
        z = w @ (z.relu() if relu else z)
    found = relative_variance(size(z).double().numpy()[:, None])[0]
    assert found == pytest.approx((1 + rate / n) ** depth - 1, rel=0.1)


def test_fluctuation_of_measured_networks():
    """32 draws of three linear layers of width 50 on one input: 2 L / n to a factor of 1.8, as 32 draws tell."""
    draws = [measure(stack(50, 3, 1.0, nn.Identity, seed=s), n=1) for s in range(32)]
    assert pytest.approx(Initialization.fluctuation(draws)[-1], rel=0.8) == (1 + 2 / 50) ** 3 - 1
    with pytest.raises(InvalidInput, match="give two or more, of draws"):
        Initialization.fluctuation(draws[:1])


def test_verdicts_for_plain_stacks():
    good, small, large = (measure(stack(200, 12, v, nn.ReLU)) for v in (2.0, 0.3, 8.0))
    assert good.verdict().level is Level.OK and good.depth_to_width == pytest.approx(11 / 200)
    assert small.verdict().level is Level.WARNING and "vanish" in small.verdict().sentence
    assert large.verdict().level is Level.WARNING and "explode" in large.verdict().sentence
    check_result(small)
    shallow = measure(stack(20, 2, 2.0, nn.ReLU))
    assert shallow.verdict().level is Level.NOT_APPLICABLE and "needs 3 or more" in shallow.verdict().sentence


def test_activations_in_place_change_nothing():
    plain, inside = (measure(stack(12, 4, 2.0, act)) for act in (nn.ReLU, lambda: nn.ReLU(inplace=True)))
    assert plain == inside


class Skipping(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(5))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).relu()
        return x


def test_skips_and_normalisation_only_describe():
    x, y = torch.randn(8, 16), torch.zeros(8, dtype=torch.long)
    model = Skipping()
    with leaves_no_trace(model):
        skipping = initialization(diag.Snapshot(model, None, (x, y)))
    normed = initialization(
        diag.Snapshot(
            nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)),
            None,
            (x, y),
        )
    )
    for found in (skipping, normed):
        assert not found.is_plain and found.verdict().level is Level.DESCRIPTION


def test_convolutions_frozen_weights_and_what_is_refused():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)
    )
    x, y = torch.randn(6, 1, 8, 8), torch.zeros(6, dtype=torch.long)
    found = initialization(diag.Snapshot(model.requires_grad_(False), None, (x, y)))
    assert found.is_plain and found.widths == (8, 8, 3) and numpy.isfinite(found.perpendicular[:-1]).all()
    assert "fewer than two" in refusal(
        initialization, diag.Snapshot(nn.Linear(3, 2), None, (torch.ones(2, 3), y[:2]))
    )
