"""Underflow: gradients that are too small for float16 become zero, where no GradScaler lifts them.

float16 has no number between 0 and 6e-8, and few digits below 6e-5. A gradient on its way through the network in
that type is cut to zero below; what comes after gets none at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy

from diag.display import format_number
from diag.errors import named
from diag.instruments.causes import Cause
from diag.instruments.graded import graded
from diag.instruments.optimization.course import SMALL, median
from diag.ranges import Threshold
from diag.registry import Kind, instrument
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.history import History
from diag.snapshot.loop.facts import Loop

SOURCE = "arithmetic: float16's smallest number is 6e-8; Micikevicius et al. 2018, arXiv:1710.03740"
TINY_GRADIENT = 3e-6  # entries; a twentieth of float16's smallest normal number
ZERO_STEPS = 0.9  # of the steps at which a tensor's gradient was seen
FEWEST_STEPS_OBSERVED = 5  # steps


@dataclass(frozen=True, kw_only=True, eq=False)
class GradientUnderflow(Result):
    """Of tensors with at least 64 entries whose gradient was seen."""

    zero: tuple[str, ...] = measured("tensors whose gradient was exactly zero at nearly all steps")
    tensors: int = measured("tensors whose gradient was seen")
    size: float = measured(
        "root mean square of a gradient entry where it was not zero, the median", remark="NaN: none was"
    )
    num_steps: int = measured("steps recorded")

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        limit = self.setting("tiny")
        verdict = graded(SOURCE, self.size, limit)
        if not (self.zero and self.size < limit):
            return verdict(
                Level.OK,
                f"Gradient entries are about {format_number(self.size)}, which float16 can hold.",
            )
        return verdict(
            Level.ALARM,
            f"Gradients are too small for float16 and become zero: that of {len(self.zero):,} of {self.tensors:,} "
            f"tensors ({named(self.zero)}) was exactly zero at nearly every step, the entries of the others are "
            f"about {format_number(self.size)}, and no GradScaler lifts them.",
            advice="Use torch.amp.GradScaler with float16, or bfloat16; and look at what the loss is "
            "multiplied with.",
            confidence=Confidence.STRONG_EMPIRICAL,
            refutation="The same gradients in float32 are exactly zero, too: then it is dead units or a cut graph.",
            layers=self.zero[:8],
            cause=Cause.GRADIENT_UNDERFLOW,
            explained_by=(Cause.GRAPH_CUT, Cause.UNITS_DEAD),
            step=1,
        )

    def plot(self, ax: Any = None) -> Any:
        """Tensors with and without a gradient."""
        ax.bar(["zero", "not zero"], [len(self.zero), self.tensors - len(self.zero)])
        ax.set(xlabel="gradient", ylabel="tensors")


@instrument(
    source=SOURCE,
    title="Gradient underflow",
    kind=Kind.CHECK,
    why="A gradient that is rounded to zero teaches nothing: these weights stand still although the loss "
    "could fall.",
)
def gradient_underflow(history: History, loop: Loop, *, tiny: Threshold = TINY_GRADIENT) -> GradientUnderflow:
    """Whether gradients become zero because float16 is too coarse for them.

    history: the record of a watched run. loop: the facts of its loop, which say whether the model computes in
    float16 and a GradScaler is used. An alarm where it does and none is, some tensors' gradients are exactly zero
    at nine of ten steps, and the others' entries are below `tiny` (median over tensors and steps). Not judged
    before step 5. Raises nothing of its own.
    """
    large = numpy.asarray(history.sizes) >= SMALL
    norms = numpy.asarray(history.gradient_norm[:, large], float)
    seen = numpy.isfinite(norms).any(0) if norms.size else numpy.zeros(norms.shape[1], bool)
    norms, names = norms[:, seen], numpy.asarray(history.layers)[large][seen]
    roots = numpy.sqrt(numpy.asarray(history.sizes, float)[large][seen])
    zero = (norms == 0).sum(0) >= ZERO_STEPS * numpy.isfinite(norms).sum(0)
    sizes = norms / roots
    scaling = loop.scaling
    return GradientUnderflow(
        zero=tuple(names[zero].tolist()),
        tensors=len(names),
        size=float(median(numpy.where(sizes > 0, sizes, numpy.nan))) if sizes.size else math.nan,
        num_steps=len(history.steps),
        preconditions=(
            Precondition("float16", scaling.float16, "the model was not seen to compute in float16."),
            Precondition("no scaler", not scaling.scaled_losses, "a GradScaler is used."),
            Precondition(
                "steps",
                len(history.steps) >= FEWEST_STEPS_OBSERVED,
                f"fewer than {FEWEST_STEPS_OBSERVED} steps were recorded.",
            ),
        ),
    )
