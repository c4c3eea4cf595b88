"""Saturation: units at the flat ends of tanh or the sigmoid, where next to no gradient comes through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from diag.display import format_share
from diag.errors import layers_called
from diag.instruments.causes import MAKES_STEPS_TOO_LARGE, Cause
from diag.instruments.graded import graded
from diag.instruments.network.finite import all_finite
from diag.ranges import Share
from diag.registry import Kind, instrument
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.activations import FLAT_ABOVE, Activation

SOURCE = "arithmetic of one forward pass"
SATURATED = 0.5
FEWEST_SATURATED = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Saturation(Result):
    """Layers are the calls of tanh or a clipped function, in the order of the forward pass."""

    worst: float = measured("entries at the flat ends, in the layer with the most", unit="share")
    layers: tuple[str, ...] = measured("the modules that call such a function")
    flat: NDArray[numpy.float64] = measured("entries at the flat ends of each", unit="share", shape="(layers,)")

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        limit = self.setting("alarm_at")
        over = tuple(name for name, share in zip(self.layers, self.flat, strict=True) if share >= limit)
        verdict = graded(SOURCE, self.worst, limit, confidence=Confidence.ARITHMETIC)
        if not over:
            return verdict(
                Level.OK,
                f"At most {format_share(self.worst)} of a layer's units lie at the flat ends of their function.",
            )
        return verdict(
            Level.ALARM,
            f"{format_share(self.worst)} of the values that {layers_called(over)} outputs lie at the flat ends "
            "of the activation function, where its derivative is next to nothing: hardly any gradient passes.",
            advice="Scale the weights before it for the function (variance 1 / fan-in for tanh), normalise the "
            "inputs, or put a normalisation layer in front.",
            refutation="The gradient's norm before and after this layer is alike.",
            layers=over,
            cause=Cause.UNITS_SATURATED,
            explained_by=(*MAKES_STEPS_TOO_LARGE, Cause.LEARNING_RATE_TOO_HIGH, Cause.TRAINING_DIVERGED,
                          Cause.TARGETS_NOT_NORMALIZED, Cause.NORMALIZATION_STATISTICS_BAD),
        )  # fmt: skip

    def plot(self, ax: Any = None) -> Any:
        """The share of values at the flat ends, layer by layer."""
        ax.bar(range(len(self.flat)), 100 * self.flat)
        ax.set(xlabel="function, in the order of the forward pass", ylabel="at the flat ends (%)", ylim=(0, 100))


@instrument(
    source=SOURCE,
    title="Saturation",
    kind=Kind.CHECK,
    before_training="always",
    why="A unit in the flat part of its activation function passes hardly any gradient, so that everything "
    "before it learns slowly or not at all.",
)
def saturation(activations: Sequence[Activation], *, alarm_at: Share = SATURATED) -> Saturation:
    """How many units lie where their activation function is flat.

    activations: statistics of the outputs of nonlinearities (`diag.snapshot.activations`). Judged are tanh and
    functions that are clipped, where another layer follows; a sigmoid may be a gate, which is meant to be near 0 or
    1, and is not judged. From a share of `alarm_at` in one layer on it is an alarm. Raises nothing of
    its own.
    """
    chosen = [a for a, last in _hidden(activations) if not last and a.units >= FEWEST_SATURATED]
    flat = numpy.array([a.flat for a in chosen], float)
    known = Precondition(
        "bounded functions", bool(chosen), "no hidden layer ends in tanh or another bounded function."
    )
    return Saturation(
        worst=float(flat.max()) if chosen else 0.0,
        layers=tuple(a.name or "the model itself" for a in chosen),
        flat=flat,
        preconditions=(known, all_finite(activations)),
    )


def _hidden(activations: Sequence[Activation]) -> list[tuple[Activation, bool]]:
    """The calls of functions with flat ends, and whether no layer follows."""
    layers = [i for i, a in enumerate(activations) if a.function in ("linear", "convolution")]
    last = max(layers, default=-1)
    bounded = [(i, a) for i, a in enumerate(activations) if a.function in FLAT_ABOVE and a.function != "sigmoid"]
    return [(a, i > last) for i, a in bounded]
