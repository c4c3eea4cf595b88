"""Contrastive losses: whether the right answers can be found and told from the others, and what keeps rows
apart."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from diag.display import format_number, format_share
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import THRICE, LoopCheck, LoopFinding, judged
from diag.ranges import Threshold
from diag.registry import instrument
from diag.result import OUR_CHOICE, Confidence, Level, Precondition
from diag.snapshot.loop.contrast import ContrastFacts, ContrastLook
from diag.snapshot.loop.facts import Loop

SOURCE = "arithmetic of the softmax over similarities: Oord et al. 2018 (arXiv:1807.03748)"
MOST_OF_ROWS = 0.5  # share of rows
NEARLY_ALL_ROWS = 0.99
LOGITS_NEEDED, LOGITS_USABLE = 0.5, 1000.0  # widest range of the logits of embeddings of length one
BY_CHANCE, AT_FIRST = 0.05, 0.025  # beside a half
LATE, ROWS_OF_ENDS = 3, 360  # looks; rows of these looks
STEPS_ALIKE, STEPS_OF_TWO = 100, 1000  # of one network, and of two that must meet first
FEWEST_ANSWERS = 3  # with the right one


@dataclass(frozen=True, kw_only=True, eq=False)
class ContrastiveLoss(LoopCheck):
    """Right answers that cannot be right, or that nothing tells from the wrong ones."""

    cites = SOURCE


@instrument(
    source=SOURCE,
    title="Contrastive loss",
    kind="check",
    why="A contrastive loss falls to some number whatever its pairs are: wrong partners, a softmax that tells "
    "nothing apart and embeddings that may be all alike do not show in it.",
)
def contrastive_loss(
    loop: Loop, *, needed: Threshold = LOGITS_NEEDED, usable: Threshold = LOGITS_USABLE
) -> ContrastiveLoss:
    """Whether a loss that asks for each row's partner among others can be met, and by what.

    loop: the facts of the loop, with the softmax over products of embeddings at backward passes that were looked
    at: which answer of each row is right, which are masked out. Findings, each at all of at least three looks: most
    right answers are masked out; the right answer of each row is the row itself (alarms); each row is among its own
    wrong answers; a row has three answers or fewer; embeddings have the length one and a temperature with which
    their logits span less than `needed`, or more than `usable`. A warning, too, where from the first look to the
    last, past step 100, the right answer is no more like its row than a wrong one (past step 1,000, where the two
    sides have not the same layers). And an alarm where the loss holds nothing but the similarity of outputs of the
    same layers, both with a gradient. Raises nothing of its own.
    """
    facts = loop.contrast
    known = Precondition(
        "a contrastive loss",
        len(facts.looks) > 0 or facts.drawn == facts.read > 0,
        "no softmax over products of embeddings was seen in the loss.",
    )
    looked = len(facts.looks) or facts.drawn
    fine = (
        f"Nothing wrong was seen with the answers that the loss asks for, at {looked:,} backward passes looked at."
    )
    findings = list(_findings(facts, needed, usable))
    return judged(ContrastiveLoss, loop.step, findings, fine, preconditions=(known,))


def _findings(facts: ContrastFacts, needed: float, usable: float) -> Iterator[LoopFinding]:
    looks = facts.looks
    if facts.drawn == facts.read >= THRICE:
        yield _nothing_apart(facts)
    if len(looks) < THRICE:
        return
    if all(look.masked > MOST_OF_ROWS for look in looks):
        yield _masked(looks)
        return
    if all(look.own and look.itself > NEARLY_ALL_ROWS for look in looks):
        yield _itself(looks)
        return
    if all(look.own and look.unit and look.among > NEARLY_ALL_ROWS for look in looks):
        yield _among(looks)
    if all(look.own and look.answers == look.rows and look.free <= FEWEST_ANSWERS for look in looks):
        yield _few(looks)
    if all(look.unit and 2 * look.factor < needed for look in looks):
        yield _even(looks)
    elif all(look.unit and 2 * look.factor > usable for look in looks):
        yield _sharp(looks)
    elif _by_chance(looks):
        yield _unrelated(looks)


def _by_chance(looks: tuple[ContrastLook, ...]) -> bool:
    """Whether right answers are no more like their rows than wrong ones, at the first looks and at the last."""
    after = STEPS_ALIKE if looks[-1].shared is True else STEPS_OF_TWO
    ends = looks[:LATE], looks[-LATE:]
    late = looks[-1].step >= after and len(looks) >= 2 * LATE
    rows = min(sum(look.rows for look in end) for end in ends)
    if not late or rows < ROWS_OF_ENDS:
        return False
    # A rank is even between 0 and 1; both sides of a pair may be counted.
    error = math.sqrt(2 / 12 / rows)
    return _beside_half(ends[0]) < max(AT_FIRST, 2 * error) and _beside_half(ends[1]) < BY_CHANCE


def _beside_half(looks: tuple[ContrastLook, ...]) -> float:
    """How far the mean rank is from a half; infinite where it is not known."""
    ranks = [look.rank for look in looks]
    return math.inf if any(map(math.isnan, ranks)) else abs(sum(ranks) / len(ranks) - 0.5)


def _nothing_apart(facts: ContrastFacts) -> LoopFinding:
    alike = (
        ""
        if math.isnan(facts.alike)
        else f" At the last of them different rows had a mean cosine of {format_number(facts.alike)}."
    )
    return LoopFinding(
        Level.ALARM,
        Cause.NOTHING_KEEPS_APART,
        "The loss asks outputs of the same layers to be alike and nothing else, so that it is smallest where every "
        f"input gives the same output: at all {facts.read:,} backward passes that were looked at it holds the "
        f"similarity of pairs alone, and both sides have a gradient.{alike}",
        "Add what keeps different rows apart (other rows as wrong answers, a variance or decorrelation term), or "
        "detach one side and give the other a predictor of its own.",
        "A term of the loss that grows where all outputs are equal.",
        step=facts.first,
    )


def _masked(looks: tuple[ContrastLook, ...]) -> LoopFinding:
    first = looks[0]
    own = " In a matrix of rows against themselves the diagonal is masked: is the partner's number shifted?"
    return LoopFinding(
        Level.ALARM,
        Cause.ANSWER_MASKED,
        f"The loss asks for answers that are masked out: {format_share(looks[-1].masked)} of the rows' right "
        f"answers have the score of the mask at the last of {len(looks):,} backward passes looked at, and the "
        f"cross-entropy is {format_number(looks[-1].loss)}, whatever the network does.",
        "Compare the numbers of the right answers with the mask, row by row." + own * first.own,
        "A right answer whose score is not that of the mask.",
        step=first.step,
    )


def _itself(looks: tuple[ContrastLook, ...]) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.PAIR_IDENTICAL,
        f"The right answer of each row is the row itself: of {looks[0].rows:,} rows against themselves the loss "
        "asks for the diagonal, which is largest for any network.",
        "Ask for the row of the other view: with both views in one batch of 2 n rows that is row i + n for row i.",
        "A right answer that is another row.",
        step=looks[0].step,
    )


def _among(looks: tuple[ContrastLook, ...]) -> LoopFinding:
    return LoopFinding(
        Level.WARNING,
        Cause.ANSWER_MASKED,
        "Each row is among its own wrong answers, with the largest similarity that there can be: the softmax over "
        f"{looks[0].answers:,} rows does not leave out the diagonal.",
        "Mask the diagonal of the similarities with -inf before the softmax.",
        "A diagonal that is masked before the cross-entropy.",
        step=looks[0].step,
    )


def _few(looks: tuple[ContrastLook, ...]) -> LoopFinding:
    wrong = max(int(looks[0].free) - 1, 0)
    return LoopFinding(
        Level.WARNING,
        Cause.BATCH_TOO_SMALL,
        f"Each row is told from {wrong:,} wrong answer{'s' * (wrong != 1)} only, those of its batch of "
        f"{looks[0].rows:,} rows in all: that is soon done without learning what tells examples apart.",
        "Use a larger batch, or a queue of earlier embeddings.",
        "As good embeddings from a larger batch.",
        step=looks[0].step,
        confidence=Confidence.WEAK_EMPIRICAL,
        threshold_source=OUR_CHOICE,
    )


def _even(looks: tuple[ContrastLook, ...]) -> LoopFinding:
    last = looks[-1]
    least = math.log(last.free) - 2 * last.factor
    temperature = 1 / last.factor if last.factor else math.inf
    return LoopFinding(
        Level.WARNING,
        Cause.TEMPERATURE_WRONG,
        "The softmax over similarities can tell no answer from another: embeddings of length one at a "
        f"temperature of {format_number(temperature)} give logits that span {format_number(2 * last.factor)} at "
        f"most, so that the loss stays between {format_number(math.log(last.free))} (guessing) and "
        f"{format_number(least)} whatever the network does; it is {format_number(last.loss)}.",
        "Use a temperature of 0.05 to 0.5 (divide the similarities by it once).",
        "A smaller temperature learns no better.",
        step=looks[0].step,
        threshold_source=OUR_CHOICE,
    )


def _sharp(looks: tuple[ContrastLook, ...]) -> LoopFinding:
    last = looks[-1]
    return LoopFinding(
        Level.WARNING,
        Cause.TEMPERATURE_WRONG,
        "The softmax over similarities is next to a hard choice: embeddings of length one at a temperature of "
        f"{format_number(1 / last.factor)} give logits that differ by up to {format_number(2 * last.factor)}, so "
        "that only the nearest answer of a row has a gradient.",
        "Use a temperature of 0.05 to 0.5.",
        "A larger temperature learns no better.",
        step=looks[0].step,
        threshold_source=OUR_CHOICE,
    )


def _unrelated(looks: tuple[ContrastLook, ...]) -> LoopFinding:
    first, last = looks[0], looks[-1]
    ranks = [look.rank for look in looks[-LATE:]]
    return LoopFinding(
        Level.WARNING,
        Cause.PAIRS_UNRELATED,
        "The pairs that the loss asks for have nothing in common that the network finds: from step "
        f"{first.step:,} to step {last.step:,} the right answer is as often less like its row than a wrong one as "
        f"more (more like it than {format_share(sum(ranks) / len(ranks))} of the wrong answers; half of them by "
        "chance).",
        "Print a few pairs as the network gets them: are the two sides of one example, in the same order, or does "
        "the augmentation leave nothing of it?",
        "Right answers that are more like their rows than most others.",
        step=first.step,
        confidence=Confidence.STRONG_EMPIRICAL,
        threshold_source=OUR_CHOICE,
    )
