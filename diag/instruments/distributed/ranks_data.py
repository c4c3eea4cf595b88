"""Does each rank train on rows of its own, and on as many as the others?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy

from diag.errors import counted, named
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import SOURCE, LoopCheck, LoopFinding, judged
from diag.registry import instrument
from diag.result import Level, Precondition
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.ranks import RankFacts, SameRows

STEPS_COMPARED = 3  # steps that must be compared before anything is said
UNEVEN = 1.1  # ratio of the examples of two ranks, at every look
NOT_KNOWN = Precondition(
    "the batches of several ranks", False, "one process trains or is watched, or too few batches were compared."
)
BY_DESIGN = Precondition(
    "ranks with data of their own", False, "the ranks share the work on each batch (tensor parallelism)."
)


@dataclass(frozen=True, kw_only=True, eq=False)
class RanksData(LoopCheck):
    """Whether ranks read the same rows, or unequal numbers of them."""


@instrument(
    source=SOURCE,
    title="Data of the ranks",
    kind="check",
    why="Ranks that read the same rows do the same work several times: the training costs more and learns "
    "no more than on one.",
)
def ranks_data(loop: Loop) -> RanksData:
    """Whether the ranks of a data-parallel training read different rows, and equally many.

    After steps 1, 2, 3, 10, 30, 100, ... checksums of the inputs and of the targets of that step are compared.
    Ranks are said to read the same rows where both were equal, bit for bit, at every look. Numbers of examples are
    uneven where one rank had at least a tenth more than another at every look: the ranks' gradients count alike,
    so that each of its examples counts less.

    Raises nothing of its own.
    """
    ranks = loop.ranks
    if not ranks.together or len(ranks.looks) < STEPS_COMPARED:
        return judged(RanksData, loop.step, [], "", preconditions=(NOT_KNOWN,))
    if not ranks.data_apart:
        return judged(RanksData, loop.step, [], "", preconditions=(BY_DESIGN,))
    fine = f"The {ranks.world} ranks read different rows at {counted(len(ranks.looks), 'step')} compared."
    return judged(RanksData, loop.step, _findings(ranks), fine)


def _findings(ranks: RankFacts) -> Iterator[LoopFinding]:
    same = [s for s in ranks.rows if s.looks >= STEPS_COMPARED]
    if same:
        yield _same(max(same, key=lambda s: len(s.ranks)), ranks)
    if uneven := _uneven(ranks):
        yield uneven


def _same(found: SameRows, ranks: RankFacts) -> LoopFinding:
    everyone = len(found.ranks) == ranks.world
    who = f"All {ranks.world} ranks" if everyone else f"Ranks {named([str(r) for r in found.ranks])}"
    return LoopFinding(
        Level.ALARM,
        Cause.RANKS_SEE_SAME_DATA,
        f"{who} train on the same batches: inputs and targets were equal, bit for bit, at each of "
        f"{counted(found.looks, 'step')} compared, so that {len(found.ranks)} ranks do the work of one.",
        "Give the DataLoader a DistributedSampler (and call its set_epoch), or split a stream by rank.",
        "Inputs or targets that differ between ranks at a step.",
        step=ranks.looks[0],
    )


def _uneven(ranks: RankFacts) -> LoopFinding | None:
    counts = numpy.array(ranks.examples, float)
    if len(counts) < STEPS_COMPARED or not (counts > 0).all():
        return None
    ratios = counts[:, :, None] / counts[:, None, :]
    least = ratios.min(0)  # of each pair, over the looks
    more, less = (int(i) for i in numpy.unravel_index(least.argmax(), least.shape))
    if least[more, less] < UNEVEN:
        return None
    last = counts[-1]
    return LoopFinding(
        Level.WARNING,
        Cause.RANKS_UNEVEN,
        f"Rank {more} trains on more examples a step than rank {less} at each of {counted(len(counts), 'step')} "
        f"compared (at the last {last[more]:,.0f} and {last[less]:,.0f}), while their gradients count alike.",
        "Give every rank batches of one size, or weight each rank's loss with its number of examples.",
        "Losses that are weighted with the number of examples of the rank.",
        step=ranks.looks[-1],
    )
