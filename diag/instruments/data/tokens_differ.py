"""Do the tokens that a model is given differ at all, and do they reach the examples that they are of?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from diag.display import format_share
from diag.errors import counted
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import THRICE, LoopCheck, LoopFinding, judged
from diag.registry import instrument
from diag.result import Level, Precondition
from diag.snapshot.loop.evaluated import NoveltyFacts
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.inputs import TokenFacts

SOURCE = "arithmetic of the inputs of training"
TOKENS_AT_LEAST = 200
TOKENS_COUNTED, MOSTLY_ONE = 2000, 0.8
LARGE_VOCABULARY, ROWS_TO_A_TOKEN = 100, 20  # rows of the embedding, and for each token that occurs
LOOK_UP_WORDS = (
    "Look up some words of the text in the vocabulary: upper and lower case, spaces, or a vocabulary of another "
    "tokenizer make every word the unknown one."
)

FINE = "No sign was seen that the tokens are all one, or all in one bag."


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

    Judged where the model is given whole numbers. An alarm where all of at least 200 in three calls are one
    number, and where one row of tokens is cut into bags (ids and offsets, as of `EmbeddingBag`) of which all but
    the last are empty, in each call that was looked at. A warning where one number is four fifths or more of at
    least two thousand tokens of sequences, what fills their ends left out, and the embedding has twenty times as
    many rows as there are distinct ones. Raises nothing of its own.
    """
    t, in_rows = loop.tokens, [n for n in loop.novelty if n.counted]
    known = Precondition("tokens", t.calls > 0 or bool(in_rows), "the model is not called with whole numbers.")
    findings = list(_findings(t))
    findings = findings or [_mostly_one(n) for n in in_rows if _is_mostly_one(n)]
    return judged(TokensDiffer, loop.step, findings, FINE, preconditions=(known,))


def _is_mostly_one(n: NoveltyFacts) -> bool:
    few = n.largest >= LARGE_VOCABULARY and ROWS_TO_A_TOKEN * n.distinct <= n.largest
    return few and n.counted >= TOKENS_COUNTED and n.share >= MOSTLY_ONE


def _mostly_one(n: NoveltyFacts) -> LoopFinding:
    return LoopFinding(
        Level.WARNING,
        Cause.INPUTS_CONSTANT,
        f"{format_share(n.share)} of the {n.counted:,} tokens of training that were looked at (without what fills "
        f"the ends of sequences) are {n.common}, of {counted(n.distinct, 'different one')} in all, where the "
        f"embedding has {n.largest:,} rows: the examples hardly differ but in their length.",
        LOOK_UP_WORDS,
        "Tokens of which most differ from this one.",
        step=1,
    )


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
            LOOK_UP_WORDS,
            "Tokens that differ.",
            step=1,
        )
