"""The size of signals over the depth: whether they grow or shrink by orders of magnitude from layer to layer.

With weights of variance 1 / fan-in, or with normalisation, a layer puts out numbers of about the size that it was
given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from diag.display import format_number
from diag.instruments.causes import Cause
from diag.instruments.network.finite import all_finite
from diag.registry import Kind, instrument
from diag.result import OUR_CHOICE, Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.activations import Activation

SOURCE = "arithmetic of one forward pass; thresholds as the calibration table states"
FACTOR = 1000.0
FEW_LAYERS = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class SignalDepth(Result):
    """Of the outputs of linear and convolutional layers, in the order of the forward pass."""

    growth: float = measured("largest output size of a layer over the first layer's")
    shrinkage: float = measured("smallest output size of a layer over the first layer's")
    layers: tuple[str, ...] = measured("the layers")
    sizes: NDArray[numpy.float64] = measured("root mean square of each one's output", shape="(layers,)")
    spreads: NDArray[numpy.float64] = measured("how much of it depends on the example", shape="(layers,)")

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return Verdict(Level.NOT_APPLICABLE, f"No verdict: {unmet.detail}", source=SOURCE)
        limit = self.provenance.settings.get("factor", FACTOR)
        if self.growth < limit and self.shrinkage > 1 / limit:
            return Verdict(
                Level.OK,
                f"Layers put out between {format_number(self.shrinkage)} and {format_number(self.growth)} "
                f"times what "
                "the first one does.",
                source=SOURCE,
                value=max(self.growth, 1 / self.shrinkage),
                threshold=limit,
                threshold_source=OUR_CHOICE,
            )
        grows = self.growth >= limit
        layer = self.layers[int(numpy.argmax(self.sizes) if grows else numpy.argmin(self.sizes))]
        factor = self.growth if grows else self.shrinkage
        return Verdict(
            Level.WARNING,
            f"Signals {'grow' if grows else 'shrink'} over the depth: {layer} puts out {format_number(factor)} "
            "times what the first layer does.",
            advice="Scale the initial weights (variance 2 / fan-in for ReLU, 1 / fan-in for tanh), or normalise.",
            source=SOURCE,
            confidence=Confidence.WEAK_EMPIRICAL,
            refutation="With weights of variance 1 / fan-in the same network trains no better.",
            value=factor,
            threshold=limit if grows else 1 / limit,
            threshold_source=OUR_CHOICE,
            layers=(layer,),
            cause=Cause.INITIALIZATION_SCALE,
            explained_by=(Cause.LEARNING_RATE_TOO_HIGH, Cause.TRAINING_DIVERGED, Cause.WEIGHT_DECAY_TOO_STRONG,
                          Cause.UNITS_DEAD, Cause.INITIALIZATION_CONSTANT, Cause.GRADIENTS_NOT_ZEROED),
        )  # fmt: skip

    def plot(self, ax: Any) -> None:
        """The size of every layer's output."""
        ax.semilogy(self.sizes, marker="o", markersize=3)
        ax.set(xlabel="layer, in the order of the forward pass", ylabel="size of its output")


@instrument(source=SOURCE, title="Signals over the depth", kind=Kind.CHECK)
def signal_depth(activations: Sequence[Activation], *, factor: float = FACTOR) -> SignalDepth:
    """Whether signals grow or shrink by orders of magnitude from layer to layer.

    activations: statistics of the forward pass (`diag.snapshot.activations`). Compared are the root mean squares of
    the outputs of linear and convolutional layers with the first one's; a factor beyond `factor` is a warning.
    Networks of fewer than three such layers are not judged. Raises nothing of its own.
    """
    layers = [a for a in activations if a.function in ("linear", "convolution")]
    sizes = numpy.array([a.size for a in layers], float)
    enough = len(layers) >= FEW_LAYERS and sizes[0] > 0
    relative = sizes / sizes[0] if enough else numpy.ones(1)
    return SignalDepth(
        growth=float(relative.max()),
        shrinkage=float(relative.min()),
        layers=tuple(a.name or "the model itself" for a in layers),
        sizes=sizes,
        spreads=numpy.array([a.spread for a in layers], float),
        preconditions=(
            Precondition("depth", bool(enough), f"the network calls fewer than {FEW_LAYERS} layers known here."),
            all_finite(activations),
        ),
    )
