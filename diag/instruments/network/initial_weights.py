"""The initial weights: whether they start at one number everywhere, or far too large or too small.

Units that start alike get gradients that are alike. A weight of root mean square s makes s sqrt(fan-in) of an input
of size one: 1 keeps signals at their size, torch's own default is .58, He's for rectifiers 1.4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy

from diag.display import format_number
from diag.errors import named
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import LoopCheck, LoopFinding, judged
from diag.ranges import Threshold
from diag.registry import instrument
from diag.result import Confidence, Level, Precondition
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.network import StartingWeight

SOURCE = "He et al. 2015, arXiv:1502.01852; arithmetic: units with equal weights have equal gradients"
LARGE_WEIGHTS, SMALL_WEIGHTS = 3.0, 0.03
FEWEST_LAYERS_AFFECTED = 2
# The ends of branches start at zero on purpose: one of two matrices of a branch, one of three of a low-rank update.
MOST_CONSTANT = 1 / 2


@dataclass(frozen=True, kw_only=True, eq=False)
class InitialWeights(LoopCheck):
    """Weights of linear, convolutional, recurrent and attention layers when the watch began."""

    cites = SOURCE


@instrument(
    source=SOURCE,
    title="Initial weights",
    kind="check",
    why="Weights that start all alike, at zero or far too large leave units that stay alike or saturated, "
    "and no training undoes that quickly.",
)
def initial_weights(
    loop: Loop, *, large: Threshold = LARGE_WEIGHTS, small: Threshold = SMALL_WEIGHTS
) -> InitialWeights:
    """Whether the weights that training begins with let it begin.

    A warning where more than half of the weights (trained or not, at least two) hold one number everywhere, or
    where the median over the others of root mean square times the root of the fan-in is above `large` or below
    `small`. A run that is resumed is not judged. Raises nothing of its own.
    """
    start = loop.start
    fine = f"{len(start):,} weights start at random numbers of a usual size."
    known = Precondition(
        "the start", len(start) >= FEWEST_LAYERS_AFFECTED, "the start of fewer than two layers was seen."
    )
    found = list(_findings(start, large, small)) if len(start) >= FEWEST_LAYERS_AFFECTED else []
    return judged(InitialWeights, loop.step, found, fine, preconditions=(known,))


def _findings(start: Sequence[StartingWeight], large: float, small: float) -> Iterator[LoopFinding]:
    constant = [w for w in start if w.constant]
    if len(constant) >= FEWEST_LAYERS_AFFECTED and len(constant) > MOST_CONSTANT * len(start):
        yield _constant(constant, len(start))
    gains = [w.gain for w in start if not w.constant]
    gain = float(numpy.median(gains)) if len(gains) >= FEWEST_LAYERS_AFFECTED else 1.0
    if not small <= gain <= large:
        yield _scale(gain, gain > large)


def _constant(constant: Sequence[StartingWeight], of: int) -> LoopFinding:
    zero = all(w.value == 0 for w in constant)
    names = tuple(w.name for w in constant)
    return LoopFinding(
        Level.ALARM,
        Cause.INITIALIZATION_CONSTANT,
        f"{len(constant)} of {of} weights start {'at zero' if zero else 'with one number everywhere'}: "
        f"{named(names)}. All units of such a layer get the same gradient, so that they do the work of one"
        + (", and layers before it get none at first." if zero else "."),
        "Start the weights at random (torch.nn.init.kaiming_normal_); zeros are for biases and ends of branches.",
        "Weights of two units of such a layer that differ before the first step.",
        step=1,
        layers=names[:8],
    )


def _scale(gain: float, too_large: bool) -> LoopFinding:
    return LoopFinding(
        Level.WARNING,
        Cause.INITIALIZATION_SCALE,
        f"The weights start too {'large' if too_large else 'small'}: a typical layer makes "
        f"{format_number(gain)} of an input of size one, where 0.5 to 1.5 keeps signals alive over the depth.",
        "Start weights with variance 1 / fan-in (2 / fan-in before a ReLU), as torch.nn.init.kaiming_normal_ does.",
        "With torch's default initial weights the same training is not better.",
        step=1,
        confidence=Confidence.STRONG_EMPIRICAL,
    )
