"""The spectrum of the loss Hessian: its extreme eigenvalues with error bounds, its density, its trace.

Trained classifiers have a bulk of eigenvalues near zero, some of them negative, and a few outliers, about one
for each class but one. One Lanczos run gives both ends, the quadrature rule of the density and, once the
converged pairs are taken out, a trace with a small standard error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy
from torch import Tensor

from diag.curvature import eigenvectors
from diag.curvature.memory import memory_beside
from diag.display import format_number, format_share
from diag.encoding import plain_data
from diag.errors import InvalidInput
from diag.instruments.hessian_spectrum.fields import MeasuredSpectrum
from diag.instruments.hessian_spectrum.measuring import (
    NEAR_ZERO,
    SMOOTHING,
    extremes_and_sums,
    notes_on_spectrum,
    of_the_density,
)
from diag.linalg.lanczos import Eigenpairs
from diag.linalg.operator import LinearOperator, checked_operator
from diag.linalg.spectrum import spectrum
from diag.ranges import Count, Seed, Share, Size, Threshold, Tolerance, WholeNumber
from diag.registry import PRODUCT, SELF_TEST, instrument
from diag.result import OUR_CHOICE, Confidence, Level, Verdict

SOURCE = "Papyan 2020, arXiv:2008.11865; Ghorbani, Krishnan, Xiao 2019, arXiv:1901.10159"
NEGATIVE_ABOVE = 0.05  # of the largest eigenvalue: the smallest may lie so far below zero at a minimum, by rounding
OVERLAP = 0.5
COMPLETION = 8  # products that look for eigenvalues which the run has missed


@dataclass(frozen=True, kw_only=True, eq=False)
class HessianSpectrum(MeasuredSpectrum):
    """Extreme eigenvalues of the Hessian, its density and its trace."""

    def verdict(self) -> Verdict:
        if not len(self.eigenvalues) or math.isnan(self.smallest):
            return self._judged(
                Level.UNKNOWN,
                f"The extreme eigenvalues did not converge within {self.num_products} products.",
                advice="Give a larger max_products=, or ask for fewer num_eigenvalues=.",
            )
        limit, numbers = self.setting("negative_above"), self._extremes_and_trace()
        ratio, slack = self._downwards()
        about: dict[str, Any] = {"value": ratio, "threshold": limit, "threshold_source": OUR_CHOICE}
        if ratio - slack > limit:
            return self._judged(
                Level.WARNING,
                f"This is not a minimum of the loss: it curves downwards by {format_share(min(ratio, 99.0))} of "
                f"its largest curvature ({numbers}).",
                confidence=Confidence.ARITHMETIC,
                advice="Expected early in training; late in it, train longer before reading flatness, or compare "
                "with another seed.",
                refutation="The smallest eigenvalue on more of the data is not that negative.",
                **about,
            )
        if ratio + slack > limit:
            return self._judged(
                Level.UNKNOWN,
                "Whether the loss curves downwards strongly is not known, as the smallest eigenvalue may be off by "
                f"{format_number(self.smallest_residual)} ({numbers}).",
                advice="Give a larger max_products=, or a smaller tolerance=.",
                **about,
            )
        outliers = "" if math.isnan(self.num_outliers) else f"; {self.num_outliers:.0f} class outliers"
        return self._judged(
            Level.OK,
            f"The Hessian has no strong negative curvature ({numbers}{outliers}).",
            advice="A large or small eigenvalue says nothing about generalisation: it changes with the "
            "parametrisation.",
            **about,
        )

    def _extremes_and_trace(self) -> str:
        return (
            f"largest eigenvalue {format_number(float(self.eigenvalues[0]))}, smallest "
            f"{format_number(self.smallest)}, trace {format_number(self.trace)} ± "
            f"{format_number(self.trace_standard_error, 2)}"
        )

    def _downwards(self) -> tuple[float, float]:
        """The strongest downward curvature over the strongest upward one, and its error."""
        top = float(self.eigenvalues[0])
        if top > 0:
            return -self.smallest / top, self.smallest_residual / top
        return (math.inf if self.smallest + self.smallest_residual < 0 else 0.0), 0.0

    def _judged(self, level: Level, sentence: str, **more: Any) -> Verdict:
        more.setdefault("confidence", Confidence.STRONG_EMPIRICAL)
        return Verdict(level, sentence, source=SOURCE, **more)

    def plot(self, ax: Any = None) -> Any:
        """The density on symlog axes; a stem for each converged eigenvalue, of the height that one has in it."""
        scale = NEAR_ZERO * self.largest_magnitude
        known = numpy.append(self.eigenvalues, [] if math.isnan(self.smallest) else [self.smallest])
        one = 1 / (math.sqrt(2 * math.pi) * SMOOTHING * self.num_parameters)
        heights = one / numpy.hypot(known, scale)
        floor = one / (30 * self.largest_magnitude)
        ax.fill_between(self.density_grid, self.density, alpha=0.5, linewidth=0, label="density of the rest")
        ax.vlines(known, floor, heights, color="tab:orange", linewidth=1.2)
        ax.plot(known, heights, "o", color="tab:orange", markersize=3, label="converged eigenvalues")
        ax.set_xscale("symlog", linthresh=scale)
        ax.set_xticks(_decades(float(self.density_grid.min()), float(self.density_grid.max()), scale))
        ax.set_yscale("log")
        top = max([*self.density, *heights, 30 * floor])
        ax.set(xlabel="eigenvalue", ylabel="share per unit of eigenvalue", ylim=(floor, 5 * top))
        ax.legend()

    @classmethod
    def plot_trend(cls, ax: Any, series: Sequence[tuple[int, Self]]) -> None:
        """The three largest eigenvalues and the smallest over the steps."""
        steps = [step for step, _ in series]
        for rank in range(3):
            values = [float(r.eigenvalues[rank]) if len(r.eigenvalues) > rank else math.nan for _, r in series]
            ax.plot(steps, values, marker="o", markersize=3, label=f"eigenvalue {rank + 1}")
        ax.plot(steps, [r.smallest for _, r in series], marker="v", markersize=3, label="smallest")
        ax.set(xlabel="step", ylabel="eigenvalue of the Hessian")
        ax.legend()


def _decades(low: float, high: float, scale: float) -> list[float]:
    """Zero and the powers of ten between low and high that lie clear of the axis's linear middle."""
    first = math.ceil(math.log10(2 * scale))
    powers = [10.0**k for k in range(first, math.floor(math.log10(max(high, -low, scale))) + 1)]
    return [*(-p for p in reversed(powers) if -p >= low), 0.0, *(p for p in powers if p <= high)]


