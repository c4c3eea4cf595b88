"""Running statistics of batch normalisation: whether they are of the data, or still what they began with.

In training a batch is divided by its own statistics and in evaluation by the running ones. With momentum m these
are after n batches to (1 - m)^n what they began with, mean 0 and variance 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from diag.display import format_number, format_share
from diag.instruments.causes import Cause
from diag.ranges import Times
from diag.registry import Kind, instrument
from diag.result import OUR_CHOICE, Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.inside.normalization import RunningStatistics

SOURCE = "arithmetic of running averages and of one forward pass"
VARIANCE_RATIO = 3.0
# Steps from which on so much of the running statistics may no longer be their start. With torch's own momentum a
# thousandth is left after 66, with one of 0.01 half after 69.
SLOW = ((30, 0.9), (100, 0.5))


@dataclass(frozen=True, kw_only=True, eq=False)
class NormalizationStatistics(Result):
    """Of the batch normalisation whose running variance fits what enters it the least."""

    layer: str = measured("the layer")
    factor: float = measured("variance of what enters over the running one, or the inverse, the median channel")
    unseen: float = measured("share of the running statistics that is still their start", unit="share")
    momentum: float = measured("their momentum", remark="0: plain averages")
    batches: int = measured("batches that they have seen")

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        return Verdict(
            Level.UNKNOWN if self.factor > self.setting("factor") else Level.OK,
            f"The running variance of {self.layer} fits what enters it to a factor of "
            f"{format_number(self.factor)}.",
            source=SOURCE,
            value=self.factor,
            threshold=self.setting("factor"),
            threshold_source=OUR_CHOICE,
        )

    @classmethod
    def trend(cls, series: Sequence[tuple[int, Self]]) -> Verdict:
        """A warning where running statistics hardly move, and evaluation divides by something else than
        training."""
        step, last = series[-1]
        slow = any(step >= since and last.unseen > share for since, share in SLOW)
        if last.unmet() is not None or not slow or last.factor <= last.setting("factor") or not last.batches:
            return last.verdict()
        return Verdict(
            Level.WARNING,
            f"Running statistics are still what they began with to {format_share(last.unseen)}: {last.layer} has a "
            f"momentum of {last.momentum:g} and has seen {last.batches:,} batches, and what enters it has a "
            f"variance {format_number(last.factor)} times off. In eval mode the network is another than in "
            "training.",
            advice="Raise the momentum of batch normalisation (torch's own is 0.1: the share of the new batch), or "
            "set the statistics from the data before evaluating (torch.optim.swa_utils.update_bn).",
            source=SOURCE,
            confidence=Confidence.ARITHMETIC,
            refutation="The same loss in train and in eval mode.",
            value=last.factor,
            threshold=last.setting("factor"),
            threshold_source=OUR_CHOICE,
            layers=(last.layer,),
            cause=Cause.NORMALIZATION_STATISTICS_BAD,
            explained_by=(Cause.TRAINING_IN_EVAL_MODE, Cause.NOT_FINITE, Cause.TRAINING_DIVERGED),
            step=1,
        )

    def plot(self, ax: Any = None) -> None:
        """How far the variance is off."""
        ax.bar([self.layer], [self.factor])
        ax.set(xlabel="batch normalisation", ylabel="variance that enters over the running one", yscale="log")


@instrument(
    source=SOURCE,
    title="Statistics of normalisation",
    kind=Kind.CHECK,
    why="Running statistics that have not taken in the data are what evaluation uses: a good network then "
    "scores as a bad one.",
)
def normalization_statistics(
    running_statistics: Sequence[RunningStatistics], *, factor: Times = VARIANCE_RATIO
) -> NormalizationStatistics:
    """Whether batch normalisation's running statistics have taken in the data.

    running_statistics: what enters each layer in evaluation mode beside its running statistics
    (`diag.snapshot.inside.normalization`). A warning where the variance is more than `factor` off in the worst
    layer and its running statistics are to nine tenths at step 30, or to half at step 100, what they began with.
    Raises nothing of its own.
    """
    worst = max(running_statistics, key=lambda s: s.factor, default=None)
    known = worst is not None and worst.factor == worst.factor
    return NormalizationStatistics(
        layer=worst.name or "the model itself" if worst else "",
        factor=worst.factor if worst else 1.0,
        unseen=worst.unseen if worst else 0.0,
        momentum=worst.momentum if worst else 0.0,
        batches=worst.batches if worst else 0,
        preconditions=(Precondition("finite statistics", known, "no finite statistics were seen."),),
    )
