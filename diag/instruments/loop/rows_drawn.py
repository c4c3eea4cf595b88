"""Does an epoch draw all rows of the data set, or a few again and again?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diag.instruments.causes import Cause
from diag.instruments.loop.findings import SOURCE, LoopCheck, LoopFinding, judged
from diag.registry import instrument
from diag.result import Level, Precondition
from diag.snapshot.loop.data import DrawFacts
from diag.snapshot.loop.facts import Loop

FEWEST_DRAWS = 100  # draws
DRAWS_OF_A_ROW = 3.0  # draws of a row on average
SHARE_DRAWN = 0.5  # of the rows
NEW = 0.02


@dataclass(frozen=True, kw_only=True, eq=False)
class RowsDrawn(LoopCheck):
    """Rows that are drawn again and again while others never are."""


@instrument(
    source=SOURCE,
    title="Rows drawn",
    kind="check",
    why="Rows that are never drawn teach nothing, and those drawn again and again are learned by heart.",
)
def rows_drawn(loop: Loop) -> RowsDrawn:
    """Whether the epochs of a DataLoader draw many different rows, where its data set shows its length.

    Judged is the epoch with the most draws. It draws from too few rows where each that came was drawn three times
    and more on average, less than half of the rows came at all, of the data set that the loader's is a part of, and
    hardly any draw was of a row that came once: the share of these estimates how likely the next draw is a new row
    (Good and Turing), so that a sampler which prefers some rows is not taken for one that leaves others out.

    Raises nothing of its own.
    """
    d = loop.drawn
    seen = Precondition(
        "draws", d.draws >= FEWEST_DRAWS and d.rows > 0, "no DataLoader was seen to draw many rows."
    )
    fine = f"{d.draws:,} draws of an epoch were of {d.distinct:,} different rows."
    return judged(RowsDrawn, loop.step, list(_findings(d)), fine, preconditions=(seen,))


def _findings(d: DrawFacts) -> Iterator[LoopFinding]:
    few = d.draws >= max(FEWEST_DRAWS, DRAWS_OF_A_ROW * d.distinct) and d.distinct < SHARE_DRAWN * d.rows
    if few and d.once <= NEW * d.draws:
        yield LoopFinding(
            Level.WARNING,
            Cause.ROWS_DUPLICATED,
            f"An epoch draws the same rows again and again: {d.draws:,} draws were of {d.distinct:,} different "
            f"rows, each {d.draws / d.distinct:.1f} times on average, of a data set of {d.rows:,}.",
            "Look at the sampler's range and length, and at the Subset that the loader reads.",
            "A sampler that is meant to draw from these rows alone.",
        )
