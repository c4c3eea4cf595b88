"""Running statistics of batch normalisation: whether they are those of the data, or still those of the start, of
the last batch alone, or of other data.

In training a batch is divided by its own statistics and in evaluation by the running ones. With momentum m these
are after n batches to (1 - m)^n what they began with, mean 0 and variance 1. A momentum near one leaves nothing but
the last batch in them, and a layer in evaluation mode what it was trained on before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from diag.display import format_number, format_share
from diag.errors import layer_called
from diag.instruments.causes import Cause
from diag.ranges import Times
from diag.registry import Kind, instrument
from diag.result import OUR_CHOICE, Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.inside.normalization import RunningStatistics

SOURCE = "arithmetic of running averages and of one forward pass"
VARIANCE_RATIO = 3.0
FAST, STEPS_BEFORE_FAST = 0.5, 10  # momentum
MEANS_APART = 1.25  # running standard deviations
# Steps from which on so much of the running statistics may no longer be their start. With torch's own momentum a
# thousandth is left after 66, with one of 0.01 half after 69.
SLOW = ((30, 0.9), (100, 0.5))
UNMOVED_BATCHES = 5  # any momentum moves them from exactly 0 and 1 with the first one
UNMOVED_VARIANCE, UNMOVED_MEAN = 1.5, 0.5  # a factor, and standard deviations: evaluation is another network then


@dataclass(frozen=True, kw_only=True, eq=False)
class NormalizationStatistics(Result):
    """Of the batch normalisation whose running variance fits what enters it the least."""

    layer: str = measured("the layer")
    factor: float = measured("variance of what enters over the running one, or the inverse, the median channel")
    unseen: float = measured("share of the running statistics that is still their start", unit="share")
    momentum: float = measured("their momentum", remark="0: plain averages")
    batches: int = measured("batches that they have seen")
    shifted: str = measured("the layer whose running mean fits what enters it the least", default="")
    shift: float = measured("distance of its means over the running standard deviation, the median", default=0.0)
    shifted_batches: int = measured("batches that it has seen", default=0)
    unmoved: str = measured("a layer whose running statistics are exactly 0 and 1 after some batches", default="")
    unmoved_layers: int = measured("how many such layers there are", default=0)
    unmoved_batches: int = measured("batches that it has seen", default=0)
    unmoved_factor: float = measured("variance of what enters it, or the inverse, the median channel", default=1.0)
    unmoved_shift: float = measured("means of what enters it, their size in the median channel", default=0.0)

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        return Verdict(
            Level.UNKNOWN if self.factor > self.setting("factor") else Level.OK,
            f"The running variance of {layer_called(self.layer)} fits what enters it to a factor of "
            f"{format_number(self.factor)}.",
            source=SOURCE,
            value=self.factor,
            threshold=self.setting("factor"),
            threshold_source=OUR_CHOICE,
        )

    @classmethod
    def trend(cls, series: Sequence[tuple[int, Self]]) -> Verdict:
        """A warning where running statistics hardly move, or are those of the last batch alone, or stand still and
        are of other data, and evaluation divides by something else than it should."""
        step, last = series[-1]
        limit = last.setting("factor")
        if last.unmet() is not None or not last.batches:
            return last.verdict()
        if last.unmoved_factor > UNMOVED_VARIANCE or last.unmoved_shift > UNMOVED_MEAN:
            return last._unmoved()
        far = last.factor > limit
        still = [r.shifted_batches for s, r in series if r.shifted == last.shifted]
        if last.shift > MEANS_APART and last.shifted_batches and len(still) > 1 and len(set(still)) == 1:
            return last._of_other_data()
        times_off = max((r.factor for s, r in series if s >= STEPS_BEFORE_FAST and r.momentum >= FAST), default=0.0)
        if times_off > limit:
            return last._of_the_last_batch(times_off)
        if far and any(step >= since and last.unseen > share for since, share in SLOW):
            return last._of_the_start()
        return last.verdict()

    def _unmoved(self) -> Verdict:
        of_variance = self.unmoved_factor > UNMOVED_VARIANCE
        off = (
            f"a variance {format_number(self.unmoved_factor)} times as large or as small"
            if of_variance
            else f"means that are {format_number(self.unmoved_shift)} away from 0"
        )
        others = self.unmoved_layers - 1
        layers = f"{layer_called(self.unmoved)}{f' and {others:,} more' if others else ''}"
        return self._bad(
            f"Running statistics never move: after {self.unmoved_batches:,} batches those of {layers} are exactly "
            f"mean 0 and variance 1, and what enters {layer_called(self.unmoved)} has {off}. Training normalises "
            "each batch; in eval mode nothing is normalised.",
            "Give batch normalisation a momentum above zero (torch's own is 0.1, the share of the new batch), and "
            "look for what resets the statistics.",
            self.unmoved,
            (self.unmoved_factor, UNMOVED_VARIANCE) if of_variance else (self.unmoved_shift, UNMOVED_MEAN),
            Cause.TRAINING_DIVERGED,
        )

    def _of_the_start(self) -> Verdict:
        return self._bad(
            f"Running statistics are still what they began with to {format_share(self.unseen)}: "
            f"{layer_called(self.layer)} has a "
            f"momentum of {self.momentum:g} and has seen {self.batches:,} batches, and what enters it has a "
            f"variance {format_number(self.factor)} times off. In eval mode the network is another than in "
            "training.",
            "Raise the momentum of batch normalisation (torch's own is 0.1: the share of the new batch), or "
            "set the statistics from the data before evaluating (torch.optim.swa_utils.update_bn).",
            self.layer,
            (self.factor, self.setting("factor")),
            Cause.TRAINING_DIVERGED,
        )

    def _of_the_last_batch(self, times_off: float) -> Verdict:
        return self._bad(
            f"Running statistics are those of the last batch: {layer_called(self.layer)} has a momentum of "
            f"{self.momentum:g}, the share of the new batch, and what enters it has had a variance up to "
            f"{format_number(times_off)} times off, as one batch is too few rows to tell. In eval mode the "
            "network is another than in training.",
            "Lower the momentum of batch normalisation to torch's own 0.1, and use batches of more than a few "
            "rows; keep pretrained statistics by .eval() on these layers.",
            self.layer,
            (times_off, self.setting("factor")),
        )

    def _of_other_data(self) -> Verdict:
        return self._bad(
            f"Running statistics are of other data: {self.shifted} is in eval mode in training, and what enters it "
            f"lies {format_number(self.shift)} of its running standard deviations from its running mean, in the "
            "median channel.",
            "Prepare the inputs as those were on which these layers were trained (scale, sign, order of channels), "
            "or let the statistics adapt: .train() on these layers.",
            self.shifted,
            (self.shift, MEANS_APART),
        )

    def _bad(self, sentence: str, advice: str, layer: str, measure: tuple[float, float], *others: Cause) -> Verdict:
        """The warning, with the number that decided and its limit; others: causes that it may follow from, too."""
        value, limit = measure
        return Verdict(
            Level.WARNING,
            sentence,
            advice=advice,
            source=SOURCE,
            confidence=Confidence.ARITHMETIC,
            refutation="The same loss in train and in eval mode.",
            value=value,
            threshold=limit,
            threshold_source=OUR_CHOICE,
            layers=(layer,),
            cause=Cause.NORMALIZATION_STATISTICS_BAD,
            explained_by=(Cause.TRAINING_IN_EVAL_MODE, Cause.NOT_FINITE, *others),
            step=1,
        )

    def plot(self, ax: Any = None) -> Any:
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
    layer and its running statistics are to nine tenths at step 30, or to half at step 100, what they began with, or
    with a momentum of a half or more; where statistics that stand still lie far from what enters; and where they
    are exactly mean 0 and variance 1 after 5 batches and what enters has a variance 1.5 times or a mean half a
    standard deviation off. Raises nothing of its own.
    """
    shifted = max(running_statistics, key=lambda s: s.shift, default=None)
    worst = max(running_statistics, key=lambda s: s.factor, default=None)
    known = worst is not None and worst.factor == worst.factor
    unmoved = [s for s in running_statistics if s.unmoved and s.batches >= UNMOVED_BATCHES]
    clearest = max(unmoved, key=lambda s: max(s.factor / UNMOVED_VARIANCE, s.shift / UNMOVED_MEAN), default=None)
    return NormalizationStatistics(
        layer=worst.name or "the model itself" if worst else "",
        factor=worst.factor if worst else 1.0,
        unseen=worst.unseen if worst else 0.0,
        momentum=worst.momentum if worst else 0.0,
        batches=worst.batches if worst else 0,
        shifted=shifted.name or "the model itself" if shifted else "",
        shift=shifted.shift if shifted else 0.0,
        shifted_batches=shifted.batches if shifted else 0,
        unmoved=clearest.name or "the model itself" if clearest else "",
        unmoved_layers=len(unmoved),
        unmoved_batches=clearest.batches if clearest else 0,
        unmoved_factor=clearest.factor if clearest else 1.0,
        unmoved_shift=clearest.shift if clearest else 0.0,
        preconditions=(Precondition("finite statistics", known, "no finite statistics were seen."),),
    )
