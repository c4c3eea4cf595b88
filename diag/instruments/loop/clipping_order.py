"""Are gradients clipped when they are there, and before they are used?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diag.errors import of_the_steps
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import SOURCE, TWICE, LoopCheck, LoopFinding, judged
from diag.registry import instrument
from diag.result import Level, Precondition
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.steps import ClippingFacts


@dataclass(frozen=True, kw_only=True, eq=False)
class ClippingOrder(LoopCheck):
    """Clips that do nothing."""


@instrument(
    source=SOURCE,
    title="Order of clipping",
    kind="check",
    why="Clipping that runs at another place than between backward() and step() bounds nothing: the step "
    "that it should have tamed is taken in full.",
)
def clipping_order(loop: Loop) -> ClippingOrder:
    """Whether gradients are clipped between backward() and step(), all of them.

    A clip before the first backward pass of a step, or after the step, acts on nothing; one that further backward
    passes follow acts on a part. A generator of parameters that has been read once gives none to clip.

    Raises nothing of its own.
    """
    c = loop.clipping
    used = Precondition("clipping", bool(c.clips), "gradients are not clipped.")
    seen = of_the_steps(c.clips.times, loop.looked, loop.step)
    fine = f"Gradients were clipped between backward() and step() at {seen}."
    return judged(
        ClippingOrder, loop.step, list(_findings(c, loop)) if loop.backwards else [], fine, preconditions=(used,)
    )


def _findings(c: ClippingFacts, loop: Loop) -> Iterator[LoopFinding]:
    if c.empty.longest >= TWICE and c.empty.times >= c.clips.times:
        yield _useless(c.empty.first, "on no gradient: it was given no parameter that has one", "list(parameters)")
    elif c.early.longest >= TWICE:
        yield _useless(
            c.early.first, "before backward() or after optimizer.step(), where it does nothing", "between the two"
        )
    elif c.partial.longest >= TWICE:
        yield LoopFinding(
            Level.WARNING,
            Cause.CLIPPING_BEFORE_BACKWARD,
            "Gradients are clipped before the last backward pass of a step, at "
            f"{of_the_steps(c.partial.times, loop.looked, loop.step)}: what is accumulated afterwards is not "
            f"clipped.",
            "Clip once, after the last backward pass and before optimizer.step().",
            "No backward pass between the clip and the step.",
            step=c.partial.first,
        )


def _useless(step: int, how: str, where: str) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.CLIPPING_BEFORE_BACKWARD,
        f"Gradients are clipped {how}, since step {step:,}.",
        f"Call clip_grad_norm_ after backward() and before optimizer.step() ({where}).",
        "A gradient whose norm is below the threshold when optimizer.step() is called.",
        step=step,
    )
