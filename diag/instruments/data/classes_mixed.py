"""Do the batches hold the classes as they come in the data, or one after the other?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diag.instruments.causes import Cause
from diag.instruments.loop.findings import LoopCheck, LoopFinding, judged
from diag.registry import instrument
from diag.result import Level, Precondition
from diag.snapshot.loop.data import BatchFacts
from diag.snapshot.loop.facts import Loop

SOURCE = "arithmetic of the labels in batches"
BATCHES_COUNTED, LABELS_OF_A_BATCH = 6, 8  # counted; and labels in each
HALF_OF_EXPECTED = 0.5


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassesMixed(LoopCheck):
    """Batches with far fewer classes than rows drawn at random would have."""


@instrument(
    source=SOURCE,
    title="Classes in the batches",
    kind="check",
    why="Where a batch holds one class only, each step teaches the network to answer that class and undoes "
    "what it learned of the others.",
)
def classes_mixed(loop: Loop) -> ClassesMixed:
    """Whether the batches of training mix the classes.

    With n labels a batch and class shares p, as all counted batches have them together, rows drawn at random give
    sum(1 - (1 - p)^n) classes a batch. Batches that hold half of that or less, and share classes with the batch
    before as a sorted data set's do, are in order.

    Raises nothing of its own.
    """
    b = loop.batches
    enough = b.counted >= BATCHES_COUNTED and b.batch_size >= LABELS_OF_A_BATCH and len(b.label_counts) > 1
    known = Precondition(
        "labels", enough, f"fewer than {BATCHES_COUNTED} batches of class numbers were seen, or one class."
    )
    fine = f"{b.distinct:.3g} classes a batch; rows drawn at random would have {expected(b):.3g}."
    return judged(
        ClassesMixed,
        loop.step,
        list(_findings(b)) if enough and not _repeats(loop) else [],
        fine,
        preconditions=(known,),
    )


def _repeats(loop: Loop) -> bool:
    """Whether most rows of a batch are repetitions, which says why it holds few classes."""
    return loop.inputs.distinct < HALF_OF_EXPECTED * loop.inputs.rows


def expected(b: BatchFacts) -> float:
    """Classes in a batch of rows that are drawn at random from all that were counted."""
    total = sum(b.label_counts.values())
    return sum(1 - (1 - count / total) ** b.batch_size for count in b.label_counts.values()) if total else 0.0


def _findings(b: BatchFacts) -> Iterator[LoopFinding]:
    at_random = expected(b)
    if b.distinct <= HALF_OF_EXPECTED * at_random and b.continued >= HALF_OF_EXPECTED:
        yield LoopFinding(
            Level.ALARM,
            Cause.CLASSES_SORTED,
            f"The classes come one after the other: {b.distinct:.2g} classes a batch, where rows of these classes "
            f"in random order would have {at_random:.2g}, and each batch continues with the classes of the one "
            f"before.",
            "Shuffle the data: DataLoader(..., shuffle=True).",
            "Batches that hold all classes.",
            step=1,
        )
