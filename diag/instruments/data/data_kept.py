"""Does the stored data stay as it is while it is trained on?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from diag.display import format_number
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import LoopCheck, LoopFinding, judged
from diag.registry import instrument
from diag.result import Level, Precondition
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.inputs import StoredFacts

SOURCE = "arithmetic of the inputs of training"
SLICES_AT_LEAST, ROWS_MET_AGAIN = 16, 20
ALMOST_ALL = 0.9
EPOCHS_IN_WHICH = 2  # of changes; a cache is filled once


@dataclass(frozen=True, kw_only=True, eq=False)
class DataKept(LoopCheck):
    """Stored data that training writes into."""

    cites: ClassVar[str] = SOURCE


@instrument(
    source=SOURCE,
    title="Stored data",
    kind="check",
    why="Noise or an augmentation that is written into the stored examples adds up over epochs, until nothing of "
    "them is left.",
)
def data_kept(loop: Loop) -> DataKept:
    """Whether the data that batches are taken from stays as it was.

    Looked at are some rows of a tensor that the model's inputs are slices of, where later batches hold them again,
    and some rows of the tensors and arrays of a DataLoader's data set at the beginning of each of its epochs. A
    warning where slices are written into from call to call and nearly all rows met again have other numbers, and
    where a data set's rows have changed before two epochs or more and are still like what they were: data that is
    made again each epoch is not. Raises nothing of its own.
    """
    s = loop.stored
    known = Precondition("data", s.slices + s.epochs > 0, "no data was seen twice where it is stored.")
    return judged(DataKept, loop.step, list(_findings(s)), _fine(s), preconditions=(known,))


def _fine(s: StoredFacts) -> str:
    if not (s.written or s.rows_changed or s.epochs_changed):
        return "Stored data has not changed where it was seen again."
    return (
        f"Stored data was changed between {s.written:,} of {s.slices:,} calls ({s.rows_changed:,} of "
        f"{s.rows_again:,} rows that were met again) and before {s.epochs_changed:,} of {s.epochs:,} epochs: too "
        "little to say that training writes into it."
    )


def _findings(s: StoredFacts) -> Iterator[LoopFinding]:
    written = s.slices >= SLICES_AT_LEAST and s.written >= ALMOST_ALL * s.slices
    if written and s.rows_again >= ROWS_MET_AGAIN and s.rows_changed >= ALMOST_ALL * s.rows_again:
        yield _overwritten(
            "Training writes into its own data: batches are slices of one stored tensor, which was changed in "
            f"place between {s.written:,} of {s.slices:,} calls, and of {s.rows_again:,} rows that were met again "
            f"{s.rows_changed:,} had other numbers."
        )
    elif s.epochs_changed >= EPOCHS_IN_WHICH:
        yield _overwritten(
            f"Training writes into its own data: before {s.epochs_changed:,} of {s.epochs:,} epochs the rows that "
            "the data set stores had been changed in place (standard deviation "
            f"{format_number(s.spread_before)} at first, {format_number(s.spread)} now)."
        )


def _overwritten(sentence: str) -> LoopFinding:
    return LoopFinding(
        Level.WARNING,
        Cause.DATA_OVERWRITTEN,
        sentence,
        "Augment a copy: x = x + noise instead of x += noise, x.add_() or x[...] = ...; clone() slices first.",
        "Data that is meant to change, as a store of new experience.",
        step=1,
    )
