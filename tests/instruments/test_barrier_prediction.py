"""Predictions of a barrier from the ends, against losses that are polynomials along the line."""

import itertools
import math

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.connectivity.barrier_prediction import Along, cubic, quintic, second_order
from diag.errors import InvalidInput, MissingQuantity, Unsupported
from diag.instruments.barrier_prediction import barrier_prediction
from diag.result import Level
from diag.testing import check_instrument

A = torch.linspace(0, 1, 21, dtype=torch.float64)


def polynomial(degree, seed=0):
    """A random polynomial phi with its excess over the chord, its end losses and its derivatives at the ends."""
    p = numpy.polynomial.Polynomial(numpy.random.default_rng(seed).normal(size=degree + 1))
    ends = [Along(float(p.deriv()(t)), float(p.deriv(2)(t))) for t in (0.0, 1.0)]
    losses = (float(p(0.0)), float(p(1.0)))
    chord = losses[0] + A.numpy() * (losses[1] - losses[0])
    return torch.from_numpy(p(A.numpy()) - chord), losses, ends


def test_each_prediction_is_exact_up_to_its_degree_and_not_beyond():
    for degree in range(1, 7):
        excess, losses, ends = polynomial(degree, degree)
        off = {
            "second order": (second_order(A, *ends) - excess).abs().max(),
            "cubic": (cubic(A, losses, *ends) - excess).abs().max(),
            "quintic": (quintic(A, losses, *ends) - excess).abs().max(),
        }
        for name, highest in (("second order", 2), ("cubic", 3), ("quintic", 5)):
            # Rounding of numbers of size one; a coefficient one degree too high leaves its own size.
            assert (off[name] < 1e-12) == (degree <= highest), (degree, name, off)


def linear(seed, outputs=2):
    model = nn.Linear(4, outputs).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + p.dim()), dtype=p.dtype))
    return model


def examples(n=40, inputs=4, outputs=2):
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(n, k, generator=generator, dtype=torch.float64) for k in (inputs, outputs))


def test_a_quadratic_loss_is_predicted_exactly():
    a, b = linear(0), linear(10)
    found = barrier_prediction(diag.Snapshot(a, F.mse_loss, examples(), other=b), points=11)
    x = torch.cat([examples()[0], torch.ones(40, 1, dtype=torch.float64)], 1)
    step = torch.cat([b.weight - a.weight, (b.bias - a.bias)[:, None]], 1).detach()
    curvature = 2 * float((x @ step.T).square().mean())  # D^T H D of the mean squared error
    expected = -0.5 * found.alphas * (1 - found.alphas) * curvature
    for values in [found.excess, *found.predictions.values()]:
        assert values == pytest.approx(expected, abs=1e-10 * curvature)
    assert found.curvatures == pytest.approx([curvature] * 2, rel=1e-9)
    assert found.barrier == pytest.approx(0, abs=1e-12) and found.disagreement < 1e-10 * curvature
    assert math.isnan(found.rank_correlation)  # one layer cannot be ranked


def mlp(seed):
    sizes, layers = (4, 6, 5, 6, 2), []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    model = nn.Sequential(*layers[:-1]).double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + i), dtype=p.dtype))
    return model


