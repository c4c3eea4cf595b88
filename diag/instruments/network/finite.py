"""Finite values: which module is the first to output infinity or NaN, on the probe's examples and weights of
now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diag.errors import layer_called
from diag.instruments.causes import LOSES_THE_LOSS, Cause
from diag.registry import Kind, instrument
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.activations import MODEL_OUTPUT, Activation

SOURCE = "arithmetic of one forward pass"


def all_finite(activations: Sequence[Activation]) -> Precondition:
    """That everything in the forward pass is finite, for checks whose numbers mean nothing otherwise."""
    bad = next((a for a in activations if a.non_finite), None)
    where = f"{bad.name or 'the model itself'} ({bad.function})" if bad else ""
    return Precondition("finite values", bad is None, f"{where} outputs values that are not finite.")


@dataclass(frozen=True, kw_only=True, eq=False)
class FiniteForward(Result):
    """Counts over all examples; a layer is a call of a known function, or the output."""

    entries: int = measured("entries that are infinite or not a number, in the first layer that has some")
    layer: str = measured("the first layer that outputs such entries", remark="empty: none")
    function: str = measured("what it computes")
    largest_before: float = measured("the largest absolute value in the layers before it")
    layers: int = measured("layers looked at")
    received: bool = measured("that layer is given such values, by what is not looked at", default=False)
    before: str = measured("the layer looked at before it", remark="empty: none", default="")

    def verdict(self) -> Verdict:
        if not self.entries:
            return Verdict(
                Level.OK,
                f"All {self.layers:,} layers output finite values only.",
                source=SOURCE,
                confidence=Confidence.ARITHMETIC,
                value=0.0,
                threshold=0.0,
            )
        large = self.largest_before > 1e4
        return Verdict(
            Level.ALARM,
            self._where() + (f", after values of up to {self.largest_before:.1e}." if large else "."),
            advice="Go back to a state before that step. Look at the inputs of this layer for values that are too "
            "large, at its weights for NaN, and lower the learning rate or clip the gradient.",
            source=SOURCE,
            confidence=Confidence.ARITHMETIC,
            refutation="The same pass in float64 is finite: then the number format is too narrow.",
            value=float(self.entries),
            threshold=0.0,
            threshold_source="any entry at all",
            layers=(self.layer,),
            cause=Cause.NOT_FINITE,
            explained_by=(*LOSES_THE_LOSS, Cause.NOT_FINITE, Cause.TRAINING_DIVERGED, Cause.GRADIENT_UNDERFLOW),
        )  # fmt: skip

    def _where(self) -> str:
        """In which layer, or before which."""
        layer = f"{layer_called(self.layer)} ({self.function})"
        if not self.received:
            return (
                f"The network outputs values that are not finite: {layer} gives the first {self.entries:,} of them"
            )
        between = f"after {layer_called(self.before)} and before" if self.before else "before"
        return f"The network computes values that are not finite {between} {layer}, which is given them"

    def plot(self, ax: Any = None) -> Any:
        """How many entries are not finite."""
        ax.bar([self.layer or "all layers"], [self.entries])
        ax.set(xlabel="the first layer with such values", ylabel="entries that are not finite")


@instrument(
    source=SOURCE,
    title="Finite values",
    kind=Kind.CHECK,
    before_training="always",
    why="Once a value is NaN or infinite everything that is computed from it is too; the first module that "
    "gives one is where to look.",
)
def finite_forward(activations: Sequence[Activation]) -> FiniteForward:
    """Which module is the first to output values that are infinite or not a number.

    activations: statistics of the forward pass (`diag.snapshot.activations`), in the order of the calls; where a
    layer is given such values by what is none of these, as by a recurrent layer, that is said. A logit of
    minus infinity that masks a class is the one exception: what the model returns is not looked at where the layers
    before are finite. Raises nothing of its own.
    """
    hidden = [a for a in activations if a.function != MODEL_OUTPUT]
    first = next((i for i, a in enumerate(hidden) if a.non_finite), None)
    bad = hidden[first] if first is not None else None
    return FiniteForward(
        entries=bad.non_finite if bad else 0,
        layer=(bad.name or "the model itself") if bad else "",
        function=bad.function if bad else "",
        largest_before=max((a.largest for a in hidden[:first]), default=0.0),
        layers=len(hidden),
        received=bad is not None and not bad.given_finite,
        before=hidden[first - 1].name if first else "",
    )
