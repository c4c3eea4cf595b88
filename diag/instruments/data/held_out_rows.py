"""Are the rows that the model is evaluated on among those that it is trained on?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diag.display import format_share
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import LoopCheck, LoopFinding, judged
from diag.registry import instrument
from diag.result import Level, Precondition
from diag.snapshot.loop.data import DrawFacts
from diag.snapshot.loop.facts import Loop

SOURCE = "arithmetic of the rows that DataLoaders drew"
FEWEST_ROWS_IN_BOTH = 8  # rows in both


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOutRows(LoopCheck):
    """Rows that are both trained on and evaluated on."""


@instrument(
    source=SOURCE,
    title="Held-out rows",
    kind="check",
    why="A score on rows that were trained on measures memory: on new data the network does worse than it says.",
)
def held_out_rows(loop: Loop) -> HeldOutRows:
    """Whether rows that DataLoaders gave to calls without gradients were given to training too.

    Rows are known by their place in the data set, beneath Subset and ConcatDataset. An evaluation on the training's
    own data set is left out, as one that measures the training loss; and where some other evaluation has no trained
    row, one that has nothing else is taken to be that too.

    Raises nothing of its own.
    """
    d = loop.drawn
    seen = Precondition("evaluations", any(e.rows for e in d.evaluated), "no DataLoader was seen in an evaluation.")
    others = [e for e in d.evaluated if not e.of_training]
    comparable = Precondition(
        "rows of one data set",
        not others or any(e.comparable for e in others),
        "evaluations read other data sets than training; whether these hold the same rows is not known.",
    )
    rows = sum(e.comparable for e in others)
    fine = f"None of the {rows:,} rows that the model was evaluated on and that can be compared was trained on."
    findings = list(_findings(d))
    if not findings and any(e.trained for e in d.evaluated):
        fine = "The model was evaluated on the data set that it is trained on, and on other rows or none."
    return judged(HeldOutRows, loop.step, findings, fine, preconditions=(seen, comparable))


def _findings(d: DrawFacts) -> Iterator[LoopFinding]:
    others = [e for e in d.evaluated if not e.of_training and e.rows]
    clean = any(not e.trained for e in others)
    shared = [e for e in others if e.trained >= FEWEST_ROWS_IN_BOTH and not (clean and e.trained == e.rows)]
    if shared:
        worst = max(shared, key=lambda e: e.trained)
        yield LoopFinding(
            Level.WARNING,
            Cause.HELD_OUT_IN_TRAINING,
            f"The model is evaluated on rows that it is trained on: {worst.trained:,} of {worst.rows:,} "
            f"({format_share(worst.trained / worst.rows)}) that an evaluation drew were in training batches too.",
            "Split the data once and keep the two sets apart; what was measured on these rows says nothing of new "
            "ones.",
            "An evaluation that is meant to measure the training loss.",
        )
