"""The spectrum of five kinds of network against the dense float64 Hessian, within what the result itself states."""

import importlib.util
from pathlib import Path

import numpy
import pytest
import torch

import diag

_path = Path(__file__).parent.parent / "curvature" / "curvature_cases.py"
_spec = importlib.util.spec_from_file_location("curvature_cases", _path)
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)


def within_its_bounds(result, dense, deviations=4):
    """What must hold of a result beside the exact ascending eigenvalues.

    A standard error from ten probes is Student's: four are exceeded by chance in 3 of 1,000 cases, six in 0.2.
    """
    exact = dense.flip(0).numpy()
    error = numpy.abs(result.eigenvalues - exact[: len(result.eigenvalues)])
    # float32 products of a network of a thousand parameters round in the seventh digit of the largest eigenvalue.
    rounding = 2e-6 * numpy.abs(exact).max()
    assert (error <= result.residuals + rounding).all()
    assert abs(result.smallest - exact[-1]) <= result.smallest_residual + rounding
    assert abs(result.trace - exact.sum()) <= deviations * result.trace_standard_error + len(exact) * rounding
    norm = numpy.linalg.norm(exact)
    assert abs(result.frobenius_norm - norm) <= deviations * result.frobenius_norm_standard_error + 1e-5 * norm


def points_within(result, dense):
    """For each point of the grid, whether the exact share of eigenvalues is within the interval that is stated.

    Eigenvalues that are exactly zero (dead units, shifts of all logits) are rounding in float32, on either side of
    it; so are those that a point of the grid meets within rounding.
    """
    rounding = 1e-6 * float(dense.abs().max())
    ends = [numpy.searchsorted(dense.numpy(), result.density_grid + s * rounding) / len(dense) for s in (-1, 1)]
    return (ends[1] >= result.distribution_low - 1e-9) & (ends[0] <= result.distribution_high + 1e-9)


def exact_spectra(case):
    """(operator, ascending eigenvalues of the dense float64 matrix) of the Gauss-Newton matrix and the Hessian."""
    model, loss, data = cases.build(case)
    reference = cases.Reference(model, loss, data)
    snapshot = diag.Snapshot(model, loss, [(*batch.args, batch.targets) for batch in data])
    for name in ("gauss_newton", "hessian"):
        exact = torch.linalg.eigvalsh(getattr(reference, name)().detach())
        yield snapshot.quantity(name), exact


@pytest.mark.parametrize("case", cases.MODELS, ids=lambda case: case.__name__)
def test_every_number_is_within_its_own_bound(case):
    within = []
    for (operator, exact), runs in zip(exact_spectra(case), ((15,), (12, 25, 200)), strict=True):
        for seed, steps in enumerate(runs):
            result = diag.hessian_spectrum(hessian=operator, steps=steps, seed=seed, half_split=False)
            within_its_bounds(result, exact)
            assert len(result.eigenvalues) == 10
            within.append(points_within(result, exact))
            shares = (result.distribution_low, result.distribution, result.distribution_high)
            assert (numpy.diff(shares, axis=0) >= -1e-9).all() and (numpy.diff(shares, axis=1) >= -1e-9).all()
    # 95 of 100 at each point, and more where the steps resolve little: of all points and runs together, which are
    # far from independent, 90 of 100.
    assert numpy.mean(within[:-1]) >= 0.9
    # 200 steps are more than there are parameters, so that nothing is left to chance.
    assert within[-1].all() and result.distribution_error == 0 and len(exact) < 200


# The same at one to five thousand parameters, where the steps are far from spanning the space.


def larger_mlp():
    model = torch.nn.Sequential(torch.nn.Linear(20, 40), torch.nn.ReLU(), torch.nn.Linear(40, 10))
    return model, cases.cross_entropy, cases.ragged(torch.randn(60, 20), torch.randint(10, (60,)))


def larger_conv():
    nn = torch.nn
    layers = (nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU())
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(48, 5))
    model(3 + 2 * torch.randn(50, 2, 6, 6))  # running statistics unlike those of the data measured on
    return model, cases.cross_entropy, cases.ragged(torch.randn(40, 2, 6, 6), torch.randint(5, (40,)))


def larger_gru():
    parts = {"rnn": torch.nn.GRU(6, 16, batch_first=True), "head": torch.nn.Linear(16, 5)}
    model = cases.Composed(lambda self, x: self.head(self.rnn(x)[0][:, -1]), **parts)
    return model, cases.cross_entropy, cases.ragged(torch.randn(30, 5, 6), torch.randint(5, (30,)))


def larger_attention():
    parts = {"layer": torch.nn.TransformerEncoderLayer(12, 3, 16, batch_first=True), "head": torch.nn.Linear(12, 4)}
    model = cases.Composed(lambda self, x: self.head(self.layer(x).mean(1)), **parts)
    return model, cases.cross_entropy, cases.ragged(torch.randn(30, 5, 12), torch.randint(4, (30,)))


def larger_gpt():
    model = cases.TiedGPT(vocabulary=30, width=16, length=8)
    return model, cases.token_loss, cases.ragged(torch.randint(30, (20, 8)), torch.randint(30, (20, 8)))


@pytest.mark.slow
@pytest.mark.parametrize("case", [larger_mlp, larger_conv, larger_gru, larger_attention, larger_gpt])
def test_larger_networks_at_20_80_and_200_steps(case):
    (model, loss, data), within = cases.build(case), []
    assert 1000 < sum(p.numel() for p in model.parameters()) <= 5000
    exact = torch.linalg.eigvalsh(cases.Reference(model, loss, data).hessian().detach())
    snapshot = diag.Snapshot(model, loss, [(*batch.args, batch.targets) for batch in data])
    for steps in (20, 80, 200):
        for seed in range(4):
            result = diag.hessian_spectrum(snapshot, steps=steps, seed=seed, half_split=False)
            within_its_bounds(result, exact, deviations=6)
            assert len(result.eigenvalues) == 10  # sorted against the exact ones: none twice, none missed
            within.append(points_within(result, exact))
    assert numpy.mean(within) >= 0.9
