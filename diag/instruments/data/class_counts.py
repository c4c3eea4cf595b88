"""Classes: whether every class that the network can answer with occurs, and how unequal they are in number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from diag.display import format_number
from diag.errors import named
from diag.instruments.causes import Cause
from diag.instruments.data.label_order import in_order
from diag.ranges import Times
from diag.registry import Kind, instrument
from diag.result import OUR_CHOICE, Confidence, Level, Precondition, Result, Verdict, measured

SOURCE = "arithmetic of the labels"
COMMON = 5  # examples of each class that does occur
EXPECTED = 20  # examples a class, were they equal, from which on an absent one is not there by chance
SURELY = 100  # examples a class, from which on one that may be rare is taken to be absent while an epoch lasts
CLASS_RATIO = 10.0  # the default of SageMaker Debugger's rule ClassImbalance


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassCounts(Result):
    """Of the examples measured."""

    classes: int = measured("classes that the network can answer with")
    missing: tuple[int, ...] = measured("classes that do not occur")
    ratio: float = measured(
        "examples of the most frequent class over those of the rarest, with two standard errors more"
    )
    rarest: int = measured("the rarest class that occurs")
    counts: NDArray[numpy.int64] = measured("examples of each class", shape="(classes,)")

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        limit = self.setting("ratio")
        if self.missing:
            return self._found(
                Cause.CLASS_MISSING,
                f"{len(self.missing):,} of the {self.classes:,} classes that the network can answer with do not "
                f"occur among {int(self.counts.sum()):,} training examples: {named(self.missing, 5)}.",
                "Look at how the training set was made; a class that is not there cannot be learned.",
                float(len(self.missing)),
                0.0,
            )
        if self.ratio > limit:
            return self._found(
                Cause.CLASS_IMBALANCE,
                f"Classes differ in number, {format_number(self.ratio)}-fold or more: class {self.rarest} has "
                f"{int(self.counts[self.rarest]):,} of {int(self.counts.sum()):,} examples.",
                "Judge by the accuracy of each class; sample rare classes more often or weight the loss.",
                self.ratio,
                limit,
            )
        return Verdict(
            Level.OK,
            f"All {self.classes:,} classes occur, the rarest {int(self.counts.min()):,} times.",
            source=SOURCE,
            confidence=Confidence.ARITHMETIC,
            value=self.ratio,
            threshold=limit,
            threshold_source=OUR_CHOICE,
        )

    def _found(self, cause: Cause, sentence: str, advice: str, value: float, limit: float) -> Verdict:
        return Verdict(
            Level.WARNING,
            sentence,
            advice=advice,
            source=SOURCE,
            confidence=Confidence.ARITHMETIC,
            refutation="Other examples of the training set have this class.",
            value=value,
            threshold=limit,
            threshold_source=OUR_CHOICE,
            cause=cause,
            explained_by=(Cause.CLASS_MISSING, Cause.CLASSES_SORTED, Cause.TARGETS_CAST, Cause.TARGETS_SHIFTED),
            step=1,
        )

    def plot(self, ax: Any = None) -> Any:
        """The number of examples of each class."""
        ax.bar(range(len(self.counts)), self.counts)
        ax.set(xlabel="class", ylabel="examples")


@instrument(
    source=SOURCE,
    title="Classes",
    kind=Kind.CHECK,
    why="A class that never occurs cannot be learned, and rare ones are ignored at little cost to the loss: "
    "the accuracy then hides that they are always missed.",
)
def class_counts(
    logits: Tensor, labels: Tensor, inputs: Any, loop: Any = None, *, ratio: Times = CLASS_RATIO
) -> ClassCounts:
    """Whether every class that the network can answer with occurs in training, and how unequal they are.

    logits (n, K), labels (n,) class numbers; inputs: to tell examples from tokens, of which some are rare by
    nature. Judged where there would be twenty examples a class if all were equal. A class that does not occur while
    the others are common (in a watched run after an epoch, or a hundred examples a class), or one that is `ratio`
    times rarer than the most frequent (with two standard errors more examples of it), is a warning. In a watched
    run the labels of all batches that were counted are taken where they are more (`loop`), and classes that the
    loss weights are taken to be evened out. Labels that come class by class are not judged: the first ones say
    nothing of the rest. Raises nothing of its own.
    """
    classes = logits.shape[1]
    counts, ordered = _counts(labels.cpu(), classes, loop), in_order(labels) or _may_be_sorted(labels, loop)
    present, total = counts[counts > 0], int(counts.sum())
    enough = total >= EXPECTED * classes
    one_each = isinstance(inputs, Tensor) and len(inputs) == len(labels)
    rarest = int(torch.where(counts > 0, counts, counts.max() + 1).argmin())
    return ClassCounts(
        classes=classes,
        missing=tuple((counts == 0).nonzero().flatten().tolist())
        if enough and int(present.min()) >= COMMON and _all_seen(total, classes, loop)
        else (),
        ratio=1.0 if _weighted(loop) else times_rarer(int(counts.max()), int(present.min())),
        rarest=rarest,
        counts=counts.numpy(),
        preconditions=(
            Precondition("one label an example", one_each, "an example has several labels, or none."),
            Precondition(
                "examples",
                enough,
                f"there are {total} examples of {classes} classes; expected {EXPECTED} a class or more.",
            ),
            Precondition("random order", not ordered, "the labels come one class after the other."),
        ),
    )


def _counts(labels: Tensor, classes: int, loop: Any) -> Tensor:
    """Examples of each class, in the batches of the loop where these were more."""
    counts = torch.bincount(labels, minlength=classes)
    seen = loop.batches.label_counts if loop is not None else {}
    if sum(seen.values()) <= len(labels) or min(seen) < 0 or max(seen) >= classes:
        return counts
    return torch.tensor([seen.get(k, 0) for k in range(classes)])


def _all_seen(total: int, classes: int, loop: Any) -> bool:
    """Whether a class that is not there yet, as a rare one may be, is not to come with the next batches."""
    return loop is None or bool(loop.batches.again) or loop.ended or total >= SURELY * classes


def _may_be_sorted(labels: Tensor, loop: Any) -> bool:
    """Labels of one class, from a loader that is not known to shuffle."""
    return loop is not None and len(labels.unique()) == 1 and loop.batches.shuffled is False


def _weighted(loop: Any) -> bool:
    """Whether the loss weights the classes."""
    return loop is not None and any(loss.weighted for loss in loop.losses)


def times_rarer(common: int, rare: int) -> float:
    """How many times rarer the one is, or more: there may be two standard errors more of it than were counted, of
    counts that are Poisson's (the root of a count has the error 1/2)."""
    return float(common / (rare**0.5 + 1) ** 2)
