"""Values of actions, as of Q-learning: whether the value that is corrected is that of the action that was taken,
and whether the numbers that it is compared with come from where they should."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from diag.display import format_number, format_share
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import SOURCE, THRICE, LoopCheck, LoopFinding, judged
from diag.registry import instrument
from diag.result import OUR_CHOICE, Level, Precondition
from diag.snapshot.loop.arithmetic import ActionLook
from diag.snapshot.loop.facts import Loop

LOOKS_OF_ACTIONS, STEPS_OF_ACTIONS = 5, 50
STEPS_OF_A_TARGET = 200  # of a whole training, in which a target network should have been synchronised
ABOVE_ONE = 1.0005  # a discount that is more than one beyond rounding
SETTLED_SHARE, SETTLED_NUMBERS = 0.8, 3  # share of rows, and how many numbers their targets are


@dataclass(frozen=True, kw_only=True, eq=False)
class ActionValues(LoopCheck):
    """Values that are corrected though their action was not taken, or towards numbers that lead nowhere."""


@instrument(
    source=SOURCE,
    title="Values of actions",
    kind="check",
    why="A reward says something of the action that was taken: where it corrects the value of another one, the "
    "values of all actions become those of the best.",
)
def action_values(loop: Loop) -> ActionValues:
    """Whether a regression of the values of actions corrects the value of the action that was taken, and towards
    what.

    loop: the facts of the loop, with what the loss compares with a number at backward passes that were looked at.
    Findings, each at all of at least three looks: that is the largest output of each row, and the model acts (it
    was called without gradients on fewer rows); it is that of one and the same action; the gradient goes into the
    number, too; the values of next states enter the numbers times more than one. At five looks or more, up to step
    50 or later: the numbers are one of a few in nearly all rows, whatever the values of next states are. When the
    watch closes, after 200 steps or more: the copy of the network whose values enter the numbers has never changed.
    The values of next states are those that a copy of the network, or the network itself, gave for as many rows
    since the last backward pass. Raises nothing of its own.
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
    return judged(ActionValues, loop.step, list(_findings(looks, loop)), fine, preconditions=(known,))


def _findings(looks: tuple[ActionLook, ...], loop: Loop) -> Iterator[LoopFinding]:
    acts = sum(look.acted for look in looks) >= THRICE
    if all(look.largest for look in looks) and acts:
        yield _of_the_largest(looks)
    if len(looks) < THRICE:
        return
    if all(look.through for look in looks):
        yield _through(looks)
    several = len(looks) >= LOOKS_OF_ACTIONS and looks[-1].step >= STEPS_OF_ACTIONS
    if several and acts and len({look.picked for look in looks}) == 1 and looks[0].picked >= 0:
        yield _of_one_action(looks)
    traced = [look for look in looks if not math.isnan(look.discount)]
    if len(traced) >= THRICE and all(look.discount > ABOVE_ONE for look in traced):
        yield _growing(traced)
    if several:
        yield from _settled([look for look in looks if not math.isnan(look.settled)])
    yield from _never_synchronised(traced, loop)


def _of_the_largest(looks: tuple[ActionLook, ...]) -> LoopFinding:
    return LoopFinding(
        Level.WARNING,
        Cause.ACTION_NOT_TAKEN,
        f"The loss corrects the largest value of each row, whatever action was taken: at all {len(looks):,} "
        "backward passes that were looked at it compares the maximum over the outputs with the target.",
        "Take the value of the action that was taken: q.gather(1, actions[:, None]).",
        "Actions that are always those of the largest value.",
        step=looks[0].step,
    )


def _of_one_action(looks: tuple[ActionLook, ...]) -> LoopFinding:
    first = looks[0]
    return LoopFinding(
        Level.WARNING,
        Cause.ACTION_NOT_TAKEN,
        f"The loss corrects the value of one action alone: at all {len(looks):,} backward passes that were looked "
        f"at the index is {first.picked} in every row, so that nothing is learned of the other "
        f"{first.actions - 1:,}.",
        "Print the actions as they come from the memory: the index is that of the action which was taken.",
        "A policy that took this action alone.",
        step=first.step,
    )


def _through(looks: tuple[ActionLook, ...]) -> LoopFinding:
    return LoopFinding(
        Level.WARNING,
        Cause.BOOTSTRAP_WRONG,
        "The gradient goes into the targets of the values, too: at all "
        f"{len(looks):,} backward passes that were looked at the value of an action is compared with one of "
        "another call of the same network, with gradients, so that a step moves the values of next states towards "
        "those of the states before them.",
        "Compute the targets under torch.no_grad(), with a copy of the network that is synchronised now and then.",
        "A residual gradient (Baird 1995), where this is meant.",
        step=looks[0].step,
    )


def _growing(traced: list[ActionLook]) -> LoopFinding:
    last = traced[-1]
    return LoopFinding(
        Level.ALARM,
        Cause.BOOTSTRAP_WRONG,
        f"The values feed on themselves: their targets hold {format_number(last.discount)} times the value of the "
        f"next state, at all {len(traced):,} backward passes at which that could be read, and with more than once "
        "they grow without end.",
        "Take a discount below one, as 0.99.",
        "Targets whose slope over the values of the next states is one or less.",
        step=traced[0].step,
    )


def _settled(looks: list[ActionLook]) -> Iterator[LoopFinding]:
    numbers = sorted({number for look in looks for number in look.settled_at})
    few = 0 < len(numbers) <= SETTLED_NUMBERS
    if len(looks) < LOOKS_OF_ACTIONS or not few or any(look.settled < SETTLED_SHARE for look in looks):
        return
    share = min(look.settled for look in looks)
    which = "the same number" if len(numbers) == 1 else f"one of {len(numbers)} numbers"
    yield LoopFinding(
        Level.WARNING,
        Cause.BOOTSTRAP_WRONG,
        f"The values of next states hardly enter the targets: at all {len(looks):,} backward passes at which that "
        f"could be read, in {format_share(share)} of the rows or more the target is {which} "
        f"({', '.join(map(format_number, numbers))}), whatever the network says of the next state.",
        "Look at the mask of ends: the value of the next state counts where the episode goes on, reward + "
        "discount * next * (1 - done). And look at whether the targets are clipped.",
        "Episodes that nearly all end after one step.",
        step=looks[0].step,
        threshold_source=OUR_CHOICE,
    )


def _never_synchronised(traced: list[ActionLook], loop: Loop) -> Iterator[LoopFinding]:
    sources = {look.copy for look in traced}
    still = [c for c in loop.copies if {c.number} == sources and not c.changes and c.looks >= THRICE]
    if not still or loop.step - loop.resumed < STEPS_OF_A_TARGET or len(traced) < THRICE:
        return
    yield LoopFinding(
        Level.WARNING,
        Cause.COPY_NOT_FOLLOWING,
        "The network that gives the values of next states was never synchronised: it is a copy of the one that is "
        f"trained, and at each of {still[0].looks + 1:,} looks over {loop.step - loop.resumed:,} steps it had the "
        "same weights, so that the targets are still made of the values of the start.",
        "Copy the weights into it every few hundred steps, target.load_state_dict(model.state_dict()), or move it "
        "a little at each step.",
        "A period that is meant to be longer than this training.",
        step=1,
    )
