"""Are the tokens that a language model is asked for the next ones, or hidden ones?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diag.display import format_share
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import SOURCE, LoopCheck, LoopFinding, judged
from diag.registry import instrument
from diag.result import Level, Precondition
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.places import HiddenTokenFacts

BATCHES_ALIGNED, ONE_AHEAD = 2, 1
FEWEST_ASKED, FEWEST_KINDS_OF_TOKENS = 300, 6  # places that count, and different tokens that are asked for at them
NEARLY_ALL_COPIED = 0.85  # of the places that count; one in ten of BERT's masked ones keeps its token
HARDLY_ANY_HIDDEN, PLACES_TO_TELL, HIDDEN_TO_TELL = 0.03, 2000, 8  # of all places; places; hidden ones
MASK_ELSEWHERE, MASK_HERE = 0.75, 0.4  # shares of the mask beside the places that count, and of a token at them
MASKS_ASKED = 0.95  # of the masks, beside which something is asked for
MOSTLY_FILL, FILL_ELSEWHERE, FILL_AT_MASK = 0.5, 0.95, 0.05  # shares of the class that fills up


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenTargets(LoopCheck):
    """Targets that are tokens of the input, at another place than the next."""


@instrument(
    source=SOURCE,
    title="Targets of tokens",
    kind="check",
    why="A model whose targets are the tokens that it reads learns to copy, and one whose targets are two "
    "ahead learns another task; the loss curve looks fine in both.",
)
def token_targets(loop: Loop) -> TokenTargets:
    """Which of the input's tokens the targets are, where the model reads sequences of tokens.

    The targets of the first losses are compared with the inputs of the call before, position by position. Where all
    of them are the token one place on, the next one is asked for. Where all are the token at the same place, the
    answer stands in the input, as is meant in an autoencoder only; where they are some other number of places on,
    they are shifted. Where each row of targets is the next tokens of another row, their order was changed alone, an
    alarm. Targets that are not tokens of the input are not judged.

    Of masked language models: a warning each where the input holds the token that is asked for at 85 % of the
    chosen places or more (BERT leaves a tenth), or at 97 % where all places count and one token stands at the rest;
    where the token that hides stands beside the places that count instead of at them; and where one class is asked
    for at nearly all places that are not hidden, which count for half of the loss or more.

    Raises nothing of its own.
    """
    t, hidden = loop.targets, loop.sequences.hidden
    compared_rows = bool(t.shifts) or t.exchanged >= BATCHES_ALIGNED
    seen = compared_rows or max(hidden.chosen, hidden.whole) >= FEWEST_ASKED
    known = Precondition("tokens", seen, "the targets are not tokens of the model's input.")
    ahead, compared = t.shifts.get(ONE_AHEAD, 0), sum(t.shifts.values())
    fine = f"Targets were the token after the one at their place in {ahead:,} of {compared:,} batches of tokens."
    if not compared_rows:
        fine = "The tokens that are asked for are hidden in the input, as far as it was compared."
    findings = list(_findings(loop)) if t.shifts else [_exchanged(loop)] if compared_rows else []
    findings = findings or ([] if ONE_AHEAD in t.shifts else list(_of_hidden(hidden)))
    return judged(TokenTargets, loop.step, findings, fine, preconditions=(known,))


def _exchanged(loop: Loop) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.LABELS_SHUFFLED,
        f"Each row of targets is the next tokens of another row of the input, in {loop.targets.exchanged:,} of the "
        f"{loop.targets.aligned:,} batches that were compared: targets and inputs are not in the same order.",
        "Take inputs and targets from the same rows, and shuffle both with one order or neither.",
        "Rows whose targets are their own next tokens.",
        step=1,
    )


def _findings(loop: Loop) -> Iterator[LoopFinding]:
    t = loop.targets
    if ONE_AHEAD in t.shifts or sum(t.shifts.values()) < BATCHES_ALIGNED:
        return
    shift = max(t.shifts, key=lambda s: t.shifts[s])
    if shift == 0:
        yield LoopFinding(
            Level.WARNING,
            Cause.ANSWER_IN_INPUT,
            f"Each target is the token that the model is given at the same place, in the {t.aligned:,} batches "
            "that were compared: the answer can be copied from the input.",
            "Shift the targets by one: model(tokens[:, :-1]) is asked for tokens[:, 1:]. Of a masked model: put "
            "the mask in at the places that are asked for.",
            "An autoencoder, which is meant to give back its input.",
            step=1,
        )
        return
    where = f"{abs(shift)} places {'on' if shift > 0 else 'back'}" if abs(shift) > 1 else "one place back"
    yield LoopFinding(
        Level.WARNING,
        Cause.TARGETS_SHIFTED,
        f"Each target is the token {where} in the input, not the next one.",
        "Take inputs and targets from one window: tokens[:, :-1] and tokens[:, 1:].",
        f"A model that is meant to tell the token {where}.",
        step=1,
    )


def _of_hidden(h: HiddenTokenFacts) -> Iterator[LoopFinding]:
    if h.chosen >= FEWEST_ASKED and h.asked >= FEWEST_KINDS_OF_TOKENS and h.copied >= NEARLY_ALL_COPIED * h.chosen:
        yield _found(
            Cause.ANSWER_IN_INPUT,
            f"At {format_share(h.copied / h.chosen)} of the {h.chosen:,} places that count the input holds the "
            "very token that is asked for: the answer can be copied.",
            "Put the mask in at the places that are asked for, before the model is called (of BERT's, eight in ten "
            "are masked and one in ten is another token).",
            "A model that is meant to give back some of its input.",
        )
    elif _masks_are_beside(h):
        places = f"{abs(h.away)} places" if abs(h.away) > 1 else "one place"
        where = f"{places} {'after' if h.away > 0 else 'before'}"
        yield _found(
            Cause.TARGETS_SHIFTED,
            f"What is hidden is not what is asked for: {format_share(h.at_mask)} of the places that count have "
            f"token {h.mask}, which is never asked for, {where} them, and {format_share(h.at_place)} at most have "
            "one token at their own place.",
            "Take inputs and targets from one window, and set both at the same places: x[m] = mask and "
            "y[m] = tokens[m].",
            f"A model that is meant to answer beside token {h.mask}.",
        )
    yield from _of_all_places(h)


def _masks_are_beside(h: HiddenTokenFacts) -> bool:
    enough = h.chosen >= FEWEST_ASKED and h.asked >= FEWEST_KINDS_OF_TOKENS
    beside = h.mask >= 0 and h.at_mask >= MASK_ELSEWHERE and h.at_place <= MASK_HERE
    return enough and beside and h.mask_asked >= MASKS_ASKED


def _of_all_places(h: HiddenTokenFacts) -> Iterator[LoopFinding]:
    if h.whole < PLACES_TO_TELL:
        return
    few = HIDDEN_TO_TELL <= h.changed <= HARDLY_ANY_HIDDEN * h.whole
    if few and h.changed_to >= 0:
        yield _found(
            Cause.ANSWER_IN_INPUT,
            f"The loss counts all places, and at {format_share(1 - h.changed / h.whole)} of them the input holds "
            f"the very token that is asked for; token {h.changed_to} hides it at the rest: nearly all of the loss "
            "is copying.",
            "Count the hidden places only (label -100 at the others), and hide more of them: BERT hides 15 %.",
            "A model that is meant to give back its input.",
        )
    elif h.filled >= MOSTLY_FILL and h.asked_at_mask >= FEWEST_KINDS_OF_TOKENS and _fills(h):
        yield _found(
            Cause.IGNORED_LABELS_COUNTED,
            f"Places that nothing is asked of count in the loss: at {format_share(h.filled)} of all the target is "
            f"{h.fill}, at nearly every place whose token is not hidden by token {h.fill_mask}, and hardly ever "
            "where it is.",
            f"Give these places the label -100, or the loss ignore_index={h.fill}.",
            f"A model that is meant to tell hidden tokens from others, by answering {h.fill} to these.",
        )


def _fills(h: HiddenTokenFacts) -> bool:
    return h.filled_elsewhere >= FILL_ELSEWHERE and h.filled_at_mask <= FILL_AT_MASK


def _found(cause: Cause, sentence: str, advice: str, refutation: str) -> LoopFinding:
    return LoopFinding(Level.WARNING, cause, sentence, advice, refutation, step=1)
