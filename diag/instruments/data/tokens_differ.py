"""Do the tokens that a model is given differ at all, and do they reach the examples that they are of?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from diag.instruments.causes import Cause
from diag.instruments.loop.findings import THRICE, LoopCheck, LoopFinding, judged
from diag.registry import instrument
from diag.result import Level, Precondition
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.inputs import TokenFacts

SOURCE = "arithmetic of the inputs of training"
TOKENS_AT_LEAST = 200


@dataclass(frozen=True, kw_only=True, eq=False)
class TokensDiffer(LoopCheck):
    """Tokens that are all one, or that are all in one bag."""

    cites: ClassVar[str] = SOURCE


@instrument(
    source=SOURCE,
    title="Tokens",
    kind="check",
    why="Where a vocabulary does not fit the text every token is the unknown one, and the network is given nothing "
    "but the length of its examples.",
)
def tokens_differ(loop: Loop) -> TokensDiffer:
    """Whether the tokens that a model is called with differ, and are spread over their examples.

    Judged where the model is given whole numbers alone. An alarm where all of at least 200 in three calls are one
    number, and where one row of tokens is cut into bags (ids and offsets, as of `EmbeddingBag`) of which all but
    the last are empty, in each call that was looked at. Raises nothing of its own.
    """
    t = loop.tokens
    known = Precondition("tokens", t.calls > 0, "the model is not called with whole numbers alone.")
    return judged(TokensDiffer, loop.step, list(_findings(t)), "The tokens differ.", preconditions=(known,))


def _findings(t: TokenFacts) -> Iterator[LoopFinding]:
    if t.bag_calls >= THRICE and t.empty_calls == t.bag_calls:
        yield LoopFinding(
            Level.ALARM,
            Cause.INPUTS_CONSTANT,
            f"All tokens of a batch go to its last example: the offsets are 0 for each of the {t.bags:,} bags in "
            f"the {t.bag_calls} calls that were looked at, so that all bags but the last are empty.",
            "Make offsets of the lengths of the examples: torch.tensor([0, *lengths[:-1]]).cumsum(0).",
            "Offsets that rise.",
            step=1,
        )
    if t.calls >= THRICE and t.numbers >= TOKENS_AT_LEAST and t.distinct == 1:
        yield LoopFinding(
            Level.ALARM,
            Cause.INPUTS_CONSTANT,
            f"All {t.numbers:,} tokens that the model was given in the {t.calls} calls that were looked at are "
            f"{t.one}: no example differs from another but in its length.",
            "Look up some words of the text in the vocabulary: upper and lower case, spaces, or a vocabulary of "
            "another tokenizer make every word the unknown one.",
            "Tokens that differ.",
            step=1,
        )
