"""Initialisation: how signals and gradients grow from layer to layer, and how much chance there is in it.

A plain stack is critical where both susceptibilities are 1: a small change of a layer's output neither grows nor
shrinks on its way, nor does the output's own size. The ratio of depth to width says how much two draws of the
weights differ. With normalisation or skip connections the same numbers describe and judge nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy
from numpy.typing import NDArray

from diag.display import format_number
from diag.errors import InvalidInput
from diag.instruments.causes import Cause
from diag.instruments.trial.one_batch import LEARNED_FALL
from diag.ranges import Times
from diag.registry import instrument
from diag.result import OUR_CHOICE, Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.external.trial import Trial
from diag.snapshot.inside.chain import CHAIN_PROBES, LayerChain

SOURCE = "Roberts, Yaida, Hanin 2022, arXiv:2106.10165"
EXPLODES_BY = 100.0
FEWEST_LAYERS = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Initialization(Result):
    """Linear and convolutional layers, in the order of the forward pass."""

    forward_factor: float = measured("mean square of the last layer's outputs over the first's")
    backward_factor: float = measured("squared gradient at the first layer's output over that at the last's")
    depth_to_width: float = measured("sum over hidden layers of 1 / width: the size of what differs between draws")
    perpendicular_growth: float = measured("geometric mean of the perpendicular susceptibilities: 1 is critical")
    parallel_growth: float = measured("geometric mean of the parallel susceptibilities: 1 is critical")
    is_plain: bool = measured("nothing skips a layer and nothing is normalised")
    learned: float = measured(
        "share of the loss of one batch that has gone in the best attempt of a preflight",
        remark="NaN outside of one",
        default=math.nan,
    )
    layers: tuple[str, ...] = measured("the layers")
    widths: tuple[int, ...] = measured("units, or channels, of each")
    kernels: NDArray[numpy.float64] = measured("mean square of the outputs", shape="(layers,)")
    correlations: NDArray[numpy.float64] = measured("mean of <z, z'> of two examples over it", shape="(layers,)")
    weight_variances: NDArray[numpy.float64] = measured(
        "fan-in times the weights' variance, C_W", shape="(layers,)"
    )
    bias_variances: NDArray[numpy.float64] = measured("variance of the biases, C_b", shape="(layers,)")
    perpendicular: NDArray[numpy.float64] = measured("chi_perp of the step to the next layer", shape="(layers,)")
    parallel: NDArray[numpy.float64] = measured("chi_par of the step to the next layer", shape="(layers,)")
    backward: NDArray[numpy.float64] = measured("|J^T v|^2 / |v|^2 from the last layer", shape="(layers,)")

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        limit = self.setting("factor")
        found = (
            f"over {len(self.layers)} layers the squared signal changes by a factor of "
            f"{format_number(self.forward_factor)} and the squared gradient by "
            f"{format_number(self.backward_factor)}"
        )
        if not self.is_plain:
            return self._judged(
                Level.DESCRIPTION, f"With skips or normalisation, {found}; the numbers only describe."
            )
        factors = {"signals": self.forward_factor, "gradients": self.backward_factor}
        what = [name for name, factor in factors.items() if not 1 / limit <= factor <= limit]
        off = [factors[name] for name in what]
        if not off:
            return self._judged(Level.OK, f"The initial weights keep signals alive: {found}.", value=0.0)
        if self.learned >= LEARNED_FALL:
            return self._judged(
                Level.OK,
                f"Whatever the initial weights do to signals, one batch was learned: {found}.",
                value=off[-1],
            )
        what = [name for name in what if (factors[name] < 1) == (off[-1] < 1)]
        word = "vanish" if off[-1] < 1 else "explode"
        tried = not math.isnan(self.learned)  # from these weights on, so what is wrong began with the first step
        return self._judged(
            Level.WARNING,
            f"{' and '.join(what).capitalize()} {word} over the depth: {found}.",
            cause=Cause.INITIALIZATION_SCALE if tried else None,
            step=1 if tried else None,
            explained_by=(Cause.INITIALIZATION_CONSTANT,),
            advice="Scale the weights for the activation (variance 2 / fan-in for ReLU, 1 / fan-in for "
            "tanh), or add normalisation or skip connections.",
            refutation="The gradient norms of the first and the last layer are alike in the first steps.",
            value=off[-1],
            threshold=limit,
        )

    def _judged(self, level: Level, sentence: str, **more: Any) -> Verdict:
        confidence = Confidence.STRONG_EMPIRICAL if self.is_plain else Confidence.WEAK_EMPIRICAL
        return Verdict(level, sentence, source=SOURCE, confidence=confidence, threshold_source=OUR_CHOICE, **more)

    def plot(self, ax: Any = None) -> Any:
        """Signals and gradients over depth."""
        places = range(len(self.layers))
        ax.plot(places, self.kernels, marker="o", markersize=3, label="mean square of the outputs")
        ax.plot(places, self.backward, marker="o", markersize=3, label="squared gradient from the last layer")
        ax.set_xticks(places, self.layers, rotation=45, ha="right", fontsize=6)
        ax.set(xlabel="layer", ylabel="size", yscale="log")
        ax.legend(fontsize=7, frameon=False)

    @classmethod
    def fluctuation(cls, draws: Sequence[Self]) -> NDArray[numpy.float64]:
        """Relative variance (layers,) of the kernels over results of as many draws of the weights, at least two.

        To compare: (1 + 2 / n)^L - 1 for L linear layers of width n, (1 + 5 / n)^L - 1 for ReLU (after the ReLU).
        """
        if len(draws) < 2 or len({d.layers for d in draws}) > 1:
            raise InvalidInput(
                f"The fluctuation was asked of {len(draws)} results; give two or more, of draws of one "
                f"architecture."
            )
        return relative_variance(numpy.array([d.kernels for d in draws]))


def relative_variance(values: NDArray[numpy.float64]) -> NDArray[numpy.float64]:
    """Variance over the first axis over the squared mean."""
    return numpy.asarray(values.var(axis=0, ddof=1) / values.mean(axis=0) ** 2)


@instrument(
    source=SOURCE,
    title="Initialisation",
    kind="description",
    passes=lambda settings: CHAIN_PROBES + 6.0,  # on the chain's examples, which are 64 at most
    why="Whether signals and gradients survive the depth is decided before the first step; it says how deep "
    "a network of this width can be.",
    formula="K_l = mean square of the outputs z_l; chi_perp = mean squared singular value of dz_(l+1) / "
    "dz_l; chi_par = dK_(l+1) / dK_l",
)
def initialization(
    layer_chain: LayerChain, trial: Trial | None = None, *, factor: Times = EXPLODES_BY
) -> Initialization:
    """Kernels, susceptibilities, gradients and the depth-to-width ratio of the layers, meant for fresh weights.

    layer_chain: measured on at most 64 examples (`diag.snapshot.inside.chain`). chi_perp is the mean squared
    singular value of the step from one layer's outputs to the next one's, from 8 random sign vectors; chi_par the
    derivative of the next kernel by this one. A stack is plain where the gradient at each layer comes through the
    next one alone and no module is a normalisation. Kernels before a normalisation say nothing of training mode.
    trial: what `diag.preflight` tried; a stack that learned one batch all the same is left in peace there.

    Settings: `factor`, beyond which or its inverse the squared signal or gradient has exploded or vanished over the
    depth of a plain stack (our choice, uncalibrated). On trained weights the numbers describe what became of them.
    Raises nothing of its own. Source: Roberts, Yaida, Hanin 2022, arXiv:2106.10165.
    """
    chain = layer_chain.layers
    table = {
        name: numpy.array([getattr(layer, name) for layer in chain])
        for name in (
            "kernel",
            "correlation",
            "weight_variance",
            "bias_variance",
            "perpendicular",
            "parallel",
            "backward",
        )
    }
    kernels, backward = table["kernel"], table["backward"]
    return Initialization(
        forward_factor=_over(kernels[-1], kernels[0]),
        backward_factor=_over(backward[0], backward[-1]),
        depth_to_width=sum(1 / layer.width for layer in chain[:-1]),
        perpendicular_growth=_geometric_mean(table["perpendicular"][:-1]),
        parallel_growth=_geometric_mean(table["parallel"][:-1]),
        learned=math.nan if trial is None else trial.best.fall,
        is_plain=all(layer.direct for layer in chain[:-1]) and not layer_chain.normalised,
        layers=tuple(layer.name for layer in chain),
        widths=tuple(layer.width for layer in chain),
        kernels=kernels,
        correlations=table["correlation"],
        weight_variances=table["weight_variance"],
        bias_variances=table["bias_variance"],
        perpendicular=table["perpendicular"],
        parallel=table["parallel"],
        backward=backward,
        preconditions=_preconditions(kernels),
    )


def _over(a: float, b: float) -> float:
    return float(a / b) if b > 0 else math.nan


def _geometric_mean(values: NDArray[numpy.float64]) -> float:
    known = values[numpy.isfinite(values)]
    if not len(known):
        return math.nan
    return float(numpy.exp(numpy.log(known).mean())) if (known > 0).all() else 0.0


def _preconditions(kernels: NDArray[numpy.float64]) -> tuple[Precondition, ...]:
    finite = bool(numpy.isfinite(kernels).all() and (kernels > 0).all())
    few = (
        f"there are {len(kernels)} linear or convolutional layers; growth over depth needs {FEWEST_LAYERS} or more."
    )
    return (
        Precondition("three layers or more", len(kernels) >= FEWEST_LAYERS, few),
        Precondition("finite outputs that are not zero", finite, "a layer's outputs are all zero or not finite."),
    )
