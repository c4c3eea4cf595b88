"""Does anything but the optimizer change the weights?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diag.errors import counted, named
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import NO_STEP, SOURCE, TWICE, LoopCheck, LoopFinding, judged
from diag.registry import instrument
from diag.result import Level
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.steps import OutsideChange

STEPS_TAKEN_BACK, MOST_OF_IT = 8, 0.8  # steps in a row, and the share of each
OFTEN = 0.5  # of the steps: a projection, a constraint or a decay of the user's own


@dataclass(frozen=True, kw_only=True, eq=False)
class OutsideChanges(LoopCheck):
    """Weights that were not at a training call what the step before had left."""


@instrument(
    source=SOURCE,
    title="Weights changed from outside",
    kind="check",
    why="Weights that something other than the optimizer changes lose what was just learned, and the "
    "optimizer's state no longer fits them.",
)
def outside_changes(loop: Loop) -> OutsideChanges:
    """Whether the weights at each training call are those that the optimizer's last step left.

    A few numbers of a few parameters are compared, exactly. A change at most steps (weights that are clamped or
    projected) is taken to be meant unless it takes nearly all of each step back, and so is one of parameters that
    no optimizer trains (a teacher). A change that
    was made before an evaluation and still stands after it is that of averaged weights which were not put back.

    Raises nothing of its own.
    """
    about = {} if loop.training else {"preconditions": (NO_STEP,)}
    changes = _changes(loop)
    findings = list(_findings(loop, changes)) if loop.training else []
    return judged(OutsideChanges, loop.step, findings, _meant(loop) if changes else _kept(loop), **about)


def _changes(loop: Loop) -> list[OutsideChange]:
    """Of parameters that an optimizer trains."""
    held = {name for o in loop.training for name in o.held}
    return [c for c in loop.outside if set(c.names) & held]


def _kept(loop: Loop) -> str:
    whose = "weights that an optimizer trains" if loop.outside else "weights"
    return (
        f"At each training call the {whose} were what the step before had left, as far as a few numbers of them "
        f"tell, in {counted(loop.step, 'step')}."
    )


def _meant(loop: Loop) -> str:
    return (
        f"Something other than the optimizer changes the weights between steps, {loop.outside_times:,} times in "
        f"{counted(loop.step, 'step')}; at so many of them it is taken to be meant, as a projection or a limit is."
    )


def _findings(loop: Loop, changes: list[OutsideChange]) -> Iterator[LoopFinding]:
    last = loop.taken_back[-STEPS_TAKEN_BACK:]
    if changes and len(last) == STEPS_TAKEN_BACK and min(last) > MOST_OF_IT:
        yield _taken_back(min(last), len(last), changes[0])
        return
    if not changes or loop.outside_times > OFTEN * max(loop.step - 1, 1):
        return
    swapped = [c for c in changes if c.evaluated and c.returned_to is None]
    back = [c for c in changes if c.returned_to is not None]
    if swapped:
        yield _swapped(swapped, loop)
    elif back:
        yield _back(back, loop)
    else:
        yield _changed(changes, loop)


def _taken_back(share: float, steps: int, first: OutsideChange) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.WEIGHTS_CHANGED_OUTSIDE,
        f"What the optimizer does is taken back: after each of the last {steps:,} steps that were looked at, "
        f"something moved the weights back by {min(share, 1):.0%} or more of that step, before the next training "
        "call.",
        "Look for averaged weights (EMA) that are copied into the model that trains, or for old weights that are "
        "mixed in; keep the average in a copy.",
        "Weights at a training call that are those of the last optimizer step.",
        step=first.step,
        layers=first.names,
    )


def _swapped(changes: list[OutsideChange], loop: Loop) -> LoopFinding:
    first = changes[0]
    return LoopFinding(
        Level.ALARM,
        Cause.AVERAGED_WEIGHTS_LEFT,
        f"Other weights were put in for an evaluation and training goes on from them: before step {first.step:,} "
        f"the values of {named(first.names)} differ from what the last optimizer step left{_times(loop)}.",
        "Put the training weights back after the evaluation (ema.restore()), or evaluate a copy of the model.",
        "Weights that are equal before and after the evaluation.",
        step=first.step,
        layers=first.names,
    )


def _back(changes: list[OutsideChange], loop: Loop) -> LoopFinding:
    first, several = changes[0], len(changes) >= TWICE
    to = "the start" if first.returned_to == 0 else f"step {first.returned_to:,}"
    begun = {o.first_step for o in loop.training}
    over = all(c.step in begun for c in changes)  # with an optimizer of its own: as folds do
    return LoopFinding(
        Level.ALARM if several and not over else Level.WARNING,
        Cause.WEIGHTS_CHANGED_OUTSIDE,
        f"The weights are set back: before step {first.step:,} {named(first.names)} have the values of {to} "
        f"again{_times(loop)}{', each time with a new optimizer' if over else ''}.",
        "Load or initialise the weights once, before the loop"
        + ("; where these are trainings of their own (folds, a sweep), watch each by itself." if over else "."),
        "Weights at a training call that are those of the last optimizer step.",
        step=first.step,
        layers=first.names,
    )


def _changed(changes: list[OutsideChange], loop: Loop) -> LoopFinding:
    first = changes[0]
    return LoopFinding(
        Level.WARNING,
        Cause.WEIGHTS_CHANGED_OUTSIDE,
        f"Something other than the optimizer changed the weights before step {first.step:,}: {named(first.names)} "
        f"differ from what the last optimizer step left{_times(loop)}.",
        "Look for load_state_dict, an initialisation or an assignment of weights inside the loop.",
        "Weights at a training call that are those of the last optimizer step.",
        step=first.step,
        layers=first.names,
    )


def _times(loop: Loop) -> str:
    return f", {loop.outside_times:,} times so far" if loop.outside_times > 1 else ""
