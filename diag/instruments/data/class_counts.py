"""Classes: whether every class that the network can answer with occurs, and how unequal they are in number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from diag.display import format_number
from diag.instruments.causes import Cause
from diag.registry import Kind, instrument
from diag.result import OUR_CHOICE, Confidence, Level, Precondition, Result, Verdict, measured

SOURCE = "arithmetic of the labels"
COMMON = 5  # examples of each class that does occur
EXPECTED = 20  # examples a class, were they equal, from which on an absent one is no accident
RATIO = 20.0


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassCounts(Result):
    """Of the examples measured."""

    classes: int = measured("classes that the network can answer with")
    missing: tuple[int, ...] = measured("classes that do not occur")
    ratio: float = measured("examples of the commonest class over those of the rarest that occurs")
    rarest: int = measured("the rarest class that occurs")
    counts: NDArray[numpy.int64] = measured("examples of each class", shape="(classes,)")

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return Verdict(Level.NOT_APPLICABLE, f"No verdict: {unmet.detail}", source=SOURCE)
        limit = self.setting("ratio")
        if self.missing:
            shown = ", ".join(map(str, self.missing[:5])) + (", ..." if len(self.missing) > 5 else "")
            return self._found(
                Cause.CLASS_MISSING,
                f"{len(self.missing)} of the {self.classes} classes that the network can answer with do not occur "
                f"among {int(self.counts.sum()):,} training examples: {shown}.",
                "Look at how the training set was made; a class that is not there cannot be learned.",
                float(len(self.missing)),
                0.0,
            )
        if self.ratio > limit:
            return self._found(
                Cause.CLASS_IMBALANCE,
                f"Classes differ {format_number(self.ratio)}-fold in number: class {self.rarest} has "
                f"{int(self.counts[self.rarest])} of {int(self.counts.sum()):,} examples.",
                "Judge by the accuracy of each class; sample rare classes more often or weight the loss.",
                self.ratio,
                limit,
            )
        return Verdict(
            Level.OK,
            f"All {self.classes} classes occur, the rarest {int(self.counts.min())} times.",
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
            explained_by=(Cause.CLASSES_SORTED, Cause.TARGETS_CAST, Cause.TARGETS_SHIFTED),
            step=1,
        )

    def plot(self, ax: Any) -> None:
        """The number of examples of each class."""
        ax.bar(range(len(self.counts)), self.counts)
        ax.set(xlabel="class", ylabel="examples")


@instrument(source=SOURCE, title="Classes", kind=Kind.CHECK)
def class_counts(logits: Tensor, labels: Tensor, inputs: Any, *, ratio: float = RATIO) -> ClassCounts:
    """Whether every class that the network can answer with occurs in training, and how unequal they are.

    logits (n, K), labels (n,) class numbers; inputs: to tell examples from tokens, of which some are rare by
    nature. Judged where there would be twenty examples a class if all were equal. A class that does not occur while
    the others are common, or one that is `ratio` times rarer than the commonest, is a warning.
    Raises nothing of its own.
    """
    classes = logits.shape[1]
    counts = torch.bincount(labels.cpu(), minlength=classes)
    present, enough = counts[counts > 0], len(labels) >= EXPECTED * classes
    one_each = isinstance(inputs, Tensor) and len(inputs) == len(labels)
    rarest = int(torch.where(counts > 0, counts, counts.max() + 1).argmin())
    return ClassCounts(
        classes=classes,
        missing=tuple((counts == 0).nonzero().flatten().tolist())
        if enough and int(present.min()) >= COMMON
        else (),
        ratio=float(counts.max() / present.min()),
        rarest=rarest,
        counts=counts.numpy(),
        preconditions=(
            Precondition("one label an example", one_each, "an example has several labels, or none."),
            Precondition(
                "examples",
                enough,
                f"there are {len(labels)} examples of {classes} classes; {EXPECTED} a class would tell.",
            ),
        ),
    )
