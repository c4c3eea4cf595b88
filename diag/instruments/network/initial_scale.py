"""The scale of the initial weights: how much each layer enlarges or shrinks what it is given, when training begins.

Weights of variance 1 / fan-in give outputs of the size of their inputs, torch's own default .58 times that, those
for rectifiers 1.4 times. Far from these, outputs and gradients grow or vanish with every layer, or
normalisation layers hide it and take the learning rate down with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy
from numpy.typing import NDArray

from diag.display import format_number
from diag.instruments.causes import Cause
from diag.instruments.network.finite import all_finite
from diag.instruments.optimization.course import farthest, highest_loss, largest_update_ratio, moved_from_zero
from diag.ranges import Threshold
from diag.registry import Kind, instrument
from diag.result import OUR_CHOICE, Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.activations import Activation
from diag.snapshot.history import History

SOURCE = "He et al. 2015, arXiv:1502.01852; Roberts et al. 2022, arXiv:2106.10165"
LARGE_GAIN, SMALL_GAIN = 3.0, 0.03
STEP_OVER_WEIGHTS = 0.15  # a step over the weights
LEFT_BY = 5.0  # times the first loss, which steps that are too large make it
STILL_INITIAL = 10  # steps; afterwards weights are no longer as they began, even where they have moved little
FEWEST_LAYERS_OFF = 2
BY_ITS_BIAS = 0.1  # of its output's size: a large output that varies by less is what its bias was set to


@dataclass(frozen=True, kw_only=True, eq=False)
class InitialScale(Result):
    """Of linear and convolutional layers, in the order of the forward pass."""

    gain: float = measured("size of a layer's output over that of its input, the median layer")
    layers: tuple[str, ...] = measured("the layers")
    gains: NDArray[numpy.float64] = measured("each one's output over its input", shape="(layers,)")

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        large, small = self.setting("large"), self.setting("small")
        if small <= self.gain <= large:
            return Verdict(
                Level.OK,
                f"A typical layer's outputs are {format_number(self.gain)} times the size of its inputs.",
                source=SOURCE,
                value=self.gain,
                threshold=large,
                threshold_source=OUR_CHOICE,
            )
        too_large = self.gain > large
        return Verdict(
            Level.WARNING,
            f"The network's signals start too {'large' if too_large else 'small'}: a typical layer outputs "
            f"{format_number(self.gain)} times what it takes in, where 0.5 to 1.5 keeps signals alive over "
            f"the depth.",
            advice="Start weights with variance 1 / fan-in (2 / fan-in before a ReLU), as "
            "torch.nn.init.kaiming_normal_ does.",
            source=SOURCE,
            confidence=Confidence.WEAK_EMPIRICAL,
            refutation="With torch's default initial weights the same training is not better.",
            value=self.gain,
            threshold=large if too_large else small,
            threshold_source=OUR_CHOICE,
            cause=Cause.INITIALIZATION_SCALE,
            explained_by=(Cause.INITIALIZATION_CONSTANT,),
            step=1,
        )

    @classmethod
    def trend(cls, series: Sequence[tuple[int, Self]]) -> Verdict:
        """What was measured first, where training had just begun."""
        step, first = series[0]
        if step <= STILL_INITIAL:
            return first.verdict()
        return Verdict(
            Level.NOT_APPLICABLE,
            f"No verdict: the first measurement was at step {step:,}, when weights are no longer as they began.",
            source=SOURCE,
        )

    def plot(self, ax: Any = None) -> Any:
        """The gain of every layer."""
        ax.semilogy(self.gains, marker="o", markersize=3)
        ax.set(xlabel="layer, in the order of the forward pass", ylabel="size of its output over its input")


@instrument(
    source=SOURCE,
    title="Initial scale",
    kind=Kind.CHECK,
    before_training="always",
    why="Signals that grow or shrink by a constant factor per layer are huge or gone after a few dozen "
    "layers, and so are the gradients that come back.",
)
def initial_scale(
    activations: Sequence[Activation],
    history: History | None = None,
    *,
    large: Threshold = LARGE_GAIN,
    small: Threshold = SMALL_GAIN,
) -> InitialScale:
    """How much each layer enlarges or shrinks what it is given.

    activations: statistics of the forward pass (`diag.snapshot.activations`). history: the record so far, to see
    whether the first steps have already moved the weights. The gain of a layer is the root mean
    square of its output over that of its input; a large output that hardly varies is its bias, which may be set to
    the targets' mean, and is left out. Judged is the median over the linear and convolutional layers, at
    the first measurement of a training and only within its first ten steps, with weights that hardly moved: above
    `large` or below `small` is a warning. Networks of fewer than two such layers are not judged. Raises nothing of
    its own.
    """
    layers = [a for a in activations if a.function in ("linear", "convolution") and math.isfinite(a.gain)]
    layers = [a for a in layers if a.gain <= large or a.spread >= BY_ITS_BIAS]
    gains = numpy.array([a.gain for a in layers], float)
    enough = len(layers) >= FEWEST_LAYERS_OFF
    return InitialScale(
        gain=float(numpy.median(gains)) if enough else math.nan,
        layers=tuple(a.name or "the model itself" for a in layers),
        gains=gains,
        preconditions=(
            Precondition("layers", enough, f"the network calls fewer than {FEWEST_LAYERS_OFF} layers known here."),
            all_finite(activations),
            _hardly_moved(history),
        ),
    )


def _hardly_moved(history: History | None) -> Precondition:
    """That the weights are those that training began with, but for steps of an ordinary size."""
    largest = 0.0 if history is None else max(largest_update_ratio(history), farthest(history))
    left = history is not None and highest_loss(history) > LEFT_BY
    # Weights as large as they are far from their start began at nothing, or at what is nothing beside a step.
    thrown = history is not None and moved_from_zero(history)
    return Precondition(
        "weights as they began",
        largest < STEP_OVER_WEIGHTS and not left and not thrown,
        "the first steps have changed the weights by much.",
    )
