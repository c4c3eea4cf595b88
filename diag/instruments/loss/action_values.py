"""Values of actions, as of Q-learning: whether the value that is corrected is that of the action that was taken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diag.instruments.causes import Cause
from diag.instruments.loop.findings import SOURCE, THRICE, LoopCheck, LoopFinding, judged
from diag.registry import instrument
from diag.result import Level, Precondition
from diag.snapshot.loop.arithmetic import ActionLook
from diag.snapshot.loop.facts import Loop


@dataclass(frozen=True, kw_only=True, eq=False)
class ActionValues(LoopCheck):
    """Values that are corrected though their action was not taken."""


@instrument(
    source=SOURCE,
    title="Values of actions",
    kind="check",
    why="A reward says something of the action that was taken: where it corrects the value of another one, the "
    "values of all actions become those of the best.",
)
def action_values(loop: Loop) -> ActionValues:
    """Whether a regression of the values of actions corrects the value of the action that was taken.

    loop: the facts of the loop, with what the loss compares with a number at backward passes that were looked at.
    A warning where at all of them that is the largest output of each row, and before at least three of them the
    model was called without gradients on fewer rows, as one that acts. Raises nothing of its own.
    """
    looks = loop.actions.looks
    known = Precondition(
        "values of actions", len(looks) > 0, "no regression of one of each row's outputs was seen in the loss."
    )
    by_index = sum(not look.largest for look in looks)
    fine = (
        f"The loss corrects values that an index gives at {by_index:,} of {len(looks):,} backward passes looked "
        "at, and was not seen to correct those of actions that were not taken."
    )
    return judged(ActionValues, loop.step, list(_findings(looks)), fine, preconditions=(known,))


def _findings(looks: tuple[ActionLook, ...]) -> Iterator[LoopFinding]:
    if all(look.largest for look in looks) and sum(look.acted for look in looks) >= THRICE:
        yield LoopFinding(
            Level.WARNING,
            Cause.ACTION_NOT_TAKEN,
            f"The loss corrects the largest value of each row, whatever action was taken: at all {len(looks):,} "
            "backward passes that were looked at it compares the maximum over the outputs with the target.",
            "Take the value of the action that was taken: q.gather(1, actions[:, None]).",
            "Actions that are always those of the largest value.",
            step=looks[0].step,
        )
