"""Do the batches of training hold rows that are broken, far larger than the others, or all one?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diag.display import format_number
from diag.errors import counted, named
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import LoopCheck, LoopFinding, judged
from diag.registry import instrument
from diag.result import Level, Precondition
from diag.snapshot.loop.data import ContentFacts, OddRow
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.inputs import InputFacts

SOURCE = "arithmetic of the inputs of training"
SHARE_OF_ROWS = 0.05  # of the rows: where more are large, that is how the data is, unless
SHARE_OF_BATCHES = 0.25  # they fill a few batches
BATCHES_AT_LEAST = 2
CALLS_OF_ROWS, ROWS_MARKED = 3, 24  # training calls, and rows in them, at least
SHARE_THAT_DIFFERS = 0.3  # of the rows of a batch: below, most of it is repetition
PLACES_LOOKED_AT, FEWEST_THAT_DIFFER, PLACES_THAT_DIFFER = 96, 10, 0.5  # of a data set, and the share of them
ROWS_NAMED = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchRows(LoopCheck):
    """Rows that are not like the others, or no different from them at all."""


@instrument(
    source=SOURCE,
    title="Rows of the batches",
    kind="check",
    why="One row with NaN, infinity or a value a thousand times too large decides the step of its whole "
    "batch, and can spoil the weights for good.",
)
def batch_rows(loop: Loop) -> BatchRows:
    """Whether rows of the training batches hold NaN or infinity, are far larger than the others, or are all one.

    Looked at are floating inputs of the model, in the first batches and then some of all. A row is large where its
    largest entry is a hundred times that of the median row, and ten times that of any row nearer to it. Rows are
    named by their place in the data set where a DataLoader shows it, else by step and place in the batch. Whether
    all rows of a batch are one is asked of the first batches as a DataLoader gives them, before the loop changes
    them. Where large rows fill a few batches, the batches are told: something makes one row's values those of all.

    Rows that repeat within a batch are told of where at most three of ten differ and other batches have others;
    those that stand in a data set many times where, of a hundred places or so that were looked at, at most half
    have different rows, and these differ in some number from nearly all others, so that equal ones are copies.

    Raises nothing of its own.
    """
    c = loop.contents
    seen = Precondition("inputs", c.batches + c.raw + loop.inputs.looked > 0, "no batch of inputs was seen.")
    large = f"{c.large:,} {'is' if c.large == 1 else 'are'}" if c.large else "none is"
    fine = f"{counted(c.rows, 'row')} of {c.batches:,} batches: {large} a hundred times as large as is usual."
    return judged(BatchRows, loop.step, [*_findings(c), *_repeated(loop.inputs)], fine, preconditions=(seen,))


def _repeated(i: InputFacts) -> Iterator[LoopFinding]:
    if i.looked < CALLS_OF_ROWS or i.rows < ROWS_MARKED:
        return
    each, differ = i.rows / i.looked, i.distinct / i.looked
    if i.different == 1:
        what = (
            "The first of several inputs is the same for all examples"
            if i.others_differ
            else "All inputs are the same"
        )
        yield LoopFinding(
            Level.ALARM,
            Cause.INPUTS_CONSTANT,
            f"{what}: {i.rows:,} rows in the {i.looked} batches that were looked at do not differ.",
            "Look at what the data set returns for two different places, and at the tokenizer or the transform.",
            "Two inputs that differ.",
            step=1,
        )
    elif i.distinct <= SHARE_THAT_DIFFERS * i.rows and i.different >= 2 * differ:
        yield LoopFinding(
            Level.WARNING,
            Cause.ROWS_DUPLICATED,
            f"A batch holds the same rows several times: {_among(each, differ)}, while other batches hold others.",
            "Look at how batches are put together: a sampler that draws a place again and again, a repeat or an "
            "expand along the batch axis.",
            "Rows that are meant to be repeated in a batch.",
            step=1,
        )
    elif i.continuous and i.places >= PLACES_LOOKED_AT and i.of_places <= PLACES_THAT_DIFFER * i.places:
        yield from _copies(i)


def _among(rows: float, differ: float) -> str:
    """How many of a batch's rows are distinct.

    >>> _among(32, 1), _among(32, 2.5)
    ('all 32 rows of a batch are the same', 'of the 32 rows of a batch only 2.5 are different ones')
    """
    if differ == 1:
        return f"all {rows:.3g} rows of a batch are the same"
    return f"of the {rows:.3g} rows of a batch only {differ:.3g} are different ones"


def _copies(i: InputFacts) -> Iterator[LoopFinding]:
    if i.of_places >= FEWEST_THAT_DIFFER:
        yield LoopFinding(
            Level.WARNING,
            Cause.ROWS_DUPLICATED,
            f"The data set holds the same inputs many times: at {i.places:,} different places of it that were "
            f"looked at there are only {i.of_places:,} different rows, so that there is less to learn from than "
            "its length says.",
            "Look at how it was put together: a join that multiplies rows, files read or windows cut several "
            "times, a concat inside a loop. Remove copies before the data is split.",
            "Rows that are repeated on purpose, to make an epoch longer, or the same inputs measured again.",
            step=1,
        )


def _findings(c: ContentFacts) -> Iterator[LoopFinding]:
    if c.raw >= BATCHES_AT_LEAST and c.alike == c.raw:
        yield LoopFinding(
            Level.ALARM,
            Cause.INPUTS_CONSTANT,
            f"All rows of a batch are the same, in each of the first {c.raw:,} batches that the DataLoader gave.",
            "Look at what the data set returns for two different places.",
            "Two rows of one batch that differ.",
            step=1,
        )
    broken = [row for row in c.odd if not abs(row.size) < float("inf")]
    large = [row for row in c.odd if abs(row.size) < float("inf")]
    if broken:
        yield LoopFinding(
            Level.ALARM,
            Cause.DATA_NOT_FINITE,
            f"Inputs hold NaN or infinity: {_named(broken)}.",
            "Find these rows and leave them out or fill them in; one of them is enough to break every weight.",
            "Rows that are finite as the data set has them: then something between it and the model breaks them.",
            step=1,
        )
    if large and c.large <= SHARE_OF_ROWS * c.rows:
        most = max(row.size for row in large)
        yield LoopFinding(
            Level.WARNING,
            Cause.BATCHES_POISONED,
            f"A few inputs are a hundred times as large as is usual or more, up to {format_number(most)} times: "
            f"{_named(large)}.",
            "Look at these rows: a wrong unit, a failed conversion, a placeholder such as 9999.",
            "Values that belong there.",
            step=1,
        )
    elif large and 0 < c.whole <= SHARE_OF_BATCHES * c.batches:
        yield _whole_batches(c)


def _whole_batches(c: ContentFacts) -> LoopFinding:
    return LoopFinding(
        Level.WARNING,
        Cause.BATCHES_POISONED,
        f"In {c.whole:,} of {c.batches:,} batches most inputs are a hundred times as large as in the others or "
        f"more (first at step {c.odd[0].step:,}).",
        "Look at the rows of these batches as the data set has them: where one is far too large, a normalisation "
        "or a fill that is computed over the batch gives its values to all.",
        "Batches that are meant to be of another scale.",
        step=1,
    )


def _named(rows: list[OddRow]) -> str:
    """Rows by their places in the data set, else by step and place in the batch."""
    if all(row.index >= 0 for row in rows):
        places = named([f"{row.index:,}" for row in rows], ROWS_NAMED)
        return f"row{'s' if len(rows) > 1 else ''} {places} of the data set (first at step {rows[0].step:,})"
    return named([f"row {row.row:,} of the batch at step {row.step:,}" for row in rows], ROWS_NAMED)
