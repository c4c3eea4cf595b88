"""The scale of a regression's targets against the scale of the network's first outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diag.display import format_number
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import LoopCheck, LoopFinding, judged
from diag.ranges import Threshold
from diag.registry import instrument
from diag.result import Confidence, Level, Precondition
from diag.snapshot.loop.data import TargetFacts
from diag.snapshot.loop.facts import Loop

SOURCE = "LeCun et al. 1998, Efficient BackProp, 4.5 (targets within the range of the outputs)"
LARGE_TARGETS, OUTPUTS_APART = 20.0, 10.0


@dataclass(frozen=True, kw_only=True, eq=False)
class TargetScale(LoopCheck):
    """Targets far larger than what the network outputs."""


@instrument(
    source=SOURCE,
    title="Scale of the targets",
    kind="check",
    why="Targets far from the size of the first outputs take a network many steps to reach, and make every loss "
    "and gradient that much larger.",
)
def target_scale(loop: Loop, *, large: Threshold = LARGE_TARGETS) -> TargetScale:
    """Whether the targets of a regression are of a size that the network can reach soon.

    A network starts with outputs near one and below. Targets whose root mean square is above `large`, and ten times
    that of the network's first outputs, have to be reached by growing the last layer, and their squared error gives
    gradients that are larger by as much. Judged for the losses of numbers of torch (mse_loss, l1_loss, ...)
    and for squares or sizes of differences in the loop's own arithmetic.

    Raises nothing of its own.
    """
    t = loop.targets if loop.targets.looked else _of_own(loop)
    seen = Precondition("a regression", t.looked > 0, "no loss between numbers (mse_loss, l1_loss) was seen.")
    fine = (
        f"Targets have a mean of {format_number(t.mean)} and a standard deviation of {format_number(t.deviation)}."
    )
    findings = list(_findings(t, large)) if t.looked else []
    return judged(TargetScale, loop.step, findings, fine, preconditions=(seen,))


def _of_own(loop: Loop) -> TargetFacts:
    """The targets of the loop's own squares or sizes of differences, the largest of several."""
    own = [p for p in loop.paired if not p.function and p.size == p.size]
    p = max(own, key=lambda p: p.size, default=None)
    return TargetFacts() if p is None else TargetFacts("", 1, p.size, p.mean, p.deviation, p.first_output)


def _findings(t: TargetFacts, large: float) -> Iterator[LoopFinding]:
    if t.size > large and t.size > OUTPUTS_APART * t.first_output:
        yield LoopFinding(
            Level.WARNING,
            Cause.TARGETS_NOT_NORMALIZED,
            f"The targets are not normalised: their mean is {format_number(t.mean)} and their standard deviation "
            f"{format_number(t.deviation)}, while the network starts with outputs of "
            f"{format_number(t.first_output)}.",
            "Subtract the training targets' mean and divide by their standard deviation; undo it on what the "
            "network predicts.",
            "The training goes no better with targets of zero mean and unit scale.",
            step=1,
            confidence=Confidence.WEAK_EMPIRICAL,
        )
