"""Denoising: what a denoiser does around its inputs, read off its Jacobian, and whether two networks agree.

A network of ReLUs without biases is linear around each input: f(y) = J y. The eigenvectors of J are the directions
that it keeps, its trace how many of them, and by Stein's identity the trace gives the error without clean data. Two
networks trained on disjoint data agree once there are enough of them; before that each remembers its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from diag.display import format_number, format_share
from diag.errors import InvalidInput
from diag.ranges import Count, Seed, Size, WholeNumber
from diag.registry import GRADIENT, instrument
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.inside.denoiser import DenoiserAt

SOURCE = "Kadkhodaie, Guth, Simoncelli, Mallat 2024, arXiv:2310.02557"
TRACE_PROBES, EIGENVECTORS = 16, 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Denoising(Result):
    """Means over examples; d is the number of entries of one example."""

    effective_dimension: float = measured("trace of the Jacobian: how many directions are kept")
    effective_dimension_standard_error: float = measured("its standard error, of the random vectors")
    nonlinearity: float = measured("|J y - f(y)| / |f(y)|: 0 without biases")
    asymmetry: float = measured("|J - J^T| / |J| (Frobenius, estimated)")
    sigma: float = measured("standard deviation of the noise")
    sure: float = measured("mean squared error an entry by Stein's identity, without clean data")
    mean_squared_error: float = measured("the same from the clean data", remark="NaN: there is none")
    agreement: float = measured("mean cosine of the outputs with another network's", remark="NaN: there is none")
    dimension: int = measured("entries of one example, d")
    num_examples: int = measured("examples")
    shrinkage: NDArray[numpy.float64] = measured(
        "largest eigenvalues of (J + J^T) / 2 at the first example", shape="(eigenvectors,)"
    )
    eigenvectors: NDArray[numpy.float64] = measured("their eigenvectors", shape="(eigenvectors, d)")

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        other = ""
        if not math.isnan(self.agreement):
            other = f"; its outputs and another network's have a cosine of {format_number(self.agreement)}"
        return Verdict(
            Level.DESCRIPTION,
            f"The denoiser keeps about {format_number(self.effective_dimension)} of {self.dimension:,} directions, "
            f"its Jacobian is {format_share(self.asymmetry)} asymmetric and explains the output up to "
            f"{format_share(self.nonlinearity)}; the estimated squared error is {format_number(self.sure)} against "
            f"{format_number(self.sigma**2)} of the noise{other}.",
            advice="Train a second network on other data: where the two disagree, they remember their own data.",
            source=SOURCE,
            confidence=Confidence.WEAK_EMPIRICAL,
            value=self.effective_dimension,
        )

    def plot(self, ax: Any = None) -> Any:
        """The eigenvectors with the largest shrinkage factors, as images where the inputs are square ones."""
        side = math.isqrt(self.dimension)
        if side * side != self.dimension or not len(self.eigenvectors):
            ax.plot(range(1, len(self.shrinkage) + 1), self.shrinkage, marker="o")
            ax.set(xlabel="eigenvector", ylabel="shrinkage factor")
            return
        gap = numpy.full((side, 1), numpy.nan)
        parts = [p for v in self.eigenvectors for p in ((v / numpy.abs(v).max()).reshape(side, side), gap)]
        ax.imshow(numpy.hstack(parts[:-1]), cmap="RdBu", vmin=-1, vmax=1)
        ax.set_xticks([i * (side + 1) + side / 2 for i in range(len(self.shrinkage))], self.shrinkage.round(2))
        ax.set_yticks([])
        ax.grid(False)
        ax.set(xlabel="eigenvectors of the Jacobian, by shrinkage factor", ylabel="pixels")


@instrument(
    source=SOURCE,
    title="Denoising",
    kind="description",
    passes=lambda settings: 2 * GRADIENT * (settings["probes"] + 4 * settings["eigenvectors"]),
    why="It tells what a denoiser takes for signal and what for noise, and whether two that were trained on "
    "other data agree, as they do where neither memorised its own.",
    formula="SURE = |y - f(y)|^2 / d - sigma^2 + 2 sigma^2 Tr J / d, J = df/dy",
)
def denoising(
    denoiser: DenoiserAt,
    *,
    sigma: Size = 0.0,
    probes: Count = TRACE_PROBES,
    eigenvectors: WholeNumber = EIGENVECTORS,
    seed: Seed = 0,
) -> Denoising:
    """Effective dimension, linearity, symmetry, shrinkage and SURE of a denoiser, and its agreement with another.

    denoiser: the model at noisy inputs y with clean targets (`diag.snapshot.inside.denoiser`), at most 32 of them,
    as data=(noisy, clean). Trace and asymmetry are estimated with `probes` random sign vectors (Hutchinson); SURE
    is |y - f|^2 / d - sigma^2 + 2 sigma^2 Tr J / d for Gaussian noise of deviation `sigma`, by default that of
    noisy - clean. Eigenvectors: by Lanczos on (J + J^T) / 2 at the first example. Give other= to the snapshot for
    agreement.

    Raises InvalidInput where sigma is neither given nor known from clean data. Source: Kadkhodaie et al. 2024,
    arXiv:2310.02557; SURE: Stein 1981.
    """
    y, f = (t.detach().double().flatten(1) for t in (denoiser.noisy, denoiser.outputs))
    x = None if denoiser.clean is None else denoiser.clean.detach().double().flatten(1)
    noise = sigma or (float((y - x).square().mean().sqrt()) if x is not None else 0.0)
    if not noise > 0:
        raise InvalidInput("The size of the noise is not known; give sigma=, or data= with (noisy, clean).")
    traces, asymmetry = _probed(denoiser, probes, seed)
    trace = float(traces.mean())
    d = y.shape[1]
    linear = denoiser.jvp(denoiser.noisy).detach().double().flatten(1)
    values, vectors = _eigen(denoiser, min(eigenvectors, d - 1), seed)
    finite = bool(torch.isfinite(f).all()) and float(f.norm()) > 0
    return Denoising(
        effective_dimension=trace,
        effective_dimension_standard_error=float(traces.mean(1).std() / math.sqrt(probes))
        if probes > 1
        else math.nan,
        nonlinearity=float(((linear - f).norm(dim=1) / f.norm(dim=1)).mean()),
        asymmetry=asymmetry,
        sigma=noise,
        sure=float((y - f).square().mean()) - noise**2 + 2 * noise**2 * trace / d,
        mean_squared_error=float((x - f).square().mean()) if x is not None else math.nan,
        agreement=_cosine(f, denoiser.other_outputs),
        dimension=d,
        num_examples=len(y),
        shrinkage=values,
        eigenvectors=vectors,
        preconditions=(
            Precondition("finite outputs that are not zero", finite, "the outputs are zero or not finite."),
        ),
    )


def _probed(denoiser: DenoiserAt, probes: int, seed: int) -> tuple[Tensor, float]:
    """v^T J v (probes, n), and |J - J^T| / |J| over all examples, by products with sign vectors."""
    generator = torch.Generator().manual_seed(seed)
    traces, apart, size = [], 0.0, 0.0
    for _ in range(max(probes, 1)):
        v = torch.randint(2, denoiser.noisy.shape, generator=generator).to(denoiser.noisy).mul_(2).sub_(1)
        ahead, back = (t.detach().double().flatten(1) for t in (denoiser.jvp(v), denoiser.vjp(v)))
        traces.append((v.double().flatten(1) * ahead).sum(1))
        apart += float((ahead - back).square().sum())
        size += float(ahead.square().sum() + back.square().sum()) / 2
    return torch.stack(traces), math.sqrt(apart / size) if size > 0 else math.nan


def _eigen(denoiser: DenoiserAt, count: int, seed: int) -> tuple[NDArray[numpy.float64], NDArray[numpy.float64]]:
    """Largest eigenvalues of the symmetric part at the first example, and their eigenvectors."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    shape, d = denoiser.noisy.shape, denoiser.noisy[0].numel()
    if count < 1 or not bool(torch.isfinite(denoiser.outputs).all()):
        return numpy.zeros(0), numpy.zeros((0, d))

    def product(u: NDArray[numpy.float64]) -> NDArray[numpy.float64]:
        v = torch.zeros(shape, dtype=torch.float32).to(denoiser.noisy)
        v[0] = torch.from_numpy(numpy.asarray(u).ravel()).to(v).view(shape[1:])
        both = (denoiser.jvp(v)[0] + denoiser.vjp(v)[0]).detach().double() / 2
        return both.cpu().numpy().ravel()

    start = numpy.random.default_rng(seed).normal(size=d)
    values, vectors = eigsh(LinearOperator((d, d), matvec=product, dtype=float), count, which="LA", v0=start)
    order = values.argsort()[::-1]
    return values[order], vectors[:, order].T


def _cosine(f: Tensor, other: Tensor | None) -> float:
    if other is None:
        return math.nan
    return float(torch.nn.functional.cosine_similarity(f, other.detach().double().flatten(1).to(f), dim=1).mean())
