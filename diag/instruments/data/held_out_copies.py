"""Held-out rows that are copies of training rows: the same numbers, in another data set.

Two rows of continuous data are hardly ever equal by chance, and how often they are is told by the training rows
among themselves: rows drawn from the same source are equal to a training row no more often than these to one
another.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from diag.display import format_number, format_share
from diag.instruments.causes import Cause
from diag.ranges import Times
from diag.registry import Kind, instrument
from diag.result import OUR_CHOICE, Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.batch import tensors_in

SOURCE = "arithmetic of the inputs"
ROWS_FOR_COPIES = 32
COPIES_ENOUGH = 8
# With no equal pair among the training rows, their chance may still be that of three in all pairs (95 % of the
# times); four times what this gives is no chance.
UNSEEN, TIMES_EXPECTED = 3, 4.0


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOutCopies(Result):
    """Of the training rows that were kept, and the held-out rows that were."""

    copies: int = measured("held-out rows that are among the training rows")
    held_out: int = measured("held-out rows")
    training: int = measured("training rows")
    expected: float = measured("copies that there may be by chance, by the equal pairs among the training rows")

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        limit = max(COPIES_ENOUGH, self.setting("times") * self.expected)
        if self.copies < limit:
            return Verdict(
                Level.OK,
                f"{self.copies:,} of {self.held_out:,} held-out rows are among {self.training:,} training "
                f"rows{', which may be chance' if self.copies else ''}.",
                source=SOURCE,
                confidence=Confidence.ARITHMETIC,
                value=float(self.copies),
                threshold=limit,
                threshold_source=OUR_CHOICE,
            )
        return Verdict(
            Level.WARNING,
            f"Held-out rows are trained on: {self.copies:,} of {self.held_out:,} "
            f"({format_share(self.copies / self.held_out)}) are the same, number for number, as one of "
            f"{self.training:,} training rows; by chance it would be {format_number(self.expected)} at most.",
            advice="Remove duplicates before the data is split, and split it once; what was measured on these rows "
            "says nothing of new ones.",
            source=SOURCE,
            confidence=Confidence.ARITHMETIC,
            refutation="An evaluation that is meant to measure the training loss.",
            value=float(self.copies),
            threshold=limit,
            threshold_source=OUR_CHOICE,
            cause=Cause.HELD_OUT_IN_TRAINING,
            explained_by=(Cause.HELD_OUT_IN_TRAINING,),  # places in one data set say more than equal numbers
            step=1,
        )

    def plot(self, ax: Any = None) -> Any:
        """The copies beside what chance may give."""
        ax.bar(["copies", "by chance"], [self.copies, self.expected])
        ax.set(xlabel="held-out rows among the training rows", ylabel="rows")


@instrument(
    source=SOURCE,
    title="Copies held out",
    kind=Kind.CHECK,
    why="Rows that were learned by heart are answered right whatever was understood, so the held-out score is too "
    "good and falls on new data.",
)
def held_out_copies(
    inputs: Any, held_out_inputs: Any, loop: Any = None, *, times: Times = TIMES_EXPECTED
) -> HeldOutCopies:
    """How many held-out rows are copies of training rows.

    inputs, held_out_inputs: what the model is given, tensors (n, ...) and (m, ...), or several of them. A row is
    told by all of its numbers. As many copies as `times` the number that may be there by chance (8 at least) are a
    warning. Chance is bounded by the equal pairs among the training rows. An evaluation of as many rows as training
    has is one of the training data, and is not judged (`loop`). Raises nothing of its own.
    """
    ours, theirs = _rows(inputs), _rows(held_out_inputs)
    seen = Counter(ours)
    pairs = max(len(ours) * (len(ours) - 1) / 2, 1)
    equal = sum(n * (n - 1) / 2 for n in seen.values())
    return HeldOutCopies(
        copies=sum(row in seen for row in theirs),
        held_out=len(theirs),
        training=len(ours),
        expected=(equal + UNSEEN) / pairs * len(ours) * len(theirs),
        preconditions=(
            Precondition(
                "rows",
                min(len(ours), len(theirs)) >= ROWS_FOR_COPIES,
                f"there are fewer than {ROWS_FOR_COPIES} rows of numbers on a side.",
            ),
            Precondition("other rows", not _of_training(loop), "as many rows are evaluated as training has."),
        ),
    )


def _rows(inputs: Any) -> list[bytes]:
    """A digest of each row's numbers as float64, of all tensors that have as many rows as the first. Only digests
    are kept: in float64 the rows of images take up to eight times their bytes."""
    parts = [t.detach() for t in tensors_in(inputs) if t.ndim and t.layout is torch.strided]
    parts = [(t.flatten(1) if t.ndim > 1 else t[:, None]).cpu() for t in parts if len(t) == len(parts[0])]
    if not parts or any(t.is_complex() for t in parts):
        return []
    rows = (torch.cat([t[i].double() for t in parts]).numpy() for i in range(len(parts[0])))
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]


def _of_training(loop: Any) -> bool:
    """Whether an evaluation drew as many rows as training did in an epoch: that is taken to be the training data,
    made into another data set."""
    return loop is not None and any(0 < loop.drawn.distinct <= e.rows for e in loop.drawn.evaluated)
