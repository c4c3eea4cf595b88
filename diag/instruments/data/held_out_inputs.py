"""Held-out inputs against those of training: whether they have been prepared in the same way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diag.display import format_number
from diag.instruments.causes import Cause
from diag.ranges import Times
from diag.registry import Kind, instrument
from diag.result import OUR_CHOICE, Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.loop.data import OUTLIER_ROW

SOURCE = "arithmetic of the inputs"
SPREAD_RATIO, MEAN_SHIFT = 2.0, 2.0
FEWEST_INPUTS = 32


def inputs_apart(mean: float, deviation: float, other_mean: float, other_deviation: float) -> tuple[float, float]:
    """How far apart two sets of inputs are: the ratio of their standard deviations, one or more, and the difference
    of their means in the larger of these."""
    small, large = sorted((deviation, other_deviation))
    ratio = large / small if small > 0 else (1.0 if large == 0 else float("inf"))
    return ratio, abs(other_mean - mean) / large if large > 0 else 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOutInputs(Result):
    """Over all entries; rows a hundred times as large as the median one are left out."""

    mean: float = measured("mean of the training inputs")
    deviation: float = measured("standard deviation of the training inputs")
    held_out_mean: float = measured("mean of the held-out inputs")
    held_out_deviation: float = measured("standard deviation of the held-out inputs")

    @property
    def ratio(self) -> float:
        """How many times the one standard deviation is the other, one or more."""
        return inputs_apart(self.mean, self.deviation, self.held_out_mean, self.held_out_deviation)[0]

    @property
    def shift(self) -> float:
        """The difference of the means, in the larger of the standard deviations."""
        return inputs_apart(self.mean, self.deviation, self.held_out_mean, self.held_out_deviation)[1]

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        numbers = (
            f"a mean of {format_number(self.held_out_mean)} and a standard deviation of "
            f"{format_number(self.held_out_deviation)}, training inputs {format_number(self.mean)} and "
            f"{format_number(self.deviation)}"
        )
        limit = float(self.provenance.settings.get("ratio", SPREAD_RATIO))
        if self.ratio <= limit and self.shift <= MEAN_SHIFT:
            return Verdict(Level.OK, f"Held-out inputs have {numbers}.", source=SOURCE)
        return Verdict(
            Level.WARNING,
            f"Held-out inputs are not as training inputs are: they have {numbers}.",
            advice="Prepare both in the same way, with the mean and standard deviation of the training data.",
            source=SOURCE,
            confidence=Confidence.WEAK_EMPIRICAL,
            refutation="The two are prepared by the same code, and their sources differ so much.",
            value=self.ratio,
            threshold=limit,
            threshold_source=OUR_CHOICE,
            cause=Cause.HELD_OUT_DIFFERS,
            explained_by=(Cause.DATA_OVERWRITTEN,),
            step=1,
        )

    def plot(self, ax: Any = None) -> Any:
        """Means with their standard deviations."""
        means, deviations = [self.mean, self.held_out_mean], [self.deviation, self.held_out_deviation]
        ax.errorbar(["training", "held out"], means, yerr=deviations, fmt="o")
        ax.set(xlabel="inputs", ylabel="value")


@instrument(
    source=SOURCE,
    title="Held-out inputs",
    kind=Kind.CHECK,
    why="Where held-out inputs are prepared in another way, the held-out score says more about the "
    "preparation than about the network.",
)
def held_out_inputs_alike(inputs: Any, held_out_inputs: Any, *, ratio: Times = SPREAD_RATIO) -> HeldOutInputs:
    """Whether held-out inputs have the mean and the scale of training inputs.

    inputs (n, ...), held_out_inputs (m, ...): floating tensors of the same shape but for the examples, as the model
    is given them. Where the standard deviations of all entries differ by more than `ratio`, or the means by more
    than two of the larger one, they have been prepared in different ways, which is a warning. Augmentation changes
    them by less. Raises nothing of its own.
    """
    ours, theirs = _rows(inputs), _rows(held_out_inputs)
    alike = ours is not None and theirs is not None and ours.shape[1] == theirs.shape[1]
    enough = alike and min(len(ours), len(theirs)) >= FEWEST_INPUTS  # type: ignore[arg-type]
    a, b = (ours, theirs) if alike else (torch.zeros(1, 1, dtype=torch.float32),) * 2
    assert a is not None and b is not None
    return HeldOutInputs(
        mean=float(a.mean()),
        deviation=float(a.std(correction=0)),
        held_out_mean=float(b.mean()),
        held_out_deviation=float(b.std(correction=0)),
        preconditions=(
            Precondition("floating inputs", alike, "the inputs are not floating tensors of one shape."),
            Precondition("examples", enough, f"there are fewer than {FEWEST_INPUTS} examples of a side."),
        ),
    )


def _rows(inputs: Any) -> Tensor | None:
    """The usual rows, (n, entries), in double precision; None where there are none."""
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or inputs.ndim < 2 or not inputs.numel():
        return None
    rows = inputs.detach().flatten(1).double()
    sizes = rows.abs().amax(1)
    usual = sizes <= OUTLIER_ROW * sizes.nanmedian()  # not so where it is not a number
    return rows[usual] if usual.any() else None
