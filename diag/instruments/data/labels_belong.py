"""Whether labels belong to their inputs, or were shuffled without them.

A network that learns nothing has many reasons. Two things together speak for the labels: a test that knows no
network finds no dependence between inputs and labels either, and training works as far as it can (examples are
learned by heart, or steps of ordinary size move outputs that differ) while held-out data gains nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from diag.display import format_number
from diag.instruments.causes import Cause
from diag.instruments.data.dependence import (
    MOST_COMPARED,
    feature_p_value,
    independence_p_value,
    rows_compared,
)
from diag.instruments.data.label_order import in_order
from diag.instruments.optimization.course import finite_losses, growth, unpushed, update_ratios
from diag.instruments.outcome.gain import Answered, gain
from diag.ranges import Share
from diag.registry import Kind, instrument
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.history import History
from diag.snapshot.loop.facts import Loop

SOURCE = "Gretton et al. 2008, NIPS 20 (the test of independence), and arithmetic of the losses measured"
FROM_STEP, WHOLE_EPOCHS = 100, 2
FEWEST_COMPARED = 100  # pairs
FEWEST_OTHERS = 25  # pairs with another answer than the most frequent: of fewer a test sees nothing
INDEPENDENT = 0.05  # p-value above which nothing speaks for a dependence
ANYTHING, CERTAINLY = 2.0, 4.0  # standard errors
USUAL_STEP = (2e-4, 0.15)  # of the weights' size
LEFT_OF_WEIGHTS = 0.5  # of their first norm
LEFT_FOR_GOOD = 1.5  # times the first loss: training that has gone wrong says nothing of the labels
WHAT_ELSE = tuple(
    c
    for c in Cause
    if c not in (Cause.LABELS_SHUFFLED, Cause.LABELS_WRONG, Cause.OVERFITTING, Cause.SOFTMAX_ROUNDING,
                 Cause.WORSE_THAN_TRIVIAL, Cause.OUTPUT_CONSTANT, Cause.VECTOR_UNTRAINED)
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelsBelong(Result):
    """Of the examples measured; gains are over an answer without the inputs. NaN: not known."""

    p_value: float = measured(
        "p-value of the test that labels are independent of inputs", remark="NaN before step 100"
    )
    gain: float = measured("training loss below that of an answer without the inputs")
    gain_standard_error: float = measured("standard error of that difference")
    held_out_gain: float = measured("the same of the held-out examples")
    held_out_gain_standard_error: float = measured("standard error of that difference")
    works: bool = measured("steps have an ordinary size, gradients are not zero and the loss has not diverged")
    pairs: int = measured("examples compared")

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        limit = self.setting("independent")
        related = self.p_value <= limit
        return Verdict(
            Level.OK if related else Level.UNKNOWN,
            f"Of {self.pairs:,} examples, labels "
            + ("depend on their inputs" if related else "show no dependence on their inputs")
            + f" by a test of independence (p = {format_number(self.p_value)})"
            + ("." if related else ", which says little by itself."),
            source=SOURCE,
            value=self.p_value,
            threshold=limit,
        )

    @property
    def nowhere_better(self) -> bool:
        """Whether what should gain from learning does not: held-out examples, else training examples."""
        if math.isnan(self.held_out_gain):
            return self.gain <= ANYTHING * self.gain_standard_error
        return self.held_out_gain <= ANYTHING * self.held_out_gain_standard_error

    @property
    def _still_worse(self) -> bool:
        """Whether training examples are answered worse than without inputs, as by a network that begins sure and
        wrong and has not unlearned that."""
        return self.gain < -ANYTHING * self.gain_standard_error

    @property
    def by_heart(self) -> bool:
        """Whether training examples are answered better than without inputs, and held-out ones are not."""
        apart = math.hypot(self.gain_standard_error, self.held_out_gain_standard_error)
        surely = self.gain > CERTAINLY * self.gain_standard_error
        return surely and self.held_out_gain <= 0 and self.gain - self.held_out_gain > CERTAINLY * apart

    @classmethod
    def trend(cls, series: Sequence[tuple[int, Self]]) -> Verdict:
        """A warning where nothing but memory is gained, and inputs and labels look independent of each other."""
        step, last = series[-1]
        independent = last.unmet() is None and last.p_value > last.setting("independent")
        if not independent or not all(r.nowhere_better for _, r in series if r.unmet() is None):
            return last.verdict()
        if not (last.by_heart or last.works):
            return last.verdict()
        return last._shuffled(step)

    def _shuffled(self, step: int) -> Verdict:
        held_out = not math.isnan(self.held_out_gain)
        who = "held-out examples are" if held_out else "training examples are"
        gained = f", while the loss of training examples has come {format_number(self.gain)} below that"
        how = gained if self.by_heart else ""
        return Verdict(
            Level.WARNING,
            f"The labels do not seem to belong to their inputs, or hardly depend on them: after {step:,} steps "
            f"{who} answered no better than without their inputs{how}, and a test of {self.pairs:,} training "
            f"examples finds no dependence between the two (p = {format_number(self.p_value)}).",
            advice="Look at ten training examples with their labels as the loop sees them: one of the two may have "
            "been shuffled, sorted or filtered without the other.",
            source=SOURCE,
            confidence=Confidence.WEAK_EMPIRICAL,
            refutation="A linear model or nearest neighbours on the same examples answer held-out ones better than "
            "the class frequencies.",
            value=self.p_value,
            threshold=self.setting("independent"),
            threshold_source="one in twenty independent data sets is below it (of tables one in ten)",
            cause=Cause.LABELS_SHUFFLED,
            explained_by=tuple(c for c in WHAT_ELSE if c is not Cause.INITIAL_LOSS_HIGH or self._still_worse),
            step=1,
        )

    def plot(self, ax: Any = None) -> Any:
        """The gains over an answer without inputs."""
        gains, errors = (
            [self.gain, self.held_out_gain],
            [self.gain_standard_error, self.held_out_gain_standard_error],
        )
        ax.bar(["training", "held out"], gains, yerr=errors)
        ax.set(xlabel="examples", ylabel="loss gained over no inputs")


@instrument(
    source=SOURCE,
    title="Labels and inputs",
    kind=Kind.CHECK,
    why="Where labels do not belong to their inputs there is nothing to learn but the rows by heart: the "
    "training loss falls and the held-out loss does not.",
)
def labels_belong(
    history: History,
    inputs: Any,
    losses: Tensor,
    logits: Tensor | None = None,
    labels: Tensor | None = None,
    targets: Tensor | None = None,
    held_out_losses: Tensor | None = None,
    held_out_logits: Tensor | None = None,
    held_out_labels: Tensor | None = None,
    held_out_targets: Tensor | None = None,
    loop: Loop | None = None,
    *,
    independent: Share = INDEPENDENT,
) -> LabelsBelong:
    """Whether labels (or the targets of a regression) depend on their inputs.

    inputs (n, ...), or those of a model that takes several, with labels (n,) or targets (n, ...): tested for
    independence by HSIC over permutations, on the first 256, and rows of features by the strongest correlation of
    one. Answers nearly all alike (fewer than 25 others) are not tested. losses, logits and their held-out twins
    give what is gained over an answer without the inputs; history and loop whether training works: size of steps,
    course of the loss, whole epochs. From step 100 on it warns where the p-value is above `independent`, no
    held-out example (without held-out data: no training example) was ever answered better than without its input,
    and training examples are learned by heart or training works. Raises nothing of its own.
    """
    answers = labels if labels is not None else targets
    late = int(history.total_steps) >= FROM_STEP
    rows = rows_compared(inputs, answers) if late and answers is not None else ()
    usable = answers is not None and bool(rows) and _vary(answers)
    training = Answered(losses, logits, labels, targets)
    held_out = Answered(held_out_losses, held_out_logits, held_out_labels, held_out_targets)
    own_gain, held_out_gain = gain(training, training, loop), gain(held_out, training, loop)
    return LabelsBelong(
        p_value=_p_value(rows, inputs, answers) if usable and answers is not None else math.nan,
        gain=own_gain[0],
        gain_standard_error=own_gain[1],
        held_out_gain=held_out_gain[0],
        held_out_gain_standard_error=held_out_gain[1],
        works=_works(history, loop),
        pairs=min(MOST_COMPARED, len(answers)) if answers is not None else 0,
        preconditions=(
            Precondition("steps", late, f"fewer than {FROM_STEP} steps were taken."),
            Precondition(
                "pairs", bool(usable), "there are not a hundred inputs that vary, with answers that vary enough."
            ),
        ),
    )


def _p_value(rows: Sequence[Tensor], inputs: Any, answers: Tensor) -> float:
    """The smaller of two: a weak dependence on one feature is no dependence to a kernel over all of them."""
    return min(independence_p_value(rows, answers[:MOST_COMPARED]), feature_p_value(inputs, answers))


def _vary(answers: Tensor) -> bool:
    """Whether there are enough answers to compare, finite, not nearly all alike and in no order."""
    some = answers[:MOST_COMPARED]
    varied = bool(some.isfinite().all()) and _others(some) >= FEWEST_OTHERS
    return len(answers) >= FEWEST_COMPARED and varied and (some.is_floating_point() or not in_order(some))


def _others(answers: Tensor) -> int:
    """How many rows have another answer than the most frequent one."""
    _, counts = answers.reshape(len(answers), -1).unique(dim=0, return_counts=True)
    return len(answers) - int(counts.max())


def _works(history: History, loop: Loop | None) -> bool:
    """Whether training proceeds as one that learns would: steps of ordinary size, gradients, a loss that has not
    diverged, and all rows seen twice where the loader shows it."""
    losses, _ = finite_losses(history)
    ratios, _, _ = update_ratios(history)
    if not len(losses) or not len(ratios) or unpushed(history):
        return False
    if growth(history, int(history.total_steps)) < LEFT_OF_WEIGHTS:  # decay has taken what was learned
        return False
    usual = USUAL_STEP[0] <= float(sorted(ratios)[len(ratios) // 2]) <= USUAL_STEP[1]
    again = loop is None or not loop.batches.loader_batches or loop.batches.epochs >= WHOLE_EPOCHS
    return usual and again and not float(losses[-10:].mean()) > LEFT_FOR_GOOD * abs(float(losses[0]))
