"""The spectrum of the loss Hessian: its extreme eigenvalues with error bounds, its density, its trace.

Trained classifiers have a bulk of eigenvalues near zero, some of them negative, and a few outliers, about one
for each class but one. One Lanczos run gives both ends, the quadrature rule of the density and, once the
converged pairs are taken out, a trace with a small standard error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from diag.display import format_number, format_share
from diag.linalg.deflation import orthonormal
from diag.linalg.lanczos import Eigenpairs, LanczosRun, extract, run_lanczos
from diag.linalg.operator import LinearOperator
from diag.linalg.quadrature import Estimate, SpectralMeasure, quadrature_rule, spectral_measure
from diag.linalg.reductions import dot, gram
from diag.linalg.ritz import Wanted
from diag.linalg.trace import trace_and_norm
from diag.registry import instrument
from diag.result import OUR_CHOICE, Confidence, Level, Result, Verdict, measured

SOURCE = "Papyan 2020, arXiv:2008.11865; Ghorbani, Krishnan, Xiao 2019, arXiv:1901.10159"

NEGATIVE_SHARE = 0.05  # of the largest eigenvalue: a smallest one below that is no rounding of a minimum
OVERLAP = 0.5
NEAR_ZERO = 1e-3  # of the largest magnitude: what lies below counts as zero
GRID_POINTS = 400
SMOOTHING = 0.15  # of the density, in asinh(eigenvalue / (NEAR_ZERO * largest magnitude))


@dataclass(frozen=True, kw_only=True, eq=False)
class HessianSpectrum(Result):
    """Eigenvalues that have converged, each with its residual; density, trace and norm with their errors."""

    eigenvalues: NDArray[numpy.float64] = measured("largest eigenvalues, descending", shape="(k,)")
    residuals: NDArray[numpy.float64] = measured(
        "|H v - lambda v|: an eigenvalue lies within this of each one given", shape="(k,)"
    )
    sampling_errors: NDArray[numpy.float64] = measured(
        "half the difference of the curvature along each eigenvector between two halves of the data; NaN where "
        "the data cannot be split",
        shape="(k,)",
    )
    smallest: float = measured("smallest eigenvalue; NaN where it has not converged")
    smallest_residual: float = measured("residual of the smallest eigenvalue")
    trace: float = measured("trace of the Hessian")
    trace_standard_error: float = measured("standard error of the trace; 0 where every eigenvalue is known")
    frobenius_norm: float = measured("Frobenius norm of the Hessian")
    frobenius_norm_standard_error: float = measured("standard error of the Frobenius norm")
    negative_share: float = measured(
        "eigenvalues below -0.001 of the largest magnitude, by the quadrature", unit="share"
    )
    num_outliers: float = measured(
        "leading eigenvectors that lie in the span of the class directions; NaN without class directions"
    )
    overlaps: NDArray[numpy.float64] = measured(
        "squared length of each eigenvector in the span of the class directions", shape="(k,)", unit="share"
    )
    num_class_directions: int = measured("dimension of that span; 0 without class directions")
    layer_shares: dict[str, float] = measured("where the top eigenvector lives, by layer", unit="share")
    density_grid: NDArray[numpy.float64] = measured("eigenvalues at which the density is given", shape="(400,)")
    density: NDArray[numpy.float64] = measured(
        "share of the eigenvalues per unit of eigenvalue, without those in `eigenvalues`", shape="(400,)"
    )
    num_parameters: int = measured("size of the Hessian")
    num_products: int = measured("Hessian-vector products spent; depends on the rounding of the dtype")

    @property
    def largest_magnitude(self) -> float:
        known = [*numpy.abs(self.eigenvalues), abs(self.smallest), float(numpy.abs(self.density_grid).max())]
        return next((float(v) for v in known if math.isfinite(v) and v > 0), 1.0)

    def verdict(self) -> Verdict:
        if not len(self.eigenvalues) or math.isnan(self.smallest):
            return self._judged(
                Level.UNKNOWN,
                f"The extreme eigenvalues did not converge within {self.num_products} products.",
                advice="Give more steps=, or ask for fewer num_eigenvalues=.",
            )
        top, limit = float(self.eigenvalues[0]), self._setting("negative_share_alarm", NEGATIVE_SHARE)
        ratio = -self.smallest / top if top > 0 else math.inf
        slack = self.smallest_residual / top if top > 0 else 0.0
        numbers = (
            f"largest eigenvalue {format_number(top)}, smallest {format_number(self.smallest)}, trace "
            f"{format_number(self.trace)} +- {format_number(self.trace_standard_error, 2)}"
        )
        if ratio - slack > limit:
            return self._judged(
                Level.WARNING,
                f"This is no minimum of the loss: it curves downwards by {format_share(min(ratio, 99.0))} of its "
                f"largest curvature ({numbers}).",
                confidence=Confidence.ARITHMETIC,
                advice="Expected early in training; late in it, train longer before reading flatness, or compare "
                "with another seed.",
                refutation="The smallest eigenvalue on more data, or of the Gauss-Newton matrix, is not negative.",
                value=ratio,
                threshold=limit,
                threshold_source=OUR_CHOICE,
            )
        level = Level.UNKNOWN if ratio + slack > limit else Level.OK
        outliers = "" if math.isnan(self.num_outliers) else f"; {self.num_outliers:.0f} class outliers"
        return self._judged(
            level,
            f"The Hessian has no strong negative curvature ({numbers}{outliers}).",
            value=ratio,
            threshold=limit,
            threshold_source=OUR_CHOICE,
            advice="A large or small eigenvalue says nothing about generalisation: it changes with the "
            "parametrisation.",
        )

    def _judged(self, level: Level, sentence: str, **more: Any) -> Verdict:
        more.setdefault("confidence", Confidence.STRONG_EMPIRICAL)
        return Verdict(level, sentence, source=SOURCE, **more)

    def _setting(self, name: str, default: float) -> float:
        return float(self.provenance.settings.get(name, default))

    def plot(self, ax: Any) -> None:
        """The density on symlog axes, the converged eigenvalues as stems of height one in the spectrum."""
        scale = NEAR_ZERO * self.largest_magnitude
        ax.fill_between(self.density_grid, self.density, alpha=0.5, linewidth=0, label="density (quadrature)")
        known = numpy.append(self.eigenvalues, [] if math.isnan(self.smallest) else [self.smallest])
        floor = 1 / self.num_parameters / self.largest_magnitude
        ax.vlines(known, floor / 10, floor, color="tab:red", label="converged eigenvalues")
        ax.set_xscale("symlog", linthresh=scale)
        ax.set_yscale("log")
        ax.set(xlabel="eigenvalue", ylabel="share per unit of eigenvalue", ylim=(floor / 10, None))
        ax.legend(fontsize=7, frameon=False)

    @classmethod
    def plot_trend(cls, ax: Any, series: Sequence[tuple[int, Self]]) -> None:
        """The three largest eigenvalues and the smallest over the steps."""
        steps = [step for step, _ in series]
        for rank in range(3):
            values = [float(r.eigenvalues[rank]) if len(r.eigenvalues) > rank else math.nan for _, r in series]
            ax.plot(steps, values, marker="o", markersize=3, label=f"eigenvalue {rank + 1}")
        ax.plot(steps, [r.smallest for _, r in series], marker="v", markersize=3, label="smallest")
        ax.set(xlabel="step", ylabel="eigenvalue of the Hessian")
        ax.legend(fontsize=7, frameon=False)


@instrument(source=SOURCE, title="Hessian spectrum")
def hessian_spectrum(
    hessian: Any,
    class_directions: Any = None,
    *,
    num_eigenvalues: int = 10,
    steps: int = 80,
    num_probes: int = 1,
    trace_probes: int = 10,
    tolerance: float = 1e-3,
    half_split: bool = True,
    overlap_above: float = OVERLAP,
    negative_share_alarm: float = NEGATIVE_SHARE,
    seed: int = 0,
) -> HessianSpectrum:
    """Largest and smallest eigenvalues of the loss Hessian with error bounds, its density, trace and norm.

    hessian: a LinearOperator of size P. class_directions: (C, P), for the number of outliers: the leading run of
    eigenvectors of which more than `overlap_above` lies in their span. At least `steps` products are spent on
    one Lanczos run, more until `num_eigenvalues` and the smallest have residuals within `tolerance` of the
    largest magnitude; an eigenvalue that has not is not reported. `num_probes` start vectors for the density;
    `trace_probes` for trace and norm with the reported eigenvalues taken out. `half_split` compares two halves of
    the data. All in the loss's unit.

    A smallest eigenvalue below -`negative_share_alarm` of the largest is a warning; that share and
    `overlap_above` are our choice, uncalibrated.

    Raises InvalidInput where the operator's products are not finite or a setting does not fit. Sources: Papyan
    2020, arXiv:2008.11865; Ghorbani et al. 2019, arXiv:1901.10159; Ubaru, Chen, Saad 2017 (quadrature).
    """
    largest = min(num_eigenvalues, hessian.size)
    wanted = Wanted(largest=largest, smallest=1 if hessian.size > largest else 0)
    run = run_lanczos(
        hessian, replace(wanted, tolerance=tolerance), max_products=10 * steps, min_products=steps, seed=seed
    )
    top, bottom = _reported(run, wanted, tolerance, seed)
    known = top if torch.equal(top.values[-1:], bottom.values) else top.joined(bottom)
    trace, norm, spent = _trace(hessian, run, known, trace_probes, seed)
    measure, more = _measure(hessian, run, known, num_probes, steps, seed)
    magnitude = float(run.ritz.values.abs().max())
    grid = _grid(run.ritz.values, magnitude)
    density = measure.density(grid, SMOOTHING, atoms=False, scale=NEAR_ZERO * magnitude or 1.0)
    overlaps, dimension = _overlaps(top, class_directions)
    return HessianSpectrum(
        eigenvalues=top.values.numpy(),
        residuals=(top.residuals + top.rounding).numpy(),
        sampling_errors=_sampling_errors(hessian, top, half_split, seed),
        smallest=float(bottom.values[0]) if len(bottom.values) else math.nan,
        smallest_residual=float(bottom.residuals[0]) + bottom.rounding if len(bottom.values) else math.nan,
        trace=trace.value,
        trace_standard_error=trace.standard_error,
        frobenius_norm=norm.value,
        frobenius_norm_standard_error=norm.standard_error,
        negative_share=float(measure.distribution(torch.tensor([-NEAR_ZERO * magnitude]).double())),
        num_outliers=float(_leading_run(overlaps > overlap_above)) if dimension else math.nan,
        overlaps=overlaps,
        num_class_directions=dimension,
        layer_shares=_layer_shares(hessian, top),
        density_grid=grid.numpy(),
        density=density.numpy(),
        num_parameters=hessian.size,
        num_products=run.num_products + spent + more,
        notes=_notes(top, largest),
    )


def _reported(run: LanczosRun, wanted: Wanted, tolerance: float, seed: int) -> tuple[Eigenpairs, Eigenpairs]:
    """The largest and the smallest pairs whose residuals are within the tolerance of the largest magnitude."""
    limit = tolerance * float(run.ritz.values.abs().max())
    pairs = extract(run, wanted, seed)
    good = pairs.residuals + pairs.rounding <= limit
    is_top = torch.arange(len(good)) < (len(good) if not wanted.smallest else len(good) - 1)
    first_bad = int((~good[is_top]).nonzero()[0]) if not good[is_top].all() else int(is_top.sum())
    last = slice(len(good) - 1, len(good)) if good[-1] else slice(0, 0)
    return pairs.subset(slice(0, first_bad)), pairs.subset(last)


def _trace(
    hessian: LinearOperator, run: LanczosRun, known: Eigenpairs, probes: int, seed: int
) -> tuple[Estimate, Estimate, int]:
    if run.space.exhausted:  # every eigenvalue is known
        values = run.ritz.values
        return Estimate(float(values.sum()), 0.0, 0, seed), Estimate(float(values.norm()), 0.0, 0, seed), 0
    both = trace_and_norm(hessian, num_probes=probes, deflate=known if len(known.values) else None, seed=seed)
    return both.trace, both.frobenius_norm, both.num_products


def _measure(
    hessian: LinearOperator, run: LanczosRun, known: Eigenpairs, probes: int, steps: int, seed: int
) -> tuple[SpectralMeasure, int]:
    """The rest of the spectrum by quadrature, with the known eigenvalues as atoms, and the products spent."""
    if run.space.exhausted:
        keep = ~torch.isin(run.ritz.values, known.values)
        rest = run.ritz.values[keep]
        weights = torch.full_like(rest, 1 / hessian.size)
        return SpectralMeasure(rest[None], weights[None], known.values, hessian.size, seed, 0), 0
    if probes > 1:
        deflate = known.vectors if len(known.values) else None
        measure = spectral_measure(hessian, num_probes=probes, steps=steps, deflate=deflate, seed=seed + 1)
        return measure, measure.num_products
    nodes, weights = quadrature_rule(run.first_cycle)
    near = (nodes[:, None] - known.values[None, :]).abs() <= known.residuals + known.rounding
    weights = weights * ~near.any(1)
    weights = weights / weights.sum().clamp_min(1e-300) * (hessian.size - len(known.values)) / hessian.size
    return SpectralMeasure(nodes[None], weights[None], known.values, hessian.size, seed, 0), 0


def _grid(values: Tensor, magnitude: float) -> Tensor:
    """Points that are even in asinh, from a little below the smallest Ritz value to above the largest."""
    scale = NEAR_ZERO * magnitude or 1.0
    low, high = torch.asinh(values.min() / scale) - 0.5, torch.asinh(values.max() / scale) + 0.5
    return torch.sinh(torch.linspace(float(low), float(high), GRID_POINTS, dtype=torch.float64)) * scale


def _sampling_errors(hessian: Any, top: Eigenpairs, wanted: bool, seed: int) -> NDArray[numpy.float64]:
    """Half of |v^T H_A v - v^T H_B v| with A, B two halves: as H = (H_A + H_B) / 2, |v^T H_A v - lambda|."""
    examples = getattr(hessian, "num_examples", 1)
    if not wanted or not hasattr(hessian, "subsample") or examples < 2:
        return numpy.full(len(top.values), math.nan)
    half = hessian.subsample(examples // 2, seed=seed)
    assert top.vectors is not None
    curvature = torch.stack([dot(v, half.matvec(v)) for v in top.vectors]) if len(top.values) else top.values
    return (curvature.cpu() - top.values).abs().numpy()


def _overlaps(top: Eigenpairs, directions: Any) -> tuple[NDArray[numpy.float64], int]:
    if directions is None or not len(top.values):
        return numpy.full(len(top.values), math.nan), 0
    assert top.vectors is not None
    rows = torch.as_tensor(directions).to(top.vectors)
    lengths = rows.norm(dim=1, keepdim=True)
    rows = rows[lengths[:, 0] > 0] / lengths[lengths[:, 0] > 0]
    if not len(rows):
        return numpy.full(len(top.values), math.nan), 0
    span = orthonormal(rows)
    return gram(top.vectors, span).square().sum(1).cpu().numpy(), len(span)


def _leading_run(inside: NDArray[numpy.bool_]) -> int:
    return int(numpy.argmin(numpy.append(inside, False)))


def _layer_shares(hessian: Any, top: Eigenpairs) -> dict[str, float]:
    layers = getattr(hessian, "layers", None)
    if not layers or not len(top.values):
        return {}
    assert top.vectors is not None
    return {name: float(dot(top.vectors[0][part], top.vectors[0][part])) for name, part in layers.items()}


def _notes(top: Eigenpairs, asked: int) -> tuple[str, ...]:
    missing = asked - len(top.values)
    if not missing:
        return ()
    return (
        f"{missing} of the {asked} largest eigenvalues had not converged and are not reported: give more steps.",
    )
