"""Are axes exchanged by a transpose, or were their lengths exchanged alone?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diag.instruments.causes import Cause
from diag.instruments.loop.findings import LoopCheck, LoopFinding, judged
from diag.registry import instrument
from diag.result import Level, Precondition
from diag.snapshot.loop.facts import Loop

SOURCE = "arithmetic of the shapes in the graph of the loss"


@dataclass(frozen=True, kw_only=True, eq=False)
class AxesKept(LoopCheck):
    """Reshapes that give axes each other's lengths, and orders of outputs and targets that differ."""

    cites = SOURCE


@instrument(
    source=SOURCE,
    title="Axes",
    kind="check",
    why="A reshape keeps the numbers in their order: where a transpose was meant, the shape is right and the "
    "numbers of different examples, positions or channels are mixed.",
)
def axes_kept(loop: Loop) -> AxesKept:
    """Whether a reshape stands where axes should have changed places.

    loop: the facts of the loop, which hold the reshapes in the graphs of the first losses that give axes each
    other's lengths, (n, t, k) to (n, k, t), where neither length divides the other nor is next to it (splitting
    heads and shifting rows look alike then), and whether outputs and targets were made one row of tokens in
    different orders. A reshape is a warning, orders that differ are an alarm. Raises nothing of its own.
    """
    known = Precondition("a loss", loop.backwards > 0, "no backward pass was seen.")
    fine = "No reshape gives axes each other's lengths."
    return judged(AxesKept, loop.step, list(_findings(loop)), fine, preconditions=(known,))


def _findings(loop: Loop) -> Iterator[LoopFinding]:
    if loop.targets.flattened:
        outputs, targets = loop.targets.flattened
        yield LoopFinding(
            Level.ALARM,
            Cause.AXES_MIXED,
            f"Outputs and targets are flattened in different orders: the outputs from {outputs}, the targets from "
            f"{targets}, so that nearly every output is compared with the target of another place.",
            "Reshape both from the same order of axes, examples first.",
            "Outputs whose first axes are those of the targets.",
            step=1,
        )
    for before, after in loop.reshaped[:1]:
        more = f" ({len(loop.reshaped)} such reshapes)" if len(loop.reshaped) > 1 else ""
        yield LoopFinding(
            Level.WARNING,
            Cause.AXES_MIXED,
            f"A reshape stands where a transpose seems to be meant: from {before} to {after} it exchanges "
            f"the lengths of axes and not the numbers along them, so that these are mixed{more}.",
            "Use transpose or permute to exchange axes, and reshape only to split or merge neighbouring ones.",
            "A reshape whose order of numbers is the one that is meant.",
            step=1,
        )
