"""The formula of a loss written by hand: does it ask for what it is for, and can it be lowered without end?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diag.instruments.loop.findings import STEP_OF_A_SUM, THRICE, LoopCheck, LoopFinding, judged
from diag.instruments.loss.formula_rules import FORMULA_RULES
from diag.registry import instrument
from diag.result import Precondition
from diag.snapshot.loop.arithmetic import Odd, Oddity
from diag.snapshot.loop.facts import Loop

SOURCE = "arithmetic of the formula, read from its graph"
STARTS_AT_ZERO = 1  # looks at which layers that start at zero say nothing
LOOKS_OF_A_WARMUP = 6  # with the one at the 100th pass: a factor that stays at zero until then


@dataclass(frozen=True, kw_only=True, eq=False)
class LossFormula(LoopCheck):
    """What the loop's own arithmetic leaves out, turns round or takes together."""


@instrument(
    source=SOURCE,
    title="Formula of the loss",
    kind="check",
    why="A loss written by hand falls as well where a term is missing or a sign is wrong: what it asks for is then "
    "something else than what is wanted.",
)
def loss_formula(loop: Loop) -> LossFormula:
    """Whether the loss asks for what losses of its form are for.

    Read from the graph of the backward passes that were looked at (the first three, the 10th, the 30th, ...), with
    the masks and results that the graph keeps: errors that are averaged before they are squared; predicted
    variances, task weights and layers of a flow whose logarithm is missing or has the wrong sign; variances that
    a clamp holds; log-likelihoods that are descended, and labels from which a focal factor or an overlap drives
    the outputs away; a softmax over one entry; a mask that leaves one target alone, or takes every pair both
    ways; scores that are bounded before they are subtracted; functions that end the network out of reach of the
    targets; the second derivative of a ReLU; sums over the batch with plain SGD. An alarm takes all looks, three at
    least. Raises nothing of its own.
    """
    facts = loop.formula
    seen = Precondition("a loss", facts.looked > 0, "no backward pass from one number was looked at.")
    fine = f"Nothing is missing or turned round in the formula of the loss, at {facts.looked:,} backward passes."
    return judged(LossFormula, loop.step, list(_findings(loop)), fine, preconditions=(seen,))


def _findings(loop: Loop) -> Iterator[LoopFinding]:
    for odd in loop.formula.odd:
        spared = STARTS_AT_ZERO if odd.kind == Odd.COLUMNS_KEPT else 0
        if odd.seen < max(THRICE, loop.formula.looked - spared):
            continue
        late = odd.kind == Odd.NOISE_UNRELATED or bool(odd.numbers.get("weightless"))
        if (late and odd.seen < LOOKS_OF_A_WARMUP) or (odd.kind == Odd.SUMMED and not _is_large(loop, odd)):
            continue
        yield FORMULA_RULES[odd.kind].told(odd)


def _is_large(loop: Loop, odd: Oddity) -> bool:
    rates = [g.get("lr", 0.0) for o in loop.training if o.kind == "SGD" for g in o.groups]
    return bool(rates) and max(rates) * odd.numbers["rows"] >= STEP_OF_A_SUM and odd.numbers["rows"] > 1
