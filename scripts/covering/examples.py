"""Errors over the choice of examples: samples of a population that is known."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import diag
from covering.case import Case, Draw
from diag.instruments.gradient_coherence import gradient_coherence
from diag.instruments.gradient_conflict.instrument import gradient_conflict

DIMENSIONS = 40
POPULATION = 200_000


def gradients(n: int, signal: float, heavy: bool, generator: torch.Generator) -> Tensor:
    """n gradients: a common part of norm `signal` and noise of mean squared norm 1; heavy: sizes of t(5)."""
    noise = torch.randn(n, DIMENSIONS, generator=generator, dtype=torch.float64) / math.sqrt(DIMENSIONS)
    if heavy:
        chi = torch.randn(n, 5, generator=generator, dtype=torch.float64).square().sum(1) / 3  # mean of 1/chi: 1
        noise = noise / chi[:, None].sqrt()
    common = torch.zeros(DIMENSIONS, dtype=torch.float64)
    common[0] = signal
    return common + noise


def coherence_draws(n: int, signal: float, heavy: bool, draws: int) -> Iterator[Draw]:
    """The corrected coherence of n of them; the truth is signal^2 / (signal^2 + 1)."""
    truth = signal**2 / (signal**2 + 1)
    for seed in range(draws):
        found = gradient_coherence(gradients(n, signal, heavy, torch.Generator().manual_seed(seed)).float())
        yield Draw("corrected coherence", truth, found.corrected, found.standard_error)


def conflict_draws(n: int, groups: int, signal: float, draws: int) -> Iterator[Draw]:
    """Cosines of the groups' means: all pairs, and the smallest one, which is chosen by looking."""
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        means = torch.randn(groups, DIMENSIONS, generator=generator, dtype=torch.float64)
        means = signal * means / means.norm(dim=1, keepdim=True)
        labels = torch.arange(n) % groups
        noise = torch.randn(n, DIMENSIONS, generator=generator, dtype=torch.float64) / math.sqrt(DIMENSIONS)
        found = gradient_conflict((means[labels] + noise).float(), labels)
        truth = nn.functional.cosine_similarity(means[:, None], means[None], dim=-1)
        a, b = (int(label) for label in found.pair)
        for i in range(groups):
            for j in range(i):
                yield Draw("cosine of a pair", float(truth[i, j]), found.cosines[i, j], found.standard_errors[i, j])
        yield Draw("cosine of the lowest pair", float(truth[a, b]), found.lowest, found.lowest_standard_error)


def curvature_draws(n: int, draws: int) -> Iterator[Draw]:
    """The curvature along the sharpest directions of a least-squares fit, over the choice of its examples; the
    truth is that of the population along the same directions, whose Hessian is known."""
    scales = torch.cat([torch.tensor([4.0, 3.0, 2.2]), torch.full((17,), 0.5)])
    for seed in range(draws):
        torch.manual_seed(seed)
        model = nn.Linear(20, 1, bias=False)
        x = torch.randn(n, 20) * scales
        snapshot = diag.Snapshot(model, nn.functional.mse_loss, [(x, torch.zeros(n, 1))])
        found = diag.hessian_spectrum(snapshot, num_eigenvalues=3, keep_eigenvectors=True)
        for k in range(len(found.eigenvalues)):
            along = torch.from_numpy(found.eigenvectors[k]).double()
            truth = float(2 * (along.square() * scales.double().square()).sum())
            yield Draw("curvature along an eigenvector", truth, found.eigenvalues[k], found.sampling_errors[k])


CASES = (
    [
        Case(
            "gradient_coherence",
            f"{n} examples, signal {signal}{', heavy tails' if heavy else ''}",
            lambda draws, a=(n, signal, heavy): coherence_draws(*a, draws),
        )
        for n in (64, 512)
        for signal in (0.0, 0.1, 1.0)
        for heavy in (False, True)
    ]
    + [
        Case(
            "gradient_conflict",
            f"{n} examples, {groups} groups, signal {signal}",
            lambda draws, a=(n, groups, signal): conflict_draws(*a, draws),
        )
        for n in (128, 1024)
        for groups in (3, 10)
        for signal in (0.3, 1.0)
    ]
    + [Case("hessian_spectrum", f"{n} examples", lambda draws, n=n: curvature_draws(n, draws)) for n in (100, 1000)]
)
