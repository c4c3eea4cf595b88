"""Quantised training: how wrong the gradient's stand-in for the quantiser is, and how uneven the gradient.

A binary layer computes with sign(w) and takes the gradient of a surrogate instead. Between the straight-through
estimator (w itself) and the sign lies sign(w) |w|^(1/o): a larger o is nearer to the sign, and its gradient less
even over the weights. Both sides of that balance are computed for several o from the same weights and gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from diag.display import format_number
from diag.linalg.reductions import length
from diag.ranges import Positive
from diag.registry import instrument
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.inside.quantised import QuantisedWeight

SOURCE = "Wu et al. 2023, arXiv:2308.06689 (a rectified straight-through estimator)"
EXPONENTS = (1.0, 1.5, 2.0, 2.5, 3.0)
CLIP, INNER = 1.5, 0.1


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantization(Result):
    """Sums over the quantised layers; the curves over o are of the binary ones (NaN without any)."""

    error: float = measured("|Q(w) - w|, summed over layers: what the straight-through estimator leaves out")
    instability: float = measured("variance of |gradient| over a layer's weights, summed over layers, as trained")
    blocked: float = measured("weights whose own gradient is zero where the loss pulls on them", unit="share")
    num_layers: int = measured("quantised layers")
    layers: tuple[str, ...] = measured("the layers")
    levels: tuple[int, ...] = measured("different values that each layer's weight takes")
    exponents: tuple[float, ...] = measured("exponents o of the surrogate sign(w) |w|^(1/o)")
    errors: NDArray[numpy.float64] = measured("estimating error at each o: sum of |sign(w) - f_o(w)|", shape="(o,)")
    instabilities: NDArray[numpy.float64] = measured("sum of var |gradient| at each o", shape="(o,)")
    scale_gradients: dict[str, float] = measured("gradient of each learned scale")

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        curve = ""
        if numpy.isfinite(self.errors).all():
            curve = (
                f"; with an exponent of {self.exponents[-1]:g} the binary layers' error would go from "
                f"{format_number(self.errors[0])} to {format_number(self.errors[-1])} and their instability from "
                f"{format_number(self.instabilities[0])} to {format_number(self.instabilities[-1])}"
            )
        return Verdict(
            Level.DESCRIPTION,
            f"The {self.num_layers} quantised layers compute with weights that are {format_number(self.error)} "
            f"(summed norm) from those that they train{curve}; the numbers only describe.",
            advice="Where the error is what hurts, raise the exponent in the course of training; where the loss is "
            "uneven, lower it.",
            source=SOURCE,
            confidence=Confidence.WEAK_EMPIRICAL,
            value=self.error,
        )

    @classmethod
    def disorder(cls, series: Sequence[tuple[int, Self]]) -> dict[str, float]:
        """Share of the steps from one measurement to the next at which the gradient of a learned scale changes
        sign."""
        names = series[-1][1].scale_gradients if series else {}
        rates = {}
        for name in names:
            signs = numpy.sign([r.scale_gradients.get(name, math.nan) for _, r in series])
            rates[name] = float((signs[1:] != signs[:-1]).mean()) if len(signs) > 1 else math.nan
        return rates

    def scale_conflict(self, other: Self) -> dict[str, float]:
        """How two losses pull on each learned scale: |a + b| / (|a| + |b|) of its gradients by them.

        other: the same network measured with the other loss (`snapshot.replace(loss_fn=...)`). 1 where both pull a
        scale one way, less than 1 in conflict, 0 where they cancel; NaN where neither pulls.
        """
        pairs = {
            n: (g, other.scale_gradients[n]) for n, g in self.scale_gradients.items() if n in other.scale_gradients
        }
        return {n: abs(a + b) / (abs(a) + abs(b)) if a or b else math.nan for n, (a, b) in pairs.items()}

    def plot(self, ax: Any = None) -> Any:
        """Error and instability over the exponent, each over its value at o = 1."""
        for name, values in (("estimating error", self.errors), ("gradient instability", self.instabilities)):
            ax.plot(
                self.exponents, values / values[0] if values[0] else values, marker="o", markersize=3, label=name
            )
        ax.set(xlabel="exponent o", ylabel="relative to o = 1", yscale="log")
        ax.legend(fontsize=7, frameon=False)


def surrogate(w: Tensor, exponent: float) -> Tensor:
    """sign(w) |w|^(1/o)."""
    return w.sign() * w.abs().pow(1 / exponent)


def surrogate_slope(w: Tensor, exponent: float, clip: float = CLIP, inner: float = INNER) -> Tensor:
    """Its derivative |w|^(1/o - 1) / o, 0 beyond `clip`; within `inner`, where it diverges, the chord's slope."""
    size = w.abs()
    slope = size.clamp_min(inner).pow(1 / exponent - 1) / exponent
    slope = torch.where(size < inner, inner ** (1 / exponent - 1), slope)
    return torch.where(size > clip, 0.0, slope)