def test_slopes_and_curvatures_are_those_of_the_loss_along_the_line_and_along_one_layer():
    a, b = mlp(0), mlp(50)
    x, y = examples()
    found = barrier_prediction(diag.Snapshot(a, F.mse_loss, (x, y), other=b.state_dict()), points=5)

    def derivatives(model, names):
        own, t = dict(model.named_parameters()), torch.zeros((), dtype=torch.float64, requires_grad=True)
        steps = {n: dict(b.named_parameters())[n] - dict(a.named_parameters())[n] for n in names}
        values = {n: p.detach() + t * steps[n].detach() if n in names else p.detach() for n, p in own.items()}
        loss = F.mse_loss(torch.func.functional_call(model, values, x), y)
        slope = torch.autograd.grad(loss, t, create_graph=True)[0]
        return loss.item(), slope.item(), torch.autograd.grad(slope, t)[0].item()

    everything = [n for n, _ in a.named_parameters()]
    ends = [derivatives(m, everything) for m in (a, b)]
    assert found.slopes == pytest.approx([e[1] for e in ends], rel=1e-9)
    assert found.curvatures == pytest.approx([e[2] for e in ends], rel=1e-6)
    rise = ends[1][0] - ends[0][0]
    grid = numpy.array([0, 0.25, 0.5, 0.75, 1])
    for layer in ("0", "4"):
        names = [f"{layer}.weight", f"{layer}.bias"]
        start, slope, curvature = derivatives(a, names)
        forth = start + grid * slope + grid**2 / 2 * curvature - (ends[0][0] + grid * rise)
        assert found.layer_predictions[layer] == pytest.approx(forth.max(), rel=1e-6)
        start, slope, curvature = derivatives(b, names)
        t = grid - 1
        back = start + t * slope + t**2 / 2 * curvature - (ends[0][0] + grid * rise)
        assert found.layer_predictions_back[layer] == pytest.approx(back.max(), rel=1e-6)
    assert set(found.layer_barriers) == {"0", "2", "4", "6"}
    assert found.second_order_error == pytest.approx(found.second_order - found.barrier)
    verdict = found.verdict()
    assert verdict.level is Level.DESCRIPTION and "4 layers" in verdict.sentence


def test_errors_are_of_the_next_even_order_in_the_distance_and_far_predictions_differ():
    a = mlp(0)
    noise = {n: torch.randn(t.shape, generator=torch.Generator().manual_seed(1), dtype=t.dtype)
             for n, t in a.state_dict().items()}  # fmt: skip
    snapshot = diag.Snapshot(a, F.mse_loss, examples())

    def errors(distance):
        other = {n: t + distance * noise[n] for n, t in a.state_dict().items()}
        found = barrier_prediction(snapshot, other=other, layers=False)
        assert not found.layer_barriers and math.isnan(found.rank_correlation)
        return [numpy.abs(found.predictions[n] - found.excess).max() for n in ("cubic", "quintic")], found

    near, close = errors(0.01)
    double, _ = errors(0.02)
    # With the ends' slopes the fourth derivative is left out, with their curvatures the sixth.
    assert 12 < double[0] / near[0] < 20 and 45 < double[1] / near[1] < 85
    far = barrier_prediction(snapshot, other=mlp(50).state_dict(), layers=False)
    assert far.disagreement > 100 * close.disagreement


def test_what_cannot_be_predicted_is_refused():
    check_instrument(barrier_prediction)
    norm = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double().eval()
    with pytest.raises(Unsupported, match="With BatchNorm the loss between two networks depends on statistics"):
        barrier_prediction(diag.Snapshot(norm, F.mse_loss, examples(), other=norm.state_dict()))
    frozen = linear(0)
    frozen.bias.requires_grad_(False)
    with pytest.raises(Unsupported, match="bias differs between the two networks and is not trained"):
        barrier_prediction(diag.Snapshot(frozen, F.mse_loss, examples(), other=linear(10)))
    half = linear(0).bfloat16()
    with pytest.raises(Unsupported, match="parameters are in bfloat16, too coarse for losses and slopes"):
        barrier_prediction(diag.Snapshot(half, F.mse_loss, examples(), other=half.state_dict()))
    with pytest.raises(InvalidInput, match=r"points takes a whole number of 3 or more .* and not 2"):
        barrier_prediction(diag.Snapshot(linear(0), F.mse_loss, examples(), other=linear(10)), points=2)
    with pytest.raises(MissingQuantity, match="other is missing"):
        barrier_prediction(diag.Snapshot(linear(0), F.mse_loss, examples()))
