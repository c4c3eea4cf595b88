"""A denoiser against the ridge denoiser's closed form, Stein's identity, and dense Jacobians."""

import math

import pytest
import torch
from torch import nn

import diag
from diag.instruments.denoising import denoising
from diag.result import Level
from diag.testing import check_result, classification, leaves_no_trace, refusal

D, SIGMA = 16, 0.5
SPECTRUM = torch.tensor([4.0, 2.0, 1.0, 0.5] + [0.01] * (D - 4), dtype=torch.float64)


def ridge():
    """The best linear denoiser of Gaussian data with this spectrum: eigenvalues l / (l + sigma^2)."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64))[0]
    model = nn.Linear(D, D, bias=False, dtype=torch.float64)
    model.weight.data = basis * (SPECTRUM / (SPECTRUM + SIGMA**2)) @ basis.T
    return model, basis


def data(basis, n=32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=generator, dtype=torch.float64) * SPECTRUM.sqrt() @ basis.T
    return x + SIGMA * torch.randn(n, D, generator=generator, dtype=torch.float64), x


def measure(model, given, **settings):
    other = settings.pop("other", None)
    return denoising(diag.Snapshot(model, nn.functional.mse_loss, given, other=other), **settings)


def test_the_ridge_denoiser_has_its_factors():
    """J is the matrix itself: eigenvalues to 1e-10, trace within four standard errors of Hutchinson, no
    remainder."""
    model, basis = ridge()
    found = measure(model, data(basis), sigma=SIGMA)
    factors = (SPECTRUM / (SPECTRUM + SIGMA**2)).sort(descending=True).values
    assert found.shrinkage[:4] == pytest.approx(factors[:4].numpy(), abs=1e-10)
    assert abs(torch.from_numpy(found.eigenvectors[0].copy()) @ basis[:, 0]) == pytest.approx(1, abs=1e-8)
    error = found.effective_dimension_standard_error
    assert abs(found.effective_dimension - float(factors.sum())) < 4 * error and 0 < error < 0.1
    assert found.nonlinearity < 1e-12 and found.asymmetry < 1e-12
    check_result(found)


def test_stein_gives_the_error_without_clean_data():
    """30 draws of 32 examples: the mean of SURE less the true error is zero within four of its standard errors."""
    model, basis = ridge()
    draws = [measure(model, data(basis, seed=s), sigma=SIGMA, probes=4, eigenvectors=1) for s in range(30)]
    gaps = torch.tensor([f.sure - f.mean_squared_error for f in draws])
    assert abs(float(gaps.mean())) < 4 * float(gaps.std()) / math.sqrt(30)
    assert float(gaps.std()) / math.sqrt(30) < 0.02  # of an error of about .1: a test that could fail


def test_asymmetry_and_bias_are_seen():
    """J = A not symmetric: |A - A^T| / |A| within 15 %, 512 sign vectors in 16 dimensions; a bias leaves a rest."""
    model, basis = ridge()
    generator = torch.Generator().manual_seed(3)
    model.weight.data = model.weight.data + 0.3 * torch.randn(D, D, generator=generator, dtype=torch.float64)
    a = model.weight.detach()
    found = measure(model, data(basis))
    assert found.asymmetry == pytest.approx(float((a - a.T).norm() / a.norm()), rel=0.15)
    with_bias = nn.Linear(D, D, dtype=torch.float64)
    assert measure(with_bias, data(basis)).nonlinearity > 0.01
    assert measure(with_bias, data(basis)).sigma == pytest.approx(SIGMA, rel=0.1)


def test_a_network_of_rectifiers_without_biases_is_linear_around_each_input():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1, bias=False)
    )
    y = torch.randn(3, 1, 4, 4)
    given = diag.Snapshot(model, nn.functional.mse_loss, (y, torch.zeros_like(y)))
    with leaves_no_trace(model):
        found = denoising(given, probes=64)
    jacobians = torch.stack([torch.func.jacrev(model)(row[None]).reshape(16, 16) for row in y]).detach().double()
    exact = float(jacobians.diagonal(dim1=1, dim2=2).sum(1).mean())
    assert found.nonlinearity < 1e-6
    assert abs(found.effective_dimension - exact) < 4 * found.effective_dimension_standard_error
    top = torch.linalg.eigvalsh((jacobians[0] + jacobians[0].T) / 2).flip(0)[:3]
    assert found.shrinkage[:3] == pytest.approx(top.numpy(), abs=1e-5)


def test_agreement_with_another_network_and_refusals():
    model, basis = ridge()
    given = data(basis)
    same = measure(model, given, other=model.state_dict())
    assert same.agreement == pytest.approx(1, abs=1e-12) and same.verdict().level is Level.DESCRIPTION
    opposite = {"weight": -model.weight.detach()}
    assert measure(model, given, other=opposite).agreement == pytest.approx(-1, abs=1e-12)
    assert "outputs of its inputs' shape" in refusal(denoising, classification().snapshot())
    no_clean = diag.Snapshot(model, None, (given[0], torch.zeros(32)))
    assert "The size of the noise is not known" in refusal(denoising, no_clean)
