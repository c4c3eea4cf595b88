"""Inputs of the user's own evaluation against those of training: whether they are prepared in the same way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import ClassVar

from diag.display import format_number, format_share
from diag.errors import named
from diag.instruments.causes import Cause
from diag.instruments.data.held_out_inputs import MEAN_SHIFT, SPREAD_RATIO, inputs_apart
from diag.instruments.loop.findings import LoopCheck, LoopFinding, judged
from diag.registry import instrument
from diag.result import Confidence, Level, Precondition
from diag.snapshot.loop.evaluated import ArrangementFacts, ColumnFacts, NoveltyFacts
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.inputs import InputFacts

SOURCE = "arithmetic of the inputs of calls in training and in evaluation"
ROWS_OF_EVALUATION = 32
FEATURES_APART, FEWEST_FEATURES = 0.5, 4  # of the features, and features
STANDING_ROWS, ROWS_MIRRORED = 100, 128  # of evaluation
TOKENS_EVALUATED, MOSTLY_NEW, SELDOM_NEW = 64, 0.5, 0.02
ONE_NEW = 0.2  # of evaluation's tokens
HARDLY_ANY = 3  # different ids in all of training
MIRRORS = ("left to right", "upside down")
LOOK_AT_THE_SPLIT = (
    "Look at how the data was split (by id, where rows were meant?) and at how ids are numbered in both."
)
ROWS_OF_LENGTHS, MUCH_SHORTER = 64, 0.75  # rows of a side; longest of evaluation beside training's short ones
# Of what a mirror makes negative of the moments of pixels: over its noise, squared; correlation; one in the other.
CLEAR_IMAGE, MIRRORED, ALL_MIRRORED = 6.0, -0.6, (0.6, 1.6)
# Of neighbours along an axis: correlation in order and in none (off -1 / n), and numbers of a side.
IN_ORDER, IN_NO_ORDER, NUMBERS_IN_ORDER = 0.25, 0.05, 4000
PAIRS_EVALUATED, OFTEN_KNOWN, HALF_AS_OFTEN = 1000, 0.3, 0.5


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationInputs(LoopCheck):
    """Inputs that are prepared in another way in evaluation."""

    cites: ClassVar[str] = SOURCE


@instrument(
    source=SOURCE,
    title="Inputs of evaluation",
    kind="check",
    why="A network that is judged on inputs of another scale, order or vocabulary than those it learned from looks "
    "worse than it is, and the reason is in the preparation of the data.",
)
def evaluation_inputs(loop: Loop) -> EvaluationInputs:
    """Whether the inputs that the model is evaluated on are prepared as those it is trained on.

    Of the first floating tensor of calls in training and of calls in evaluation mode without gradients (or in
    training mode, of a model for which that is the same: those on more rows than training's batches have), of
    examples of one shape: standard deviations of all entries that differ more than twofold, or means that differ
    by more than two of the larger one, are a warning; so are those of half of the features or more (columns of a
    table, channels, features of sequences) with four and two, and a column of a table that stands at one number in
    evaluation which training seldom has. Inputs whose features all have the spread of training's and the opposite
    skewness (as 1 - x has) are told of. Columns of a table in another order are named where each of them is in
    evaluation what another one is in training, by its distribution and its correlations. Of whole numbers for an
    embedding: ids of evaluation that are mostly new where training's later batches have hardly any new one, or a
    fifth of which are one new id, rows of which the longest is a quarter shorter than nine in ten of training's,
    and pairs of neighbouring tokens that training had half as often as those of its own new rows, are a warning
    each. So are images that are mirrored or transposed in the rows of one of the two, by which pixels are bright,
    and sequences in which neighbours along an axis are alike in the one and as in a random order in the other.

    Raises nothing of its own.
    """
    both = _both(loop.inputs)
    seen = Precondition(
        "both",
        both or bool(loop.columns.features) or any(n.tokens for n in loop.novelty),
        f"fewer than {ROWS_OF_EVALUATION} floating inputs of one shape were seen in training and in evaluation "
        "mode, and no ids or tokens.",
    )
    findings = list(_of_order(loop.columns)) or list(_turned(loop.columns))
    findings = findings or (list(_of_all_entries(loop.inputs)) if both else [])
    findings = findings or list(_of_columns(loop.columns))
    findings = findings or list(_of_arrangement(loop.columns.arrangement))
    findings += [f for n in loop.novelty for f in _of_tokens(n)]
    return judged(EvaluationInputs, loop.step, findings, _fine(loop.inputs), preconditions=(seen,))


def _both(i: InputFacts) -> bool:
    """Whether enough floating inputs of one shape were seen on both sides."""
    floating = i.deviation == i.deviation and i.evaluated_deviation == i.evaluated_deviation
    return floating and i.shape_alike and min(i.rows, i.evaluated_rows) >= ROWS_OF_EVALUATION


def _fine(i: InputFacts) -> str:
    if not _both(i):
        return "Inputs of evaluation are like those of training in what was compared."
    return (
        f"Inputs have a mean of {format_number(i.evaluated_mean)} and a standard deviation of "
        f"{format_number(i.evaluated_deviation)} in evaluation, {format_number(i.mean)} and "
        f"{format_number(i.deviation)} in training."
    )


def _of_order(c: ColumnFacts) -> Iterator[LoopFinding]:
    if c.moved:
        places = [f"column {there} is like training's {here}" for there, here in c.moved]
        yield _differs(
            "The columns of the inputs stand in another order in evaluation: by their distributions and "
            f"correlations {len(c.moved):,} of them are like a column that training has at another place, and not "
            f"like the one at their own ({named(places, 3)}).",
            "Take the columns of both tables by one list of names.",
            "The names of the columns, in the order in which the model gets them, agree.",
        )


def _turned(c: ColumnFacts) -> Iterator[LoopFinding]:
    if c.turned:
        skew, other = (format_number(number) for number in c.skews)
        which = f"feature {c.turned[0]}, the first of {len(c.turned):,}," if len(c.turned) > 1 else "the inputs"
        yield _differs(
            "Inputs are turned over in evaluation, as by 1 - x or another sign: they spread as in training, and "
            f"are lopsided to the other side (the skewness of {which} is {other} there and {skew} in training).",
            "Prepare both alike: dark on light or light on dark, and one sign.",
            "The two are prepared by the same code, and their sources are each other's reverse.",
        )


def _of_all_entries(i: InputFacts) -> Iterator[LoopFinding]:
    ratio, shift = inputs_apart(i.mean, i.deviation, i.evaluated_mean, i.evaluated_deviation)
    if ratio > SPREAD_RATIO or shift > MEAN_SHIFT:
        yield _differs(
            f"Inputs are not the same in evaluation: they have a mean of {format_number(i.evaluated_mean)} and a "
            f"standard deviation of {format_number(i.evaluated_deviation)}, in training {format_number(i.mean)} "
            f"and {format_number(i.deviation)}.",
            "Prepare both in the same way, with the mean and standard deviation of the training data.",
            "The two are prepared by the same code, and their sources differ so much.",
        )


def _of_columns(c: ColumnFacts) -> Iterator[LoopFinding]:
    if c.features >= FEWEST_FEATURES and c.apart >= FEATURES_APART * c.features:
        mean, spread, other_mean, other_spread = (format_number(number) for number in c.numbers)
        yield _differs(
            f"Inputs are not the same in evaluation: {c.apart:,} of {c.features:,} features have another mean or "
            f"scale there. Feature {c.example} has a mean of {other_mean} and a standard deviation of "
            f"{other_spread}, in training {mean} and {spread}.",
            "Prepare both in the same way, each feature with its mean and standard deviation in the training data, "
            "and in the same order.",
            "The two are prepared by the same code, and their sources differ so much.",
        )
    elif c.standing and c.evaluated >= STANDING_ROWS:
        several = len(c.standing) > 1
        yield _differs(
            f"{'Features' if several else 'Feature'} {named(c.standing, 5)} {'are' if several else 'is'} the same "
            f"in all {c.evaluated:,} rows of evaluation ({format_number(c.number)}"
            f"{' the first' if several else ''}), and {'vary' if several else 'varies'} in training: what the "
            f"network learned of {'them' if several else 'it'} is not there when it is judged.",
            "Look at how this column is made for evaluation: it may be filled in, or be known only in training.",
            "Rows of evaluation in which it varies.",
        )


def _of_arrangement(a: ArrangementFacts) -> Iterator[LoopFinding]:
    low, high = ALL_MIRRORED
    ways = [way for way, scale, alike, clear in a.mirrored
            if clear >= CLEAR_IMAGE and alike <= MIRRORED and low <= -scale <= high]  # fmt: skip
    # Turned by 180 degrees, some images look like transposed ones, too.
    mirrors, others = named([w for w in ways if w in MIRRORS]), named([w for w in ways if w not in MIRRORS])
    if min(a.rows, a.evaluated) >= ROWS_MIRRORED and ways:
        yield _differs(
            "Images of training and of evaluation are turned against each other "
            f"({' or '.join(filter(None, (mirrors, others)))}): by which pixels are bright together, in {a.rows:,} "
            f"rows of training and {a.evaluated:,} of evaluation, the one is the other mirrored or transposed, in "
            "most rows.",
            "Look at flips and at the order of axes in the transforms of both; a flip that is to make training "
            "richer is drawn for half of the rows.",
            "Evaluation is meant to be of mirrored images.",
        )
    for axis, ours, theirs, numbers, length in a.order:
        quiet, loud = sorted((ours + 1 / length, theirs + 1 / length), key=abs)
        if numbers >= NUMBERS_IN_ORDER and abs(quiet) <= IN_NO_ORDER and abs(loud) >= IN_ORDER:
            where = "training" if abs(ours + 1 / length) < abs(theirs + 1 / length) else "evaluation"
            yield _differs(
                f"The order along axis {axis} of the inputs is random in {where} alone: neighbours are correlated "
                f"{format_number(ours)} there in training and {format_number(theirs)} in evaluation, within a row "
                f"of {length:,} places.",
                "Shuffle rows, not what stands within them: look at the axis of permutations and of reshapes in "
                "the preparation of both.",
                "A network for which the order along this axis does not count, as for a set of points.",
            )


def _of_tokens(n: NoveltyFacts) -> Iterator[LoopFinding]:
    yield from islice(chain(_new_ids(n), _one_new(n), _cut(n), _other_pairs(n)), 1)


def _new_ids(n: NoveltyFacts) -> Iterator[LoopFinding]:
    if n.tokens >= TOKENS_EVALUATED and n.new >= MOSTLY_NEW and n.expected <= SELDOM_NEW:
        # Training may show next to nothing of its ids, as where a mask hides them all.
        hidden = n.counted > 0 and n.distinct <= HARDLY_ANY
        where = "Look at what training's ids are replaced by: it has hardly any other than"
        yield _differs(
            f"{format_share(n.new)} of the {n.tokens:,} ids of input {n.number} in evaluation were in none of the "
            "batches of training that were looked at, which hardly bring new ones any more: an embedding of them "
            "is as it was initialised.",
            f"{where} {n.common}." if hidden else LOOK_AT_THE_SPLIT,
            "Batches of training with these ids.",
        )


def _one_new(n: NoveltyFacts) -> Iterator[LoopFinding]:
    if n.tokens >= TOKENS_EVALUATED and n.one_share >= ONE_NEW and n.expected <= SELDOM_NEW:
        yield _differs(
            f"{format_share(n.one_share)} of the tokens of input {n.number} in evaluation are {n.one_new}, which "
            "was in none of the batches of training that were looked at: if it stands for unknown words, the "
            "network has never learned what to do with it.",
            "Look up some words of evaluation's text in the vocabulary: upper and lower case, spaces and stripped "
            "characters as in training.",
            "Batches of training with this token.",
        )


def _cut(n: NoveltyFacts) -> Iterator[LoopFinding]:
    if min(n.rows, n.evaluated_rows) >= ROWS_OF_LENGTHS and n.longest <= MUCH_SHORTER * n.short:
        yield _differs(
            f"Sequences are cut shorter in evaluation: none of the {n.evaluated_rows:,} rows of input {n.number} "
            f"that were looked at has more than {n.longest} tokens, and nine in ten of training's have {n.short} "
            "or more.",
            "Cut both to one length, and look at what a tokenizer or a slice leaves of evaluation's rows.",
            "Evaluation is meant to be of shorter sequences.",
        )


def _other_pairs(n: NoveltyFacts) -> Iterator[LoopFinding]:
    if n.pairs >= PAIRS_EVALUATED and n.known <= HALF_AS_OFTEN * n.known_of_training and _often(n):
        yield _differs(
            f"Tokens follow one another otherwise in evaluation: {format_share(n.known)} of the neighbouring pairs "
            f"of input {n.number} are known from training, and {format_share(n.known_of_training)} of those of "
            "training's own new rows were.",
            "Make sure that both are numbered by one vocabulary, the one of training, and prepared by one "
            "tokenizer.",
            "Rows of evaluation decode to the text that they were made from with training's vocabulary.",
        )


def _often(n: NoveltyFacts) -> bool:
    """Whether pairs come again at all in this text."""
    return n.known_of_training >= OFTEN_KNOWN


def _differs(sentence: str, advice: str, refutation: str) -> LoopFinding:
    return LoopFinding(
        Level.WARNING,
        Cause.HELD_OUT_DIFFERS,
        sentence,
        advice,
        refutation,
        step=1,
        explained_by=(Cause.HELD_OUT_DIFFERS, Cause.ANSWER_IN_INPUT),
        confidence=Confidence.WEAK_EMPIRICAL,
    )
