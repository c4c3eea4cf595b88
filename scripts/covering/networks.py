"""Errors of what is measured around and between networks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple

import torch
from torch import nn

import diag
from covering.case import Case, Draw
from diag.curvature.neighbourhood.losses_at import LossesAt
from diag.curvature.neighbourhood.surroundings import Ball, MeanEstimate, Surroundings, by_group
from diag.curvature.stability import sgd
from diag.curvature.stability.sgd import sgd_stability
from diag.linalg.lanczos import eigenpairs
from diag.linalg.trace import trace_and_norm

POPULATION = 50_000


def network(seed: int) -> nn.Sequential:
    """A small classifier with some structure in its outputs."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0)
    return model


def trained(seed: int) -> nn.Sequential:
    """The same after a hundred steps of Adam on a sample of its own."""
    model = network(seed)
    x, y = examples(512, 5_000 + seed)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def examples(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """n examples of a population with three classes."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    labels = torch.randint(0, 3, (n,), generator=generator)
    return torch.randn(n, 6, generator=generator) + 1.5 * torch.eye(6)[labels], labels


def average_draws(draws_each: int, sigma: float, draws: int) -> Iterator[Draw]:
    """The average sharpness of one network from few draws; the truth from ten thousand."""
    snapshot = diag.Snapshot(network(0), nn.functional.cross_entropy, [examples(64, 0)])
    losses_at: LossesAt = snapshot.quantity("losses_at")
    around = Surroundings(losses_at, torch.ones_like(losses_at.center), Ball(0.05))
    truth = around.average(sigma, 8_000, 12345).mean
    for seed in range(draws):
        found = around.average(sigma, draws_each, seed)
        yield Draw("average sharpness", truth, found.mean, found.standard_error)


def barrier_draws(n: int, draws: int) -> Iterator[Draw]:
    """The barrier between two networks on n examples; the truth is the population's largest excess on the line."""
    first, second = trained(1), trained(2).state_dict()
    loss_fn = nn.functional.cross_entropy
    whole = diag.mode_connectivity(diag.Snapshot(first, loss_fn, [examples(POPULATION, 999_999)], other=second))
    for seed in range(draws):
        found = diag.mode_connectivity(diag.Snapshot(first, loss_fn, [examples(n, seed)], other=second))
        yield Draw("barrier", whole.barrier, found.barrier, found.barrier_standard_error)
        yield Draw("error barrier", whole.error_barrier, found.error_barrier, found.deciding_standard_error)


def group_draws(n: int, m: int, draws: int) -> Iterator[Draw]:
    """The mean one-step sharpness over groups of m examples; the truth is that of many groups of the population."""
    model = network(3)

    def mean(count: int, seed: int) -> MeanEstimate:
        snapshot = diag.Snapshot(model, nn.functional.cross_entropy, [examples(count, seed)])
        losses_at: LossesAt = snapshot.quantity("losses_at")
        around = Surroundings(losses_at, torch.ones_like(losses_at.center), Ball(0.05))
        return by_group(around, m, around.ascent, 1, seed).one_step

    truth = mean(4_000, 77_777).mean
    for seed in range(draws):
        found = mean(n, seed)
        yield Draw("m-sharpness", truth, found.mean, found.standard_error)


def loss_draws(n: int, draws: int) -> Iterator[Draw]:
    """The mean loss of n examples."""
    model = network(4)
    snapshot = diag.Snapshot(model, nn.functional.cross_entropy, [examples(POPULATION, 999_999)])
    truth = float(snapshot.quantity("losses").double().mean())
    for seed in range(draws):
        found = diag.trivial_predictor(diag.Snapshot(model, nn.functional.cross_entropy, [examples(n, seed)]))
        yield Draw("mean loss", truth, found.loss, found.loss_standard_error)


def norm_ratio_draws(draws: int) -> Iterator[Draw]:
    """SGD's norm ratio where trace, norm and the examples' curvature are estimates: a quadratic loss whose value is
    known from all of its examples."""
    torch.manual_seed(5)
    x = torch.randn(250, 12) * torch.linspace(0.5, 2, 12)
    model, data = nn.Linear(12, 1, bias=False), [(x, x.sum(1, keepdim=True))]
    hessian = diag.Snapshot(model, nn.functional.mse_loss, data).quantity("hessian")
    top = eigenpairs(hessian, largest=1)
    about = {"learning_rate": 0.01, "batch_size": 4, "largest": float(top.values[0]), "vector": top.vectors[0]}
    exact = sgd_stability(hessian, **about, trace=(1.0, 0.0), norm=(1.0, 0.0)).norm
    rows, sgd.MOST_ROWS = sgd.MOST_ROWS, 80
    try:
        for seed in range(draws):
            traced = trace_and_norm(hessian, num_probes=10, seed=seed)
            sums = {"trace": astuple(traced.trace)[:2], "norm": astuple(traced.frobenius_norm)[:2]}
            found = sgd_stability(hessian, **about, **sums, seed=seed)
            yield Draw("norm ratio", exact, found.norm, found.norm_standard_error)
    finally:
        sgd.MOST_ROWS = rows


CASES = [
    *(
        Case("sharpness", f"{count} draws, sigma {sigma}", lambda draws, a=(count, sigma): average_draws(*a, draws))
        for count in (10, 40)
        for sigma in (0.02, 0.3)
    ),
    Case("sharpness", "8 groups of 8 examples", lambda draws: group_draws(64, 8, draws)),
    Case("edge_of_stability", "10 probes, 80 of 250 examples", norm_ratio_draws),
    *(Case("mode_connectivity", f"{n} examples", lambda draws, n=n: barrier_draws(n, draws)) for n in (128, 512)),
    *(Case("trivial_predictor", f"{n} examples", lambda draws, n=n: loss_draws(n, draws)) for n in (32, 256)),
]
