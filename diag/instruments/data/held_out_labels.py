"""Held-out labels against those of training: numbered in the same way, and of the same inputs.

A network that answers training examples right says what it takes each class for. Where its answers on held-out
examples and their labels agree up to the numbers of the classes, these were given in another way, of all classes or
of a few that changed places; where they have nothing to do with each other, and the labels nothing with their
inputs, although both are so for training, the labels are not those of these inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diag.display import format_number, format_share
from diag.instruments.causes import Cause
from diag.instruments.data.dependence import MOST_COMPARED, independence_p_value, rows_compared
from diag.instruments.outcome.gain import share_of_most_frequent, share_right
from diag.registry import Kind, instrument
from diag.result import OUR_CHOICE, Confidence, Level, Precondition, Result, Verdict, measured

SOURCE = "arithmetic of answers and labels, and the test of independence of Gretton et al. 2008, NIPS 20"
ANSWERED_RIGHT, RENUMBERED, SAME_NUMBERS = 0.8, 0.8, 0.2  # of the examples
EXCHANGED = 0.6  # of the answers of each class that changed places with others
FEWEST_OF_AN_ANSWER = 5  # examples
FEWEST_LABELLED = 64  # examples of a side
SURELY_DEPENDENT, HARDLY_DEPENDENT = 0.02, 0.1  # p-values
ERRORS_ABOVE_CHANCE = 3.0
ONE_LIST = "Number the classes once, from one sorted list of their names, and use it for both sets."


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOutLabels(Result):
    """Of the examples measured. NaN: not needed, or not known."""

    accuracy: float = measured("training examples answered right", unit="share")
    held_out_accuracy: float = measured("held-out examples answered right", unit="share")
    renumbered: float = measured("held-out examples right with the best other numbers of classes", unit="share")
    chance: float = measured("held-out examples of the most frequent class", unit="share")
    p_value: float = measured("p-value of the test that training labels are independent of their inputs")
    held_out_p_value: float = measured("the same of held-out labels")
    numbers: tuple[tuple[int, int], ...] = measured("class that is answered, and held-out label that belongs to it")
    exchanged: tuple[tuple[int, int], ...] = measured(
        "the same of classes that changed places, where others did not", default=()
    )
    exchanged_share: float = measured(
        "held-out answers of these that have the other's label", unit="share", default=math.nan
    )
    held_out: int = measured("held-out examples")

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        renumbered = self.accuracy >= ANSWERED_RIGHT and self.held_out_accuracy <= SAME_NUMBERS
        if renumbered and self.renumbered >= RENUMBERED:
            return self._of_other_numbers()
        if self.exchanged:
            return self._of_exchanged()
        if self._unrelated():
            return self._of_others()
        return Verdict(
            Level.OK,
            f"{format_share(self.held_out_accuracy)} of the held-out examples are answered right, "
            f"{format_share(self.accuracy)} of the training examples.",
            source=SOURCE,
        )

    def _of_other_numbers(self) -> Verdict:
        return self._told(
            f"Held-out labels give the classes other numbers than training's: {format_share(self.renumbered)} of "
            f"the held-out examples are answered right once the classes are renumbered ({_pairs(self.numbers)}), "
            f"and {format_share(self.held_out_accuracy)} as they are.",
            ONE_LIST,
            self.renumbered,
            RENUMBERED,
        )

    def _of_exchanged(self) -> Verdict:
        return self._told(
            f"Held-out labels have classes exchanged ({_pairs(self.exchanged)}): of the held-out examples that are "
            f"answered with one of these, {format_share(self.exchanged_share)} carry the other's label, while "
            f"{format_share(self.accuracy)} of all training examples are answered as they are labelled.",
            ONE_LIST,
            self.exchanged_share,
            EXCHANGED,
        )

    def _of_others(self) -> Verdict:
        return self._told(
            f"Held-out labels do not seem to belong to their inputs: {format_share(self.accuracy)} of the training "
            f"examples are answered right and {format_share(self.held_out_accuracy)} of the held-out ones, and "
            f"labels depend on their inputs in training (p = {format_number(self.p_value)}) and not in the "
            f"held-out set (p = {format_number(self.held_out_p_value)}).",
            "Look at ten held-out examples with their labels: one of the two may have been shuffled, sorted or "
            "filtered without the other.",
            self.held_out_p_value,
            HARDLY_DEPENDENT,
        )

    def _unrelated(self) -> bool:
        error = math.sqrt(self.chance * (1 - self.chance) / self.held_out)
        above_chance = self.chance + ERRORS_ABOVE_CHANCE * error
        apart = self.p_value <= SURELY_DEPENDENT and self.held_out_p_value >= HARDLY_DEPENDENT
        # Labels that hardly vary, as the first of a set sorted by class, depend on nothing, and all is chance.
        vary = above_chance < self.accuracy
        return self.accuracy >= ANSWERED_RIGHT and vary and self.held_out_accuracy <= above_chance and apart

    def _told(self, sentence: str, advice: str, value: float, threshold: float) -> Verdict:
        return Verdict(
            Level.WARNING,
            sentence,
            advice=advice,
            source=SOURCE,
            confidence=Confidence.STRONG_EMPIRICAL,
            refutation="Held-out labels that a person would give to these inputs, by training's numbers.",
            value=value,
            threshold=threshold,
            threshold_source=OUR_CHOICE,
            cause=Cause.HELD_OUT_LABELS_DIFFER,
            explained_by=(
                Cause.HELD_OUT_DIFFERS, Cause.EVALUATION_IN_TRAIN_MODE, Cause.NORMALIZATION_STATISTICS_BAD,
                Cause.ANSWER_IN_INPUT, Cause.TRAINING_IN_EVAL_MODE,
            ),
            step=1,
        )  # fmt: skip

    def plot(self, ax: Any = None) -> Any:
        """Shares of right answers."""
        ax.bar(["training", "held out", "renumbered"], [self.accuracy, self.held_out_accuracy, self.renumbered])
        ax.set(xlabel="examples", ylabel="share answered right")


@instrument(
    source=SOURCE,
    title="Held-out labels",
    kind=Kind.CHECK,
    why="Where held-out labels mean something else than training's do, the held-out score says nothing of the "
    "network.",
)
def held_out_labels(
    inputs: Any,
    logits: Tensor,
    labels: Tensor,
    held_out_inputs: Any,
    held_out_logits: Tensor,
    held_out_labels: Tensor,
) -> HeldOutLabels:
    """Whether held-out labels have training's numbers and belong to their inputs.

    logits (n, K), labels (n,), and the same of held-out examples (m,). Judged where four fifths of the training
    examples are answered right. At most a fifth of the held-out ones right, and four fifths once each class that is
    answered is given the label that is most frequent among these answers (one for each class), is a warning:
    the numbers differ. So are some classes that changed places: each has another one's label in six tenths of its
    held-out answers and its own in four fifths of its training answers. And so are held-out answers no better than
    the most frequent class where a test of independence (HSIC, 256 examples) finds that labels depend on inputs in
    training and not in the held-out set, unless held-out labels hardly vary. Raises nothing of its own.
    """
    enough = min(len(labels), len(held_out_labels)) >= FEWEST_LABELLED and logits.shape[1] > 1
    one_each = len(logits) == len(labels) and len(held_out_logits) == len(held_out_labels)
    usable = enough and one_each
    accuracy, held_out = share_right(logits, labels), share_right(held_out_logits, held_out_labels)
    learned = usable and accuracy >= ANSWERED_RIGHT
    answers = held_out_logits.argmax(1)
    numbers, renumbered = _numbers(answers, held_out_labels) if learned else ((), math.nan)
    exchanged = _exchanged(numbers, logits.argmax(1), labels, answers, held_out_labels)
    suspect = learned and held_out <= 0.5
    p, held_out_p = (
        (_p_value(inputs, labels), _p_value(held_out_inputs, held_out_labels)) if suspect else (math.nan, math.nan)
    )
    return HeldOutLabels(
        accuracy=accuracy,
        held_out_accuracy=held_out,
        renumbered=renumbered,
        chance=share_of_most_frequent(held_out_labels),
        p_value=p,
        held_out_p_value=held_out_p,
        numbers=numbers,
        exchanged=exchanged,
        exchanged_share=_share_of(exchanged, answers, held_out_labels) if exchanged else math.nan,
        held_out=len(held_out_labels),
        preconditions=(
            Precondition("labels", usable, f"there are not {FEWEST_LABELLED} labelled examples on each side."),
        ),
    )


def _pairs(numbers: tuple[tuple[int, int], ...]) -> str:
    others = [f"{a} is {b}" for a, b in numbers if a != b]
    return ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")


def _p_value(inputs: Any, labels: Tensor) -> float:
    """NaN where the inputs cannot be compared."""
    rows = rows_compared(inputs, labels)
    return independence_p_value(rows, labels[:MOST_COMPARED]) if rows else math.nan


def _numbers(answers: Tensor, labels: Tensor) -> tuple[tuple[tuple[int, int], ...], float]:
    """The most frequent label of each class that is answered, and the share of examples that then are right; NaN
    where two classes would have one label, or classes that are hardly answered say nothing."""
    found = {}
    right = 0
    for answer in answers.unique().tolist():
        theirs = labels[answers == answer]
        if len(theirs) >= FEWEST_OF_AN_ANSWER:
            values, counts = theirs.unique(return_counts=True)
            found[answer] = int(values[counts.argmax()])
            right += int(counts.max())
    if len(found) < 2 or len(set(found.values())) < len(found):
        return (), math.nan
    return tuple(sorted(found.items())), right / len(labels)


def _exchanged(
    numbers: tuple[tuple[int, int], ...], answers: Tensor, labels: Tensor, theirs: Tensor, their_labels: Tensor
) -> tuple[tuple[int, int], ...]:
    """The classes that changed places among themselves while others kept theirs, with the held-out label of each;
    none where one of them is not answered right in training, seldom has that label, or where all of them are so few
    that answers which cannot tell two classes apart would have it as often by chance."""
    moved = tuple((a, b) for a, b in numbers if a != b)
    closed = {a for a, _ in moved} == {b for _, b in moved}
    if not moved or not closed or len(moved) == len(numbers):
        return ()
    own = (_share_of(((a, a),), answers, labels) >= ANSWERED_RIGHT for a, _ in moved)
    other = (_share_of((pair,), theirs, their_labels) >= EXCHANGED for pair in moved)
    if not (all(own) and all(other)):
        return ()
    by_chance = 0.5 + ERRORS_ABOVE_CHANCE * 0.5 / math.sqrt(sum(int((theirs == a).sum()) for a, _ in moved))
    return moved if _share_of(moved, theirs, their_labels) >= by_chance else ()


def _share_of(pairs: tuple[tuple[int, int], ...], answers: Tensor, labels: Tensor) -> float:
    """The share of the answers with one of these classes that have the label beside it; NaN where there are few."""
    of_them = sum(int((answers == a).sum()) for a, _ in pairs)
    like_it = sum(int(((answers == a) & (labels == b)).sum()) for a, b in pairs)
    return like_it / of_them if of_them >= FEWEST_OF_AN_ANSWER else math.nan
