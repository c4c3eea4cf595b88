"""Errors of trace, norm and distribution: random matrices whose eigenvalues are known."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from covering.case import Case, Draw
from diag.instruments.hessian_spectrum.instrument import hessian_spectrum
from diag.linalg.operator import LinearOperator
from diag.linalg.trace import trace_and_norm

SIZE = 240


def outliers_and_bulk(generator: torch.Generator) -> Tensor:
    """Ten outliers over a bulk of both signs, as of a trained classifier."""
    bulk = 0.05 * torch.randn(SIZE - 10, generator=generator, dtype=torch.float64)
    return torch.cat([torch.linspace(2.0, 10.0, 10, dtype=torch.float64), bulk])


def power_law(generator: torch.Generator) -> Tensor:
    """Eigenvalues k^-1.2, a tenth of them negative."""
    values = torch.arange(1, SIZE + 1, dtype=torch.float64) ** -1.2
    return torch.where(torch.rand(SIZE, generator=generator) < 0.1, -values, values)


def untrained(generator: torch.Generator) -> Tensor:
    """Nearly all at zero, a few of both signs, as at initialisation."""
    values = torch.zeros(SIZE, dtype=torch.float64)
    values[:30] = torch.randn(30, generator=generator, dtype=torch.float64).mul(2).sinh()
    return values


SPECTRA = {"outliers": outliers_and_bulk, "power law": power_law, "untrained": untrained}


def operators(values: Tensor, generator: torch.Generator) -> LinearOperator:
    """A symmetric matrix with these eigenvalues in a random basis."""
    basis, _ = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64))
    return LinearOperator.from_matrix((basis * values) @ basis.T)


def spectrum_draws(name: str, draws: int) -> Iterator[Draw]:
    """Trace, norm, distribution at random points and the share of negative eigenvalues, of the instrument."""
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        values = SPECTRA[name](generator)
        found = hessian_spectrum(operators(values, generator), steps=40, num_eigenvalues=5, seed=seed)
        yield Draw("trace", float(values.sum()), found.trace, found.trace_standard_error)
        yield Draw(
            "Frobenius norm", float(values.norm()), found.frobenius_norm, found.frobenius_norm_standard_error
        )
        limit = -1e-3 * float(values.abs().max())
        share = float((values <= limit).double().mean())
        yield Draw(
            "share of negative eigenvalues", share, found.negative_share, found.negative_share_standard_error
        )
        at = int(torch.randint(0, len(found.density_grid), (), generator=generator))
        below = float((values <= float(found.density_grid[at])).double().mean())
        low, high = float(found.distribution_low[at]), float(found.distribution_high[at])
        yield Draw("distribution at a point", below, (low + high) / 2, (high - low) / 4)
        yield Draw("distribution error", below, float(found.distribution[at]), found.distribution_error / 2)


def probe_draws(name: str, draws: int) -> Iterator[Draw]:
    """Trace and norm from sixteen probes without deflation."""
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        values = SPECTRA[name](generator)
        found = trace_and_norm(operators(values, generator), num_probes=16, seed=seed)
        yield Draw("trace of 16 probes", float(values.sum()), found.trace.value, found.trace.standard_error)
        norm = found.frobenius_norm
        yield Draw("norm of 16 probes", float(values.norm()), norm.value, norm.standard_error)


CASES = [
    Case("hessian_spectrum", name, lambda draws, name=name: spectrum_draws(name, draws)) for name in SPECTRA
] + [Case("trace_and_norm", name, lambda draws, name=name: probe_draws(name, draws)) for name in SPECTRA]
