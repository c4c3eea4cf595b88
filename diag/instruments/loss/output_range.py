"""Can the outputs reach the targets? An activation after the last layer may hold them in another range."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from diag.display import format_number, format_share
from diag.errors import named
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import LoopCheck, LoopFinding, judged, reach
from diag.registry import instrument
from diag.result import Level, Precondition
from diag.snapshot.loop.asked import AskedFacts
from diag.snapshot.loop.data import OF_LOG_PROBABILITIES
from diag.snapshot.loop.facts import Loop

SOURCE = "arithmetic of the range of an activation function"
CALLS_OF_RANGE = 3  # calls that were looked at
SHARE_OUTSIDE = 0.05  # of the targets
SQUASHED = ("tanh", "clamp")  # a bounded logit; sigmoid and softmax before such a loss are told of elsewhere
OF_SEVERAL, OF_TWO = "cross_entropy", "binary_cross_entropy_with_logits"  # that take logits
OF_PROBABILITIES = "binary_cross_entropy"
NOT_PROBABILITIES = ("relu", "softplus", "clamp")
SHARE_OF_ZEROS = 0.05  # of the logits
CLEARLY_ABOVE_ZERO = 0.1  # nats


@dataclass(frozen=True, kw_only=True, eq=False)
class OutputRange(LoopCheck):
    """An activation after the last layer that the loss function cannot do with."""


@instrument(
    source=SOURCE,
    title="Range of the outputs",
    kind="check",
    why="Where the last function cannot reach the targets, the loss stops at a floor that no training lowers.",
)
def output_range(loop: Loop) -> OutputRange:
    """Whether the function that ends the network lets its outputs reach what the loss function asks for.

    A tanh or sigmoid before a loss of numbers holds the outputs in (-1, 1) or (0, 1), a ReLU above zero: targets
    beyond are never reached. Logits that a ReLU or a tanh made keep probabilities from zero and one: with K classes
    and logits between a and b, cross-entropy is at least log(1 + (K - 1) exp(a - b)); with a ReLU before it no
    binary probability is below one half. A clamp or a ReLU makes no probabilities.

    Read from the graph of the calls that were looked at. Raises nothing of its own.
    """
    facts = loop.asked
    seen = Precondition("a loss function", bool(facts), "no call of a loss function of torch was seen.")
    looked = [f for f in facts if f.looked >= CALLS_OF_RANGE]
    ended = ", ".join(dict.fromkeys(f.activation or "a layer" for f in facts))
    fine = f"The outputs that the loss function gets come from {ended}, not seen to keep them from the targets."
    findings = [finding for f in looked for finding in _findings(f)]
    return judged(OutputRange, loop.step, findings, fine, preconditions=(seen,))


def _findings(f: AskedFacts) -> Iterator[LoopFinding]:
    if f.uncounted and f.function in OF_LOG_PROBABILITIES:
        yield _uncounted(f)
    if not f.activation:
        if f.zeros >= SHARE_OF_ZEROS and f.function in (OF_SEVERAL, OF_TWO):
            yield _zeroed(f)
        return
    if f.function in (OF_SEVERAL, OF_TWO):
        yield from _logits(f)
    elif f.function == OF_PROBABILITIES:
        if f.activation in NOT_PROBABILITIES:
            yield _no_probabilities(f)
    elif f.outside >= SHARE_OUTSIDE:
        yield _beyond(f)


def _logits(f: AskedFacts) -> Iterator[LoopFinding]:
    if f.activation == "relu":
        what = "no probability can be below one half" if f.function == OF_TWO else "no logit can be negative"
        yield LoopFinding(
            Level.ALARM if f.function == OF_TWO else Level.WARNING,
            Cause.OUTPUT_RANGE,
            f"The network ends in a ReLU, and {f.function} takes what comes out for logits: {what}, and an output "
            "that is zero gets no gradient.",
            "Take the ReLU after the last layer out of the model.",
            "Logits that are negative.",
            step=f.first_step,
        )
    least = lowest_loss(f)
    if f.activation in SQUASHED and least > CLEARLY_ABOVE_ZERO:
        yield LoopFinding(
            Level.ALARM,
            Cause.OUTPUT_RANGE,
            f"The network ends in {f.activation}, which holds its logits between {format_number(f.lower)} and "
            f"{format_number(f.upper)}, so that {f.function} cannot fall below {format_number(least)}.",
            f"Take the {f.activation} after the last layer out of the model.",
            "Logits beyond that range.",
            step=f.first_step,
        )


def lowest_loss(f: AskedFacts) -> float:
    """The least that the loss can be with logits in the range (nats), 0 where they are not bounded."""
    width = f.upper - f.lower
    if not math.isfinite(width):
        return 0.0
    if f.function == OF_SEVERAL:
        return math.log1p(max(f.outputs_a_row - 1, 1) * math.exp(-width))
    return min(math.log1p(math.exp(-f.upper)), math.log1p(math.exp(f.lower)))


def _zeroed(f: AskedFacts) -> LoopFinding:
    return LoopFinding(
        Level.WARNING,
        Cause.OUTPUT_RANGE,
        f"{format_share(f.zeros)} or more of the logits that {f.function} gets are exactly zero, as where "
        "dropout, a mask or a ReLU acts on what the network puts out.",
        "Put dropout before the last layer, not after it, and take a ReLU behind it away.",
        "Logits that are set to zero on purpose.",
        step=f.first_step,
    )


def _uncounted(f: AskedFacts) -> LoopFinding:
    return LoopFinding(
        Level.WARNING,
        Cause.CLASS_MISSING,
        f"{f.function} weights {'class' if len(f.uncounted) == 1 else 'classes'} {named(f.uncounted, 5)} with "
        "zero, so that their examples teach nothing.",
        "Look at how weight= is made: a class that was not counted, a division that rounded.",
        "A class that is left out on purpose.",
        step=f.first_step,
    )


def _no_probabilities(f: AskedFacts) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.LOGITS_INTO_PROBABILITY_LOSS,
        f"{f.function} expects probabilities and is called on raw outputs that went through a {f.activation}: "
        "where it cuts, the logarithm of zero is taken and no gradient comes back.",
        "Use binary_cross_entropy_with_logits on the raw outputs, or put a sigmoid there.",
        "Outputs strictly between zero and one.",
        step=f.first_step,
    )


def _beyond(f: AskedFacts) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.OUTPUT_RANGE,
        f"The network ends in {f.activation}, which keeps its outputs {reach(f.lower, f.upper)}; "
        f"{format_share(f.outside)} of the targets lie beyond (they go from {format_number(f.low)} to "
        f"{format_number(f.high)}).",
        f"Take the {f.activation} after the last layer out of the model, or bring the targets into that range.",
        "Targets that all lie in that range.",
        step=f.first_step,
    )