@instrument(
    source=SOURCE,
    title="Quantisation",
    kind="description",
    why="The gradient of a rounded layer is a stand-in; where it is far from the truth, training goes "
    "astray or stalls.",
    formula="error = |Q(w) - f(w)|; instability = variance of |dL/dw| over a layer's weights",
)
def quantization(
    quantised_weights: Sequence[QuantisedWeight], *, clip: Positive = CLIP, inner: Positive = INNER
) -> Quantization:
    """Estimating error and gradient instability of layers that train through a quantiser.

    quantised_weights: layers whose product uses a quantised copy of the weight, found by tracing, with the
    gradients of the loss by both (`diag.snapshot.inside.quantised`). The estimating error of a layer is |Q(w) -
    f(w)|_2 for the surrogate f whose derivative stands in; instability is the variance of |gradient| over its
    weights. For binary layers (two values) both are computed for f_o(w) = sign(w) |w|^(1/o), o from 1 to 3, with
    the derivative 0 beyond `clip` and a chord's slope within `inner`, and the gradient that reaches Q(w). Other
    layers only enter `error`, by f(w) = w, and `instability`, by the gradient that their own backward pass gives.
    A scale that multiplies the sign multiplies the gradient. How two losses pull on the learned scales is
    `diag.quantization(snapshot).scale_conflict(diag.quantization(snapshot.replace(loss_fn=other)))`.

    Raises nothing of its own. Source: Wu et al. 2023, arXiv:2308.06689, with `clip` and the chord of the authors'
    code; disorder of scales: Jiang et al. 2024, arXiv:2412.05551 (only its abstract was read).
    """
    layers = list(quantised_weights)
    binary = [layer for layer in layers if layer.levels == 2]
    curves = [_balance(binary, o, clip, inner) for o in EXPONENTS]
    errors, instabilities = (numpy.array([c[i] for c in curves]) for i in (0, 1))
    pulled = torch.cat([(q.upstream != 0).flatten() for q in layers])
    stopped = torch.cat([(q.gradient == 0).flatten() for q in layers]) & pulled
    error = sum(length(q.used.double() - q.latent.double()) for q in layers)
    return Quantization(
        error=error,
        instability=sum(_unevenness(q.gradient) for q in layers),
        blocked=float(stopped.sum()) / max(int(pulled.sum()), 1),
        num_layers=len(layers),
        layers=tuple(q.name for q in layers),
        levels=tuple(q.levels for q in layers),
        exponents=EXPONENTS,
        errors=errors if binary else numpy.full(len(EXPONENTS), math.nan),
        instabilities=instabilities if binary else numpy.full(len(EXPONENTS), math.nan),
        scale_gradients={f"{q.name}.{n}".lstrip("."): g for q in layers for n, g in q.scales.items()},
        preconditions=(Precondition("finite weights", math.isfinite(error), "the weights are not finite."),),
    )


def _balance(layers: Sequence[QuantisedWeight], o: float, clip: float, inner: float) -> tuple[float, float]:
    """Error and instability at one exponent, summed over binary layers."""
    error = instability = 0.0
    for q in layers:
        w = q.latent.double()
        error += float((w.sign() - surrogate(w, o)).norm())
        instability += _unevenness(q.upstream.double() * q.used.double().abs() * surrogate_slope(w, o, clip, inner))
    return error, instability


def _unevenness(gradient: Tensor) -> float:
    return float(gradient.double().abs().var(correction=0))
