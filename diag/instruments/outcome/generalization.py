"""Generalisation: whether the training loss still falls while data that is not trained on gets worse.

A rising loss on held-out data alone says little about a classifier: it grows ever more sure of what it gets right
and wrong. So the share of right answers decides where there are classes, and the loss elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from diag.display import format_number, format_share
from diag.instruments.causes import Cause
from diag.instruments.outcome.gain import (
    Answered,
    gain,
    share_of_most_frequent,
    share_right,
)
from diag.linalg.student import error_of_mean
from diag.registry import Kind, instrument
from diag.result import Confidence, Level, Result, Verdict, measured

SOURCE = "arithmetic of the losses measured"
ERRORS_OF_DIFFERENCE = 3.0  # standard errors of a difference, both measured on the same examples
WORSE = 0.2
LEARNED_ABOVE_CHANCE = 0.2  # accuracy above chance on the training examples
FEWEST_MEASUREMENTS = 3
STEPS_BEFORE_GENERALIZATION = 100  # steps
# Standard errors: of a difference between gains, and of a gain that there may be.
SURE_ERRORS, ANY_ERRORS = 4.0, 2.0
GAP_IN_ACCURACY = 0.25  # by which the accuracy on training examples is above that on held-out ones
EXPLAINED_BY = (
    Cause.LABELS_SHUFFLED, Cause.LABELS_WRONG, Cause.HELD_OUT_DIFFERS, Cause.EVALUATION_IN_TRAIN_MODE,
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
    accuracy: float = measured("training examples answered right; NaN without classes", unit="share")
    held_out_accuracy: float = measured("held-out examples answered right; NaN without classes", unit="share")
    held_out_chance: float = measured(
        "held-out examples of the most frequent class; NaN without classes", unit="share"
    )
    held_out_examples: int = measured("held-out examples")
    chance: float = measured("training examples of the most frequent class", unit="share", default=math.nan)
    gain: float = measured(
        "training loss below that of an answer without the inputs; NaN where not known", default=math.nan
    )
    gain_standard_error: float = measured("standard error of that difference, example by example", default=math.nan)
    held_out_gain: float = measured("the same of the held-out examples", default=math.nan)
    held_out_gain_standard_error: float = measured("standard error of that difference", default=math.nan)

    def verdict(self) -> Verdict:
        if not math.isnan(self.held_out_accuracy):
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
    def trend(cls, series: Sequence[tuple[int, Self]]) -> Verdict:
        """A warning where the best moment on held-out data is past by more than chance, and training went on."""
        _, last = series[-1]
        if len(series) < FEWEST_MEASUREMENTS:
            return last.verdict()
        by_accuracy = not math.isnan(last.held_out_accuracy)
        if by_accuracy and _carries_nothing_over(series):
            return last._learned_by_heart()
        if _never_gains(series):
            return last._gains_nothing()
        best_step, best = (max if by_accuracy else min)(
            series[:-1], key=lambda item: item[1].held_out_accuracy if by_accuracy else item[1].held_out_loss
        )
        lost, limit, unit = _lost(best, last, by_accuracy)
        if not (lost > limit and last.loss < best.loss):
            apart = _parted(series) if by_accuracy else None
            return last.verdict() if apart is None else last._parts(*apart)
        return Verdict(
            Level.WARNING,
            f"The best step is past: since step {best_step:,} the {unit} on held-out data has gone from "
            f"{_shown(best, by_accuracy)} to {_shown(last, by_accuracy)}, while the training loss fell from "
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
                Cause.EVALUATION_IN_TRAIN_MODE, Cause.BATCH_REPEATED, Cause.ROWS_DUPLICATED,
                Cause.NORMALIZATION_STATISTICS_BAD, Cause.LEARNING_RATE_TOO_HIGH, Cause.INPUTS_CONSTANT,
                Cause.ANSWER_IN_INPUT, Cause.EVALUATED_MODEL_IS_ANOTHER, Cause.CLASSES_SORTED,
            ),
        )  # fmt: skip

    def plot(self, ax: Any) -> None:
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


def _carries_nothing_over(series: Sequence[tuple[int, Generalization]]) -> bool:
    """Whether training examples are learned, and held-out ones were never answered better than by chance."""
    last, n = series[-1][1], max(series[-1][1].held_out_examples, 1)
    chance = last.held_out_chance
    error = ERRORS_OF_DIFFERENCE * math.sqrt(max(chance * (1 - chance), 1 / n) / n)
    never = all(r.held_out_accuracy <= chance + error for _, r in series)
    # What training's own most frequent class gives is not learned either, where classes are unequal there alone.
    guessed = chance if math.isnan(last.chance) else max(chance, last.chance)
    return never and last.accuracy >= guessed + max(LEARNED_ABOVE_CHANCE, 2 * error)


def _never_gains(series: Sequence[tuple[int, Generalization]]) -> bool:
    """Whether training examples are answered better than without their inputs and held-out ones are not, which is
    no chance, and held-out ones were not at any time, by two standard errors."""
    step, last = series[-1]
    apart, error = (
        last.gain - last.held_out_gain,
        math.hypot(last.gain_standard_error, last.held_out_gain_standard_error),
    )
    if (
        step < STEPS_BEFORE_GENERALIZATION
        or not last.gain > 0
        or not last.held_out_gain <= 0
        or not apart > SURE_ERRORS * error
    ):
        return False
    n, chance = max(last.held_out_examples, 1), last.held_out_chance
    above = chance + ERRORS_OF_DIFFERENCE * math.sqrt(max(chance * (1 - chance), 1 / n) / n)
    answered = any(r.held_out_accuracy > above for _, r in series)
    return not answered and all(r.held_out_gain <= ANY_ERRORS * r.held_out_gain_standard_error for _, r in series)


def _parted(series: Sequence[tuple[int, Generalization]]) -> tuple[int, Generalization] | None:
    """The best moment by the held-out loss, where that is past and far fewer held-out examples are answered right
    than training examples."""
    _, last = series[-1]
    step, best = min(series[:-1], key=lambda item: item[1].held_out_loss)
    lost, limit, _ = _lost(best, last, by_accuracy=False)
    a, n = last.held_out_accuracy, max(last.held_out_examples, 1)
    apart = last.accuracy - a > max(GAP_IN_ACCURACY, ERRORS_OF_DIFFERENCE * math.sqrt(a * (1 - a) / n))
    return (step, best) if apart and lost > limit and last.loss < best.loss else None


def _lost(best: Generalization, last: Generalization, by_accuracy: bool) -> tuple[float, float, str]:
    """(how much worse it has become, what counts as more than chance, of what)."""
    if by_accuracy:
        a, b, n = best.held_out_accuracy, last.held_out_accuracy, max(last.held_out_examples, 1)
        return a - b, ERRORS_OF_DIFFERENCE * math.sqrt((a * (1 - a) + b * (1 - b)) / n), "accuracy"
    error = math.hypot(best.held_out_loss_standard_error, last.held_out_loss_standard_error)
    return (
        last.held_out_loss - best.held_out_loss,
        max(ERRORS_OF_DIFFERENCE * error, WORSE * abs(best.held_out_loss)),
        "loss",
    )


def _shown(result: Generalization, by_accuracy: bool) -> str:
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
    loop says that the loss is the squared error or Huber's), and held-out ones never were. Raises
    nothing of its own.
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