def _passes(settings: Mapping[str, Any]) -> float:
    count, steps, probes = (settings[name] for name in ("num_eigenvalues", "steps", "num_probes"))
    products = max(steps, 3 * count) + COMPLETION + settings["trace_probes"] + settings["half_split"] * count / 2
    return float(SELF_TEST + PRODUCT * (products + (probes > 1) * probes * steps))


@instrument(
    source=SOURCE,
    title="Hessian spectrum",
    passes=_passes,
    why="The largest eigenvalues bound the learning rate at which training is stable; negative ones mean "
    "that the loss still falls along some direction.",
    formula="H v = lambda v, H = d^2 L / dw^2; residual |H v - lambda v|; density (1 / P) sum_i delta(x - "
    "lambda_i)",
)
def hessian_spectrum(
    hessian: LinearOperator,
    class_directions: Tensor | None = None,
    *,
    num_eigenvalues: Count = 10,
    steps: Count = 80,
    max_products: Count = 300,
    num_probes: Count = 1,
    trace_probes: Count = 10,
    tolerance: Tolerance = 1e-3,
    half_split: bool = True,
    weight_decay: Size = 0.0,
    keep_eigenvectors: bool = False,
    overlap_above: Share = OVERLAP,
    negative_above: Threshold = NEGATIVE_ABOVE,
    memory: WholeNumber | None = None,
    checkpoint: str = "",
    seed: Seed = 0,
) -> HessianSpectrum:
    """Largest and smallest eigenvalues of the loss Hessian with error bounds, its density, trace and norm.

    hessian: of the mean loss, a LinearOperator of size P. class_directions: (C, P), for the number of outliers: the
    leading run of eigenvectors of which more than `overlap_above` lies in their span (never the widest gap).

    One Lanczos run of `steps` to `max_products` products gives the `num_eigenvalues` largest and the smallest;
    one whose residual is not within `tolerance` of the largest magnitude is not reported. The same run gives the
    density (`num_probes` above 1: from so many start vectors), with the distribution function's error; the
    `trace_probes` products more give trace and norm with the reported eigenvalues taken out. `half_split` compares
    blocks of half the data, `weight_decay` is added to every eigenvalue, `memory` caps the basis in bytes (None: a
    quarter of what is free). `keep_eigenvectors` keeps the vectors in the result, k times the parameters' size on
    the CPU; runs and saved results leave them out. All is in the loss's unit. `checkpoint` names a folder in which
    the iteration is saved as it goes, so that a call that was killed continues from there when it is repeated.

    In a watched run it starts from no earlier eigenvectors: a density needs a random start, and the `steps` that it
    takes find the largest eigenvalues by themselves (10 of an MLP within 30).

    A smallest eigenvalue below -`negative_above` of the largest is a warning; that share and `overlap_above` are
    our choice, uncalibrated. Few data overstate the largest eigenvalues, so compare at equal n.

    Raises InvalidInput where hessian is no LinearOperator, its products are not finite or a setting does not fit,
    CheckpointError where the folder cannot be used.
    Source: Papyan 2020, arXiv:2008.11865; Ghorbani et al. 2019, arXiv:1901.10159.
    """
    _check(hessian, class_directions)
    found = spectrum(
        hessian.shifted(weight_decay) if weight_decay else hessian,
        largest=num_eigenvalues, tolerance=tolerance, steps=steps, num_probes=num_probes, trace_probes=trace_probes,
        max_products=max_products, memory=memory_beside(hessian) if memory is None else memory, seed=seed,
        checkpoint=checkpoint or None,
    )  # fmt: skip
    top = found.top
    overlaps, dimension = eigenvectors.overlaps(top, class_directions, hessian.spread)
    inside = overlaps > overlap_above
    return HessianSpectrum(
        sampling_errors=eigenvectors.sampling_errors(hessian, top, weight_decay, seed, half_split),
        num_outliers=float(eigenvectors.leading_run(inside)) if dimension else math.nan,
        overlaps=overlaps,
        num_class_directions=dimension,
        layer_shares=eigenvectors.layer_shares(hessian, top),
        eigenvectors=plain_data(_whole_vectors(hessian, top)) if keep_eigenvectors else None,
        notes=notes_on_spectrum(hessian, found, min(num_eigenvalues, hessian.size), inside),
        **extremes_and_sums(found, hessian.size),
        **of_the_density(found),
    )


def _whole_vectors(hessian: LinearOperator, pairs: Eigenpairs) -> Tensor:
    assert pairs.vectors is not None
    return hessian.whole_rows(pairs.vectors)


def _check(hessian: Any, directions: Any) -> None:
    checked_operator(hessian, "hessian")
    if directions is not None and tuple(directions.shape[1:]) != (hessian.size,):
        raise InvalidInput(
            f"class_directions have shape {tuple(directions.shape)}; expected (classes, {hessian.size}), one row "
            "of the operator's size for each class."
        )
