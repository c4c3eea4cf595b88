"""Generalisation: whether the training loss still falls while data that is not trained on gets worse.

A rising loss on held-out data alone says little about a classifier: it grows ever more sure of what it gets right
and wrong. So the share of right answers decides where there are classes, and the loss elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from diag.display import format_number, format_share
from diag.instruments.causes import Cause
from diag.instruments.outcome.carrying_over import (
    ERRORS_OF_DIFFERENCE,
    GAP_IN_ACCURACY,
    WORSE,
    carries_nothing_over,
    lost_since,
    never_gains,
    parted,
    stands_still,
)
from diag.instruments.outcome.gain import (
    Answered,
    gain,
    share_of_most_frequent,
    share_right,
)
from diag.instruments.outcome.logged import Logged, logged_course
from diag.linalg.student import error_of_mean
from diag.registry import Kind, instrument
from diag.result import Confidence, Level, Result, Verdict, measured

SOURCE = "arithmetic of the losses measured"
FEWEST_MEASUREMENTS = 3
EXPLAINED_BY = (
    Cause.LABELS_SHUFFLED, Cause.LABELS_WRONG, Cause.HELD_OUT_DIFFERS, Cause.EVALUATION_IN_TRAIN_MODE,
    Cause.HELD_OUT_LABELS_DIFFER,
    Cause.LEARNING_RATE_TOO_HIGH, Cause.TRAINING_DIVERGED, Cause.BATCH_REPEATED, Cause.ROWS_DUPLICATED,
    Cause.NORMALIZATION_STATISTICS_BAD, Cause.CLASS_MISSING, Cause.CLASSES_SORTED, Cause.INPUTS_CONSTANT,
    Cause.CLASS_IMBALANCE,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Generalization(Result):
    """Of the examples measured: the first of the probe set, and the first of the held-out data."""

    loss: float = measured("mean loss of the training examples")
    held_out_loss: float = measured("mean loss of the held-out examples")
    held_out_loss_standard_error: float = measured("standard error of that mean")
    accuracy: float = measured("training examples answered right", remark="NaN without classes", unit="share")
    held_out_accuracy: float = measured(
        "held-out examples answered right", remark="NaN without classes", unit="share"
    )
    held_out_chance: float = measured(
        "held-out examples of the most frequent class", remark="NaN without classes", unit="share"
    )
    held_out_examples: int = measured("held-out examples")
    chance: float = measured("training examples of the most frequent class", unit="share", default=math.nan)
    gain: float = measured(
        "training loss below that of an answer without the inputs", remark="NaN where not known", default=math.nan
    )
    gain_standard_error: float = measured("standard error of that difference, example by example", default=math.nan)
    held_out_gain: float = measured("the same of the held-out examples", default=math.nan)
    held_out_gain_standard_error: float = measured("standard error of that difference", default=math.nan)
    held_out_accuracy_standard_error: float = measured(
        "standard error of the share of held-out examples answered right, by the scatter of logged shares",
        unit="share",
        default=math.nan,
    )

    def verdict(self) -> Verdict:
        if not math.isnan(self.held_out_accuracy) and math.isnan(self.accuracy):
            text = f"{format_share(self.held_out_accuracy)} of the held-out examples are answered right."
        elif not math.isnan(self.held_out_accuracy):
            text = (
                f"{format_share(self.held_out_accuracy)} of the held-out examples are answered right, "
                f"{format_share(self.accuracy)} of the training examples."
            )
        else:
            text = (
                f"The loss is {format_number(self.held_out_loss)} on held-out and {format_number(self.loss)} on "
                "training examples."
            )
        return Verdict(Level.OK, text, source=SOURCE, confidence=Confidence.ARITHMETIC)

    @classmethod
    def from_logged(
        cls, metrics: Mapping[str, Sequence[tuple[int, float]]], history: Any
    ) -> Sequence[tuple[int, Self]]:
        """The course of a validation loss and accuracy that were logged, with the error that their scatter
        shows."""
        return [(e.step, cls._of_logged(e)) for e in logged_course(metrics, history)]

    @classmethod
    def _of_logged(cls, e: Logged) -> Self:
        return cls(
            loss=e.loss,
            held_out_loss=e.held_out_loss,
            held_out_loss_standard_error=e.held_out_loss_error,
            accuracy=e.accuracy,
            held_out_accuracy=e.held_out_accuracy,
            held_out_accuracy_standard_error=e.held_out_accuracy_error,
            held_out_chance=math.nan,
            held_out_examples=0,
        )

    @classmethod
    def trend(cls, series: Sequence[tuple[int, Self]]) -> Verdict:
        """A warning where the best moment on held-out data is past by more than chance, and training went on."""
        _, last = series[-1]
        if len(series) < FEWEST_MEASUREMENTS:
            return last.verdict()
        by_accuracy = not math.isnan(last.held_out_accuracy)
        if by_accuracy and carries_nothing_over(series):
            return last._learned_by_heart()
        if never_gains(series):
            return last._gains_nothing()
        best_step, best = (max if by_accuracy else min)(
            series[:-1], key=lambda item: item[1].held_out_accuracy if by_accuracy else item[1].held_out_loss
        )
        lost, limit, unit = lost_since(best, last, by_accuracy)
        if not (lost > limit and last.loss < best.loss):
            apart, still = parted(series) if by_accuracy else None, stands_still(series)
            if apart is None and still is not None:
                return last._stands_still(*still)
            return last.verdict() if apart is None else last._parts(*apart)
        return Verdict(
            Level.WARNING,
            f"The best step is past: since step {best_step:,} the {unit} on held-out data has gone from "
            f"{_numbers(best, by_accuracy)} to {_numbers(last, by_accuracy)}, while the training loss fell from "
            f"{format_number(best.loss)} to {format_number(last.loss)}.",
            advice=f"Keep the weights of step {best_step:,} (early stopping); then more data, augmentation, weight "
            "decay or dropout. Look for wrong labels, which are learned by heart last.",
            source=SOURCE,
            confidence=Confidence.ARITHMETIC,
            refutation="Other held-out examples do not get worse.",
            value=lost,
            threshold=limit,
            threshold_source=f"{ERRORS_OF_DIFFERENCE:g} standard errors, and {format_share(WORSE)} for a loss",
            cause=Cause.OVERFITTING,
            explained_by=EXPLAINED_BY,
            step=best_step,
        )  # fmt: skip

    def _parts(self, step: int, best: Generalization) -> Verdict:
        return Verdict(
            Level.WARNING,
            f"Training and held-out data part: {format_share(self.accuracy)} of the training examples are answered "
            f"right and {format_share(self.held_out_accuracy)} of the held-out ones, whose loss has gone from "
            f"{format_number(best.held_out_loss)} at step {step:,} to {format_number(self.held_out_loss)}.",
            advice="More data, augmentation, weight decay or dropout; look for wrong labels, which are learned by "
            "heart last.",
            source=SOURCE,
            confidence=Confidence.ARITHMETIC,
            refutation="Other held-out examples are answered as well as the training examples.",
            value=self.accuracy - self.held_out_accuracy,
            threshold=GAP_IN_ACCURACY,
            threshold_source=f"{format_share(GAP_IN_ACCURACY)} of the examples, and {ERRORS_OF_DIFFERENCE:g} "
            f"standard errors",
            cause=Cause.OVERFITTING,
            explained_by=EXPLAINED_BY,
            step=step,
        )

    def _stands_still(self, step: int, before: Generalization) -> Verdict:
        by_accuracy = not math.isnan(self.accuracy)
        what = "share of held-out examples answered right" if by_accuracy else "held-out loss"
        own = (
            f"{format_share(self.accuracy)} of the training examples are answered right, and "
            if by_accuracy
            else ""
        )
        return Verdict(
            Level.WARNING,
            f"Nothing more carries over: {own}the training loss fell from {format_number(before.loss)} at step "
            f"{step:,} to {format_number(self.loss)}, while the {what} went from "
            f"{_numbers(before, by_accuracy)} to {_numbers(self, by_accuracy)}.",
            advice="More steps will not help: more data, augmentation, weight decay or dropout will; look for "
            "wrong labels, which are learned by heart last.",
            source=SOURCE,
            confidence=Confidence.ARITHMETIC,
            refutation="Held-out examples are answered better after twice as many steps.",
            value=self.held_out_accuracy if by_accuracy else self.held_out_loss,
            threshold=GAP_IN_ACCURACY,
            threshold_source=f"training examples are answered better by {format_share(GAP_IN_ACCURACY)} (of all, "
            "or of the trivial answer's loss)",
            cause=Cause.OVERFITTING,
            explained_by=EXPLAINED_BY,
            step=step,
        )

    def _gains_nothing(self) -> Verdict:
        what = "class frequencies" if not math.isnan(self.accuracy) else "mean of the targets"
        return self._no_carrying_over(
            f"training examples have a loss {format_number(self.gain)} below that of answering with the {what}, "
            f"and held-out ones {format_number(abs(self.held_out_gain))} above it",
            self.held_out_gain,
            0.0,
        )

    def _learned_by_heart(self) -> Verdict:
        return self._no_carrying_over(
            f"{format_share(self.accuracy)} of the training examples are answered right and "
            f"{format_share(self.held_out_accuracy)} of the held-out ones, no more than the most frequent class "
            f"gives ({format_share(self.held_out_chance)})",
            self.held_out_accuracy,
            self.held_out_chance,
        )

    def _no_carrying_over(self, how: str, value: float, threshold: float) -> Verdict:
        return Verdict(
            Level.WARNING,
            f"Nothing of what is learned carries over: {how}.",
            advice="Check that held-out data is prepared as training data, and look at ten training examples with "
            "their labels as the loop sees them; then more data, augmentation or a smaller network.",
            source=SOURCE,
            confidence=Confidence.ARITHMETIC,
            refutation="A linear model on the same training examples does better than chance on the held-out ones.",
            value=value,
            threshold=threshold,
            threshold_source="what is answered without the inputs, and the standard errors of both",
            cause=Cause.WORSE_THAN_TRIVIAL,
            explained_by=(
                Cause.LABELS_SHUFFLED, Cause.LABELS_WRONG, Cause.OVERFITTING, Cause.HELD_OUT_DIFFERS,
                Cause.HELD_OUT_LABELS_DIFFER, Cause.TARGETS_MISPLACED,
                Cause.EVALUATION_IN_TRAIN_MODE, Cause.BATCH_REPEATED, Cause.ROWS_DUPLICATED,
                Cause.NORMALIZATION_STATISTICS_BAD, Cause.LEARNING_RATE_TOO_HIGH, Cause.INPUTS_CONSTANT,
                Cause.ANSWER_IN_INPUT, Cause.EVALUATED_MODEL_IS_ANOTHER, Cause.CLASSES_SORTED,
            ),
        )  # fmt: skip

    def plot(self, ax: Any = None) -> Any:
        """Training beside held-out loss."""
        ax.bar(["training", "held out"], [self.loss, self.held_out_loss])
        ax.set(xlabel="examples", ylabel="mean loss")

    @classmethod
    def plot_trend(cls, ax: Any, series: Sequence[tuple[int, Self]]) -> None:
        """Both losses over the steps."""
        steps = [s for s, _ in series]
        ax.semilogx(steps, [r.loss for _, r in series], marker="o", markersize=3, label="training")
        ax.semilogx(steps, [r.held_out_loss for _, r in series], marker="o", markersize=3, label="held out")
        ax.set(xlabel="step", ylabel="mean loss")
        ax.legend()


def _numbers(result: Generalization, by_accuracy: bool) -> str:
    return format_share(result.held_out_accuracy) if by_accuracy else format_number(result.held_out_loss)


@instrument(
    source=SOURCE,
    title="Generalisation",
    kind=Kind.CHECK,
    why="What counts is how the network does on data that it has not seen; where that gets worse while the "
    "training loss falls, an earlier checkpoint is the better network.",
)
def generalization(
    losses: Tensor,
    held_out_losses: Tensor,
    logits: Tensor | None = None,
    labels: Tensor | None = None,
    held_out_logits: Tensor | None = None,
    held_out_labels: Tensor | None = None,
    targets: Tensor | None = None,
    held_out_targets: Tensor | None = None,
    loop: Any = None,
) -> Generalization:
    """Training beside held-out loss and accuracy, and whether the best step is past.

    losses, held_out_losses (n,), (m,): of each example, by the training's own loss. logits, labels: where the task
    is a classification, for the share of right answers. Over a run it warns where held-out data has become worse
    than it was by three standard errors (for a loss by a fifth at least) while the training loss fell; where the
    held-out loss did and a quarter of the examples fewer are answered right than in training; and where nothing
    carries over: training examples are answered better than by the class frequencies (targets: by their mean, where
    loop says that the loss is the squared error or Huber's), and held-out ones never were; and where nothing more
    carries over: since the first half of training the training loss fell by half (or a tenth of the training
    examples more are answered right, as with smoothed labels), held-out examples are answered no
    better by a standard error, and worse than training examples by a quarter (of the examples where all of these
    are known by heart, or of the squared error of the mean). A course of a validation loss and accuracy that was
    logged is judged by the error that its scatter shows. Raises nothing of its own.
    """
    training = Answered(losses, logits, labels, targets)
    held_out = Answered(held_out_losses, held_out_logits, held_out_labels, held_out_targets)
    own_gain, held_out_gain = gain(training, training, loop), gain(held_out, training, loop)
    return Generalization(
        loss=float(losses.double().mean()),
        held_out_loss=float(held_out_losses.double().mean()),
        held_out_loss_standard_error=error_of_mean(held_out_losses),
        accuracy=share_right(logits, labels),
        held_out_accuracy=share_right(held_out_logits, held_out_labels),
        held_out_chance=share_of_most_frequent(held_out_labels),
        held_out_examples=len(held_out_losses),
        chance=share_of_most_frequent(labels),
        gain=own_gain[0],
        gain_standard_error=own_gain[1],
        held_out_gain=held_out_gain[0],
        held_out_gain_standard_error=held_out_gain[1],
    )
