"""Does every class that the network can answer with occur among the labels of training's own batches?

The same question as `class_counts` asks of the probe set, where there is none that the model can be called on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from diag.errors import named
from diag.instruments.causes import Cause
from diag.instruments.data.class_counts import COMMON, EXPECTED
from diag.instruments.loop.findings import LoopCheck, LoopFinding, judged
from diag.registry import instrument
from diag.result import Level, Precondition
from diag.snapshot.loop.asked import AskedFacts
from diag.snapshot.loop.data import OF_LOG_PROBABILITIES
from diag.snapshot.loop.facts import Loop

SOURCE = "arithmetic of the labels"
CALLS_COUNTED, FEW_CLASSES = 10, 32
MIXED = 0.7  # of the classes that a batch drawn at random would hold


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassesAsked(LoopCheck):
    """Classes that the network can answer with and that are never asked for."""

    cites: ClassVar[str] = SOURCE


@instrument(
    source=SOURCE,
    title="Classes asked for",
    kind="check",
    why="A class that never occurs cannot be learned; where it is the first, labels are often counted from one.",
)
def classes_asked(loop: Loop) -> ClassesAsked:
    """Whether every class that the network can answer with occurs among the labels of training's batches.

    Counted are the labels of the calls of a softmax loss that were looked at, where they are one an example. Judged
    where there would be twenty of each class if all were equal, batches mix the classes, and at least half of them
    occur, each of these five times; and where every step uses the same labels, so that these are all there are,
    twenty for each of at most 32 classes. A class that does not occur is a warning. Raises nothing of its own.
    """
    judgeable = [a for a in loop.asked if (_is_judged(a) and _mixed(loop, a)) or _is_all(loop, a)]
    known = Precondition(
        "labels", bool(judgeable), "there are not enough labels of examples, or their order matters."
    )
    findings = [f for a in judgeable for f in _findings(a)]
    fine = "All classes that the network can answer with occur."
    return judged(ClassesAsked, loop.step, findings, fine, preconditions=(known,))


def _is_judged(a: AskedFacts) -> bool:
    of_examples = a.function in OF_LOG_PROBABILITIES and a.reduction == "mean" and not a.of_sequences
    known = of_examples and len(a.counts) > 1 and min(a.counts) >= 0 and max(a.counts) < a.outputs_a_row
    enough = known and a.looked >= CALLS_COUNTED and sum(a.counts.values()) >= EXPECTED * a.outputs_a_row
    return enough and 2 * len(a.counts) >= a.outputs_a_row and min(a.counts.values()) >= COMMON


def _is_all(loop: Loop, a: AskedFacts) -> bool:
    """Whether every label of training was seen, many for each of a few classes."""
    of_examples = a.function in OF_LOG_PROBABILITIES and not a.of_sequences and len(loop.asked) == 1
    known = of_examples and bool(a.counts) and min(a.counts) >= 0 and max(a.counts) < a.outputs_a_row
    enough = known and a.targets >= EXPECTED * a.outputs_a_row * a.looked and a.outputs_a_row <= FEW_CLASSES
    return enough and a.looked >= CALLS_COUNTED and loop.full_batch


def _mixed(loop: Loop, a: AskedFacts) -> bool:
    """Whether batches hold about as many classes as they would at random: sorted labels say nothing of the rest."""
    total, size = sum(a.counts.values()), loop.batches.batch_size
    at_random = sum(1 - (1 - n / total) ** size for n in a.counts.values())
    return size > 1 and loop.batches.distinct >= MIXED * at_random


def _findings(a: AskedFacts) -> Iterator[LoopFinding]:
    missing = [k for k in range(a.outputs_a_row) if k not in a.counts]
    if not missing:
        return
    from_one = missing == [0] and a.outputs_a_row > 2
    yield LoopFinding(
        Level.WARNING,
        Cause.CLASS_MISSING,
        f"{len(missing):,} of the {a.outputs_a_row:,} classes that the network can answer with "
        f"{'does' if len(missing) == 1 else 'do'} not occur among {sum(a.counts.values()):,} labels of training: "
        f"{named(missing, 5)}"
        + (f"; they run from 1 to {max(a.counts)}, as if counted from one." if from_one else "."),
        "Count classes from zero, with as many outputs as there are classes."
        if from_one
        else "Look at how the training set was made; a class that is not there cannot be learned.",
        "Other batches have this class.",
        step=1,
        explained_by=(Cause.CLASSES_SORTED, Cause.TARGETS_CAST, Cause.TARGETS_SHIFTED),
    )
