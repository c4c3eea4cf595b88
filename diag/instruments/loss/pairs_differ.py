"""The two sides of a pair: whether a loss that compares two calls of the model compares an example with itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diag.instruments.causes import Cause
from diag.instruments.loop.findings import SOURCE, THRICE, LoopCheck, LoopFinding, judged
from diag.registry import instrument
from diag.result import Level, Precondition
from diag.snapshot.loop.contrast import ContrastLook
from diag.snapshot.loop.facts import Loop


@dataclass(frozen=True, kw_only=True, eq=False)
class PairsDiffer(LoopCheck):
    """Pairs whose two sides are one example."""


@instrument(
    source=SOURCE,
    title="Sides of a pair",
    kind="check",
    why="A pair of two equal sides is matched by any network, so that nothing is learned from it: what two views "
    "of an example have in common is only asked for where they differ.",
)
def pairs_differ(loop: Loop) -> PairsDiffer:
    """Whether the two sides of the pairs that the loss compares are different examples, or different views.

    Looked at are calls of the model before one backward pass whose outputs come together, whole, in a difference, a
    product or one tensor. An alarm where at every one of at least three looks two of these had the same inputs and
    gave the same outputs; dropout or noise inside the model makes them differ. An alarm, too, where a softmax over
    similarities asks each row, at every one of at least three looks, for an embedding that is equal to the row's,
    and other rows have others. Raises nothing of its own.
    """
    facts, looks = loop.pairs, loop.contrast.looks
    looked, equal = max(facts.looked, len(looks)), max(facts.same, sum(map(_compares_itself, looks)))
    known = Precondition("pairs", looked > 0, "no calls of the model that a loss compares were seen.")
    fine = f"Pairs of equal sides were seen at {equal:,} of {looked:,} backward passes that were looked at."
    return judged(PairsDiffer, loop.step, list(_findings(loop)), fine, preconditions=(known,))


def _compares_itself(look: ContrastLook) -> bool:
    """Whether right answers are equal to their rows, and are other rows."""
    return look.equal and look.itself < 1


def _findings(loop: Loop) -> Iterator[LoopFinding]:
    facts, looks = loop.pairs, loop.contrast.looks
    if facts.same == facts.looked >= THRICE:
        yield LoopFinding(
            Level.ALARM,
            Cause.PAIR_IDENTICAL,
            f"The loss compares examples with themselves: at all {facts.looked:,} backward passes looked at, two "
            "calls of the model whose outputs it brings together had the same inputs and gave the same outputs.",
            "Give the second call another view of the example (an augmentation, dropout) or another example of its "
            "kind; look at how the positives are drawn.",
            "Two calls whose outputs differ.",
            step=facts.first,
        )
    elif len(looks) >= THRICE and all(map(_compares_itself, looks)):
        yield LoopFinding(
            Level.ALARM,
            Cause.PAIR_IDENTICAL,
            f"The loss compares examples with themselves: at all {len(looks):,} backward passes looked at, the "
            "embedding of each row and that of its right answer are equal, and those of other rows are not.",
            "Draw the second view on its own (call the augmentation twice), or look at how the positives "
            "are drawn.",
            "Two views of an example whose embeddings differ.",
            step=looks[0].step,
        )
