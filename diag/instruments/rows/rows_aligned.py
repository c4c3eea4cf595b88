"""Do targets stand in the rows of their inputs? Moved by a row, exchanged in a part of the data, or shuffled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from diag.display import format_number
from diag.instruments.causes import Cause
from diag.instruments.data.labels_belong import WHAT_ELSE
from diag.instruments.loop.findings import LoopCheck, LoopFinding, judged
from diag.registry import instrument
from diag.result import Confidence, Level, Precondition
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.paired import PairedFacts

SOURCE = "Gretton et al. 2008, NIPS 20 (the criterion); Kazi-Aoual et al. 1995 (its moments over all orders)"
ROWS_ALIGNED = 48  # rows that are compared, at least
NO_DEPENDENCE, CLEAR_DEPENDENCE = 3.0, 8.0  # standard deviations over all orders
AGAINST_EACH_OTHER = -6.0
ROWS_OF_PARTS, ROWS_UNRELATED = 128, 340
ANOTHER_LOSS, NEARBY_NOTHING = 20.0, 4.0
UNLEARNED, LEARNED_SOON = 0.1, 0.3  # accuracy over the most frequent class, or squared correlation
FROM_STEP_ALIGNED, FROM_STEP_TABLE = 100, 200


@dataclass(frozen=True, kw_only=True, eq=False)
class RowsAligned(LoopCheck):
    """Targets that stand in other rows than their inputs."""

    cites: ClassVar[str] = SOURCE


@instrument(
    source=SOURCE,
    title="Rows of targets",
    kind="check",
    why="A target in another row than its input teaches nothing that holds: the loss falls only as far as rows can "
    "be learned by heart.",
)
def rows_aligned(loop: Loop) -> RowsAligned:
    """Whether the targets stand in the rows of their inputs, for each loss of one target a row.

    Rows of the batches that were looked at are scored by how alike the targets of like inputs are, in standard
    deviations of what random orders of the targets give (HSIC). An alarm where targets moved by up to three rows,
    or turned round, fit by 8 or more, in their batch or in the order of the data set, and as they stand by 3 at
    most. A warning where two parts of the data set contradict each other (6 below zero across, 8 above in each),
    as where two classes are exchanged in one; and, on inputs that are one tensor of numbers, where the targets of
    one of several losses show no dependence on them by step 100, nor has the network learned them, while another's
    do, or where those of the loop's own regression on a table show none, and the network has not soon learned them
    either.

    Raises nothing of its own.
    """
    facts = [p for p in loop.paired if p.rows >= ROWS_ALIGNED and p.own == p.own]
    seen = Precondition("rows", bool(facts), f"fewer than {ROWS_ALIGNED} rows with one target each were seen.")
    findings = [f for p in facts for f in _findings(p, facts, loop)]
    fine = "Targets depend on the inputs of their own rows, or in no order that was tried."
    return judged(RowsAligned, loop.step, findings, fine, preconditions=(seen,))


def _findings(p: PairedFacts, facts: list[PairedFacts], loop: Loop) -> Iterator[LoopFinding]:
    if p.own <= NO_DEPENDENCE and p.moved >= CLEAR_DEPENDENCE:
        where = "from the other end of the batch" if not p.by else f"{_rows(p.by)} in the batch"
        yield _moved(p, where, p.moved, p.own, p.rows, "the line that makes a batch of rows, or orders them")
    elif p.data_rows >= ROWS_ALIGNED and p.own_in_data <= NO_DEPENDENCE and p.in_data >= CLEAR_DEPENDENCE:
        where = f"{_rows(p.data_by)} in the data set"
        yield _moved(p, where, p.in_data, p.own_in_data, p.data_rows, "how the two files or arrays were joined")
    elif p.rows >= ROWS_OF_PARTS and p.across <= AGAINST_EACH_OTHER and p.within >= CLEAR_DEPENDENCE:
        yield _parts(p)
    elif p.own <= NO_DEPENDENCE and p.rows >= ROWS_UNRELATED and p.plain:
        yield from _unrelated(p, facts, loop)


def _rows(by: int) -> str:
    count = "one row" if abs(by) == 1 else f"{abs(by)} rows"
    return f"{count} {'further on' if by > 0 else 'before'}"


def _moved(p: PairedFacts, where: str, score: float, own: float, rows: int, look_at: str) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.TARGETS_MISPLACED,
        f"The targets stand in other rows than their inputs: inputs fit the target that stands {where}, and their "
        f"own not at all ({format_number(score)} and {format_number(own)} standard deviations beyond what random "
        f"orders of {rows:,} rows give).",
        f"Look at {look_at}: a roll, a line too many at the head of one file, one side that was sorted or filtered "
        "alone.",
        "Ten rows whose inputs and targets belong together as the loop sees them.",
        step=1,
        confidence=Confidence.STRONG_EMPIRICAL,
    )


def _parts(p: PairedFacts) -> LoopFinding:
    return LoopFinding(
        Level.WARNING,
        Cause.LABELS_WRONG,
        f"Two parts of the data set contradict each other: before and after row {p.split:,} like inputs have like "
        f"targets (by {format_number(p.within)} standard deviations or more), and across the two unlike ones (by "
        f"{format_number(-p.across)}), as where two classes are exchanged in one part.",
        "Compare the labels of the two parts on inputs that are alike: a source, file or annotator may code them "
        "the other way round.",
        "Inputs that are alike have like targets in both parts.",
        step=1,
        confidence=Confidence.STRONG_EMPIRICAL,
    )


def _unrelated(p: PairedFacts, facts: list[PairedFacts], loop: Loop) -> Iterator[LoopFinding]:
    others = [f for f in facts if f is not p and f.plain and f.kinds != p.kinds and f.own >= ANOTHER_LOSS]
    unlearned = loop.step >= FROM_STEP_ALIGNED and p.early <= UNLEARNED
    nothing = loop.step >= FROM_STEP_TABLE and p.early <= LEARNED_SOON and p.nearby <= NEARBY_NOTHING
    if others and unlearned:
        other = max(others, key=lambda f: f.own)
        yield _shuffled(
            f"The targets of one of several losses ({_name(p)}) do not seem to belong to their inputs: they show "
            f"no dependence on them over {p.rows:,} rows ({format_number(p.own)} standard deviations), those of "
            f"{_name(other)} do ({format_number(other.own)}), and in the first {FROM_STEP_ALIGNED} steps or so the "
            "network learned nothing of them.",
        )
    elif nothing and not p.function and len(facts) == 1 and p.table:
        yield _shuffled(
            f"The targets do not seem to belong to their inputs: over {p.rows:,} rows they show no dependence on "
            f"them ({format_number(p.own)} standard deviations beyond random orders, {format_number(p.nearby)} for "
            f"rows next to one another), and what the network says of them at step {loop.step:,} can be no more "
            "than these rows by heart.",
        )


def _name(p: PairedFacts) -> str:
    """The loss in words."""
    return (p.function or "the loop's own arithmetic") + (f", call {p.number}" if p.number > 1 else "")


def _shuffled(sentence: str) -> LoopFinding:
    return LoopFinding(
        Level.WARNING,
        Cause.LABELS_SHUFFLED,
        sentence,
        "Look at ten rows with these targets as the loop sees them: one of the two may have been shuffled, sorted "
        "or drawn again without the other.",
        "A linear model or nearest neighbours say something of these targets on other rows.",
        step=1,
        explained_by=WHAT_ELSE,
        confidence=Confidence.WEAK_EMPIRICAL,
    )
