"""Do rows keep their labels, or have whole batches of them others for a while?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diag.errors import counted, named
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import LoopCheck, LoopFinding, judged
from diag.registry import instrument
from diag.result import Level, Precondition
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.rows import Moved, RowFacts

SOURCE = "arithmetic of the labels of training"
ENOUGH = 64  # sights of rows that were met before
FEWEST_MOVED = 16  # rows with another label
MOVED_AT_MOST = 0.2  # of the sights: where more labels are others, that is how the training is
ELSEWHERE = 0.01


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelsKept(LoopCheck):
    """Stretches of steps at which nearly all rows had another label than at their first sight."""


@instrument(
    source=SOURCE,
    title="Labels stay with their rows",
    kind="check",
    why="Batches with other labels than before teach the opposite of what was learned: data and labels have "
    "come apart on the way.",
)
def labels_kept(loop: Loop) -> LabelsKept:
    """Whether there are batches in which nearly all rows have another label than they had before.

    Rows are known by their place in a DataLoader's data set, else by their inputs. A batch counts where two fifths
    of its rows and more, of those that were met before, have another label than at their first sight; it is a
    finding where that is so at some steps only (a fifth of all sights at most), and at the other steps hardly any
    label changes, as it does where labels are drawn or computed again on purpose.

    Raises nothing of its own.
    """
    r = loop.rows
    seen = (
        Precondition("rows", not r.reason, f"{r.reason}."),
        Precondition("sights", r.compared >= ENOUGH, "few rows were met a second time."),
    )
    fine = f"{counted(r.changed, 'row')} had another label at {r.compared:,} later sights."
    return judged(LabelsKept, loop.step, list(_findings(r)), fine, preconditions=seen)


def _findings(r: RowFacts) -> Iterator[LoopFinding]:
    rows = sum(m.rows for m in r.moved)
    some = FEWEST_MOVED <= rows <= MOVED_AT_MOST * r.compared
    if not some or r.changed - rows > ELSEWHERE * r.compared:
        return
    batches = named([_steps(m) for m in r.moved])
    yield LoopFinding(
        Level.WARNING,
        Cause.BATCHES_POISONED,
        f"At {batches} nearly all rows of a batch had another label than at their first sight ({rows:,} rows); "
        "elsewhere rows keep their labels.",
        "Look at what makes the labels of these batches: a shifted join, a corrupt shard, an order that was "
        "changed for inputs and labels apart.",
        "Labels that are meant to change at these steps.",
        step=r.moved[0].first,
    )


def _steps(m: Moved) -> str:
    return f"step {m.first:,}" if m.first == m.last else f"steps {m.first:,} to {m.last:,}"
