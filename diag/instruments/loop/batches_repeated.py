"""Does training see new batches, and each epoch another order?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diag.instruments.causes import Cause
from diag.instruments.loop.findings import SOURCE, THRICE, LoopCheck, LoopFinding, judged
from diag.registry import instrument
from diag.result import Level, Precondition
from diag.snapshot.loop.data import BatchFacts
from diag.snapshot.loop.facts import Loop

CHANCE = 10_000  # epochs in which a shuffle of whole batches would once give the same order
NEIGHBOURS_COMPARED = 6  # of neighbouring batches that are compared at least
OUT_OF_ORDER = 0.25  # of the batches that come again out of order, from which on the order says nothing
EPOCH = 4  # batches and steps at least: fewer may come in the same order by chance, or on purpose
CALLS_OF_A_STEP = 12  # calls on one batch that one step may make: a closure, an ascent before the step


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchesRepeated(LoopCheck):
    """Batches that come again as they were."""


@instrument(
    source=SOURCE,
    title="Batches",
    kind="check",
    why="A network that sees the same batch at every step, or the same order in every epoch, learns that "
    "batch or that order rather than the data.",
)
def batches_repeated(loop: Loop) -> BatchesRepeated:
    """Whether the batches of training differ from step to step and from epoch to epoch.

    Each training call's inputs are told apart by some of their numbers, in order. The same batch at every step
    is full-batch training unless a DataLoader gives others meanwhile. The same batches in the same order in every
    epoch mean that nothing shuffles, unless one step uses them all. Where several workers of a DataLoader read one
    stream (IterableDataset) and batches come as often in a row as there are workers, each of them reads the whole
    stream.

    Raises nothing of its own.
    """
    b = loop.batches
    enough = Precondition("several batches", b.calls >= THRICE, "fewer than three batches were seen.")
    fine = f"{b.calls:,} batches were seen, and no order came again."
    if b.repeats and b.lag > 1:
        fine = (
            f"{b.calls:,} batches were seen; that the last {b.repeats:,} of those that were compared came again, "
            f"{b.lag:,} batches later, is not judged."
        )
    elif b.lag == 1:
        fine = f"The same batch is used at every step, as in full-batch training, for {b.repeats:,} steps."
    findings = [*_empty(b), *_read_by_each(b), *_findings(loop)]
    about = {} if findings else {"preconditions": (enough,)}
    return judged(BatchesRepeated, loop.step, findings, fine, **about)


def _empty(b: BatchFacts) -> Iterator[LoopFinding]:
    if b.empty:
        yield LoopFinding(
            Level.ALARM,
            Cause.LOADER_EMPTY,
            f"A DataLoader gives no batch: its data set has {b.empty_rows:,} rows, fewer than the "
            f"{b.empty_size:,} of a batch, and the last batch is dropped where it is not full.",
            "Use a smaller batch_size, or drop_last=False.",
            "len(loader) above zero.",
        )


def _read_by_each(b: BatchFacts) -> Iterator[LoopFinding]:
    """Of batches that come n times in a row, (n - 1) of n neighbours are equal; an epoch's end may cut a row
    short."""
    expected = b.pairs * (b.readers - 1) / max(b.readers, 1)
    if b.readers > 1 and b.pairs >= NEIGHBOURS_COMPARED and abs(b.equal_pairs - expected) <= 1 + b.pairs // 10:
        yield LoopFinding(
            Level.ALARM,
            Cause.ROWS_DUPLICATED,
            f"Each batch comes {b.readers:,} times: the DataLoader has {b.readers:,} workers, and each of them "
            f"reads the whole stream of its IterableDataset ({b.equal_pairs:,} of {b.pairs:,} batches were the one "
            "before).",
            "Give each worker its part in __iter__: with torch.utils.data.get_worker_info(), rows[info.id :: "
            "info.num_workers].",
            "A stream that is meant to give each batch several times.",
            step=1,
        )


def _findings(loop: Loop) -> Iterator[LoopFinding]:
    b = loop.batches
    alike = loop.contents.raw > 0 and loop.contents.alike == loop.contents.raw
    alike |= loop.inputs.looked > 0 and loop.inputs.different == 1
    # One batch that is taken out once and learned by heart may be meant; a loader that goes on is meant to be read.
    read = b.fetched >= THRICE - 1 or (b.loaders >= THRICE and b.repeats >= CALLS_OF_A_STEP)
    if not alike and b.lag == 1 and b.repeats >= THRICE - 1 and read and b.loader_batches > 1:
        yield LoopFinding(
            Level.ALARM,
            Cause.BATCH_REPEATED,
            f"The model is trained on the same batch at every one of the last {b.repeats + 1:,} steps, while the "
            f"DataLoader has {b.loader_batches:,}.",
            "Use the loop's own batch: next(iter(loader)) gives the first one each time it is written.",
            "Inputs of the model that differ between steps.",
            step=b.since,
        )
    epoch = f"every {b.lag:,} batches" if not b.loaders or b.lag != b.loader_batches else "in every epoch"
    apart = min(b.lag, b.steps_apart)  # what one step uses is all of it, in whatever order
    in_order = not alike and b.out_of_order < OUT_OF_ORDER
    if in_order and apart >= EPOCH and b.repeats >= (THRICE if b.by_rows else beyond_chance(b.lag)):
        yield LoopFinding(
            Level.WARNING,
            Cause.EPOCHS_NOT_RESHUFFLED,
            f"The batches come in the same order {epoch}: each of the last {b.repeats:,} that were compared was "
            f"the one of {b.lag:,} batches before.",
            "Shuffle: "
            f"{'DataLoader(..., shuffle=True)' if b.loaders else 'draw the rows in a new order each time'}, and "
            "set no seed inside the loop over epochs.",
            "Batches that hold other rows in the next epoch.",
            step=b.since,
        )


def beyond_chance(batches: int) -> int:
    """How many batches in a row must be those of the epoch before, of so many, that a shuffle of whole batches
    (another order of the same ones) would not give that in `CHANCE` epochs. Rows that are shuffled never do."""
    orders, number = 1.0, 0
    while orders < CHANCE:
        orders *= max(batches - number % batches, 1)
        number += 1
    return max(number, THRICE)
