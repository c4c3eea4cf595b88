"""Constant output: whether the network's output depends on its input at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Self

from torch import Tensor

from diag.display import format_number
from diag.errors import layer_called
from diag.instruments.causes import Cause
from diag.instruments.network.alike import rows_differ
from diag.instruments.network.finite import all_finite
from diag.ranges import Threshold
from diag.registry import Kind, instrument
from diag.result import OUR_CHOICE, Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.activations import MODEL_OUTPUT, Activation

SOURCE = "arithmetic of one forward pass"
CONSTANT_SPREAD = 1e-3
AS_TARGETS = 0.1  # of the targets' standard deviation: outputs that vary by it are not the same
STEPS_BEFORE_CONSTANT = 10  # the output of a last layer that starts at zero is constant until it has been trained


@dataclass(frozen=True, kw_only=True, eq=False)
class OutputConstant(Result):
    """Of the tensor that the network returns, the first where it returns several."""

    spread: float = measured("standard deviation over the examples, over the size of the output", unit="share")
    constant_units: float = measured("outputs that are the same for every example", unit="share")
    size: float = measured("root mean square of the output")
    others: int = measured("further outputs that do depend on the example", default=0)
    cut_off: str = measured(
        "the module whose ReLU ends the network and is zero on every example", remark="empty: none", default=""
    )
    constant_layers: tuple[str, ...] = measured(
        "the layers from which on no output of a linear layer, convolution or activation depends on the example",
        remark="in order of the forward pass",
    )

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        limit = self.setting("alarm_below")
        level = Level.UNKNOWN if self.spread < limit else Level.OK
        return Verdict(
            level,
            f"The output varies over the examples by {format_number(self.spread)} of its size"
            + (", which a network that has not been trained may do." if level is Level.UNKNOWN else "."),
            source=SOURCE,
            value=self.spread,
            threshold=limit,
            threshold_source=OUR_CHOICE,
        )

    @classmethod
    def trend(cls, series: Sequence[tuple[int, Self]]) -> Verdict:
        """An alarm once training is under way and the output still does not depend on the input."""
        step, last = series[-1]
        limit = last.setting("alarm_below")
        if last.unmet() is not None or step < STEPS_BEFORE_CONSTANT or last.spread >= limit:
            return last.verdict()
        began, then = next(
            (s, r) for i, (s, r) in enumerate(series) if all(r.spread < limit for _, r in series[i:])
        )
        layer = last._constant_since(then)
        sentence, advice = last._said(layer)
        return Verdict(
            Level.ALARM,
            sentence,
            advice=advice,
            source=SOURCE,
            confidence=Confidence.ARITHMETIC,
            refutation="Two different inputs that give clearly different outputs.",
            value=last.spread,
            threshold=limit,
            threshold_source=OUR_CHOICE,
            layers=(layer,) if layer else (),
            cause=Cause.OUTPUT_CONSTANT,
            explained_by=(
                Cause.UNITS_DEAD, Cause.UNITS_SATURATED, Cause.INPUTS_CONSTANT, Cause.INITIALIZATION_CONSTANT,
                Cause.LEARNING_RATE_TOO_HIGH, Cause.WEIGHT_DECAY_TOO_STRONG, Cause.GRADIENTS_VANISH,
                Cause.LEARNING_RATE_TOO_LOW, Cause.TRAINING_DIVERGED, Cause.NOT_FINITE, Cause.INITIALIZATION_SCALE,
                Cause.LABELS_SHUFFLED, Cause.LOSS_TERM_DOMINATES, Cause.GRADIENTS_NOT_ZEROED, Cause.LOSS_SUMMED,
                Cause.CLASSES_SORTED, Cause.CLASS_IMBALANCE, Cause.INPUTS_TOO_SMALL, Cause.INPUTS_NOT_NORMALIZED,
                Cause.PARAMETER_IN_NO_OPTIMIZER, Cause.STEP_MISSING, Cause.GRADIENTS_ZEROED_BEFORE_STEP,
                Cause.TARGETS_NOT_NORMALIZED, Cause.CLASS_WEIGHTS_WRONG, Cause.UNDERFITTING, Cause.LOSS_ASCENDED,
                Cause.LOSS_UNBOUNDED, Cause.ERRORS_CANCEL,
            ),
            step=began,
        )  # fmt: skip

    def _constant_since(self, then: Self) -> str:
        """The layer that it came from: the first one when the output became constant, where it is constant yet.
        What no gradient reaches any more may become constant later, and stands before it."""
        both = (name for layers in (then.constant_layers, self.constant_layers) for name in layers)
        return next((name for name in both if name in self.constant_layers), "")

    def _said(self, layer: str) -> tuple[str, str]:
        """What was found and what to do."""
        if self.cut_off:
            return (
                "The network's output is zero whatever the input: it ends in a ReLU (in "
                f"{layer_called(self.cut_off)}) which is zero on every example, so that no gradient comes back "
                "through it.",
                "Take the ReLU after the last layer out of the model; look at a large negative bias before it.",
            )
        where = f"; from {layer_called(layer)} on, every layer's output is so" if layer else ""
        what = f"first output (others, {self.others}, do vary)" if self.others else "output"
        return (
            f"The network gives the same {what} whatever the input: over the examples it varies by "
            f"{format_number(self.spread)} of its size{where}.",
            f"Look for dead or saturated units{' there' if layer else ''}, for inputs that are constant, and for a "
            "bias that outweighs everything else.",
        )

    def plot(self, ax: Any = None) -> Any:
        """How much of the output depends on the example."""
        ax.bar(["output"], [self.spread])
        ax.set(xlabel="what the network returns", ylabel="spread over its size", yscale="log")


@instrument(
    source=SOURCE,
    title="Constant output",
    kind=Kind.CHECK,
    before_training="always",
    why="A network that gives the same answer to every input has learned nothing that depends on the input.",
)
def output_constant(
    activations: Sequence[Activation],
    inputs: Any = None,
    targets: Tensor | None = None,
    *,
    alarm_below: Threshold = CONSTANT_SPREAD,
) -> OutputConstant:
    """Whether the network's output depends on its input.

    activations: statistics of the forward pass (`diag.snapshot.activations`); inputs: what it was given, as nothing
    is said where its rows are all equal; targets (n, ...): what a regression asks for, as nothing is said where
    the outputs lie far from zero and vary as the targets do (years, kelvins). The spread of an output is the
    standard deviation over examples (and positions), over the root mean square of all entries. Below `alarm_below`
    in a training that is under way (step 10 or later) it is an alarm; before, a last layer that starts at zero may
    be the reason. Raises nothing of its own.
    """
    outputs = [a for a in activations if a.function == MODEL_OUTPUT]
    output = outputs[0] if outputs else None
    inner = [a for a in activations if a.function != MODEL_OUTPUT and a.units > 1]
    # What varies stands after a branch that is the same for all examples by its nature, as of learned queries.
    alike = [*takewhile(lambda a: a.spread < alarm_below, reversed(inner))][::-1]
    return OutputConstant(
        spread=output.spread if output else 1.0,
        constant_units=output.constant if output else 0.0,
        size=output.size if output else 0.0,
        others=sum(a.spread >= alarm_below for a in outputs[1:]),
        cut_off=_cut_off(activations),
        constant_layers=tuple(dict.fromkeys(a.name for a in alike if a.name)),
        preconditions=(
            Precondition("an output", bool(outputs), "the network returns no tensor with several entries."),
            all_finite(activations),
            rows_differ(inputs),
            _apart_from_zero(output, targets, alarm_below),
        ),
    )


def _apart_from_zero(output: Activation | None, targets: Tensor | None, limit: float) -> Precondition:
    """That outputs which hardly vary beside their size do not vary as the targets do, far from zero as both lie."""
    asked = math.nan
    if targets is not None and len(targets) > 1:
        asked = float(targets.double().reshape(len(targets), -1).std(0).mean())
    small = output is not None and output.spread < limit
    follows = small and output is not None and asked > 0 and output.spread * output.size >= AS_TARGETS * asked
    return Precondition("outputs beside zero", not follows, "the outputs vary as the targets do, far from zero.")


def _cut_off(activations: Sequence[Activation]) -> str:
    """The module that calls the network's last function, where that is a ReLU that gives nothing but zeros."""
    last = next((a for a in reversed(activations) if a.function != MODEL_OUTPUT), None)
    zero = next((a.zero == 1.0 for a in activations if a.function == MODEL_OUTPUT), False)
    cut = last is not None and last.function == "relu" and last.zero == 1.0 and zero
    return (last.name or "the model itself") if cut and last is not None else ""
