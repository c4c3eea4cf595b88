"""Do targets stand at the places of what they belong to: the tags of tokens, the masks of images?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from diag.display import format_number, format_share
from diag.instruments.causes import Cause
from diag.instruments.data.labels_belong import WHAT_ELSE
from diag.instruments.loop.findings import LoopCheck, LoopFinding, judged
from diag.registry import instrument
from diag.result import Confidence, Level, Precondition
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.places import MaskFacts, SequenceFacts

SOURCE = "arithmetic of inputs and targets: mutual information (Miller 1955 for its bias) and correlations"
PLACES_AT_LEAST, ROWS_AT_LEAST = 1000, 24
TIMES_AS_MUCH = 1.5  # what another place says, over what the place itself does
SAYS_SOMETHING = 0.03  # of the classes' entropy: below, a task is not about the token at its place
SAYS_MUCH, SAYS_ALL = 0.3, 0.8  # of the classes' entropy, of the tokens'
MOST_OPPOSITE = 0.9  # of the rows that are filled up
FILLED_UP = 0.3  # of the places that count
ROWS_TURNED = 0.15  # of the rows
ROWS_LEARNED = 0.4  # of the rows that fit one way or another
TURNED_AT_LEAST = 12  # rows
ABOVE_OTHER_WAYS = 5.0  # times as many rows as fit in any other way, as they stand too: then all are turned
UNRELATED_FROM_STEP, UNRELATED_ROWS = 100, 60
NO_MORE_THAN_CHANCE = 0.06  # of the rows; by chance one of all masks of a batch in five ways
LIKE_ELSEWHERE, ABOVE_OTHERS, ABOVE_HERE = 0.2, 2.0, 2.0  # correlation; times others'; times its own place's


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacesMatch(LoopCheck):
    """Targets that stand at other places than what they belong to."""

    cites: ClassVar[str] = SOURCE


@instrument(
    source=SOURCE,
    title="Places of targets",
    kind="check",
    why="Where inputs and targets are moved, turned or filled up without each other, each place is asked for what "
    "belongs to another one: the loss still falls as far as neighbours and habits carry it.",
)
def places_match(loop: Loop) -> PlacesMatch:
    """Whether the targets of sequences and images stand at the places of what they belong to.

    Sequences: tokens of the input with a class number each. What the token at its place says of a class is compared
    with what the tokens up to eight places before and after say, and those at the place counted from the row's
    other end (mutual information). One and a half times as much elsewhere is a warning, unless the token at the
    place says next to nothing (the task is about other places then) or the classes are those tokens themselves
    (tokens to come). Rows that the inputs fill up at one end and the targets at the other are an alarm; tokens that
    fill the ends of rows and count, with one class at all of them, a warning.

    Images: masks of class numbers or of zeros and ones. A warning where the network's answers are most like the
    row's own mask turned, among all masks of a batch as they stand and turned, in 15 % of the rows or more, while
    others fit as they stand; and where a local feature of the images is like the masks turned or moved, twice as
    much as it is where they stand and as it is like other rows' masks. So are masks that are no more like a local
    feature of their images than other rows' masks are, which the network has not learned to tell apart by step 100
    either. Images that are all alike say nothing of their masks and are not judged.

    Raises nothing of its own.
    """
    s, m = loop.sequences, loop.masks
    known = Precondition(
        "places",
        s.places > 0 or s.padded > 0 or m.calls > 0,
        "targets are neither tags of tokens nor masks of images that differ.",
    )
    fine = "The targets stand at the places of what they belong to, as far as it was compared."
    findings = [*_sequences(s), *_answers(m), *_images(m), *_unrelated(loop.step, m)]
    return judged(PlacesMatch, loop.step, findings, fine, preconditions=(known,))


def _sequences(s: SequenceFacts) -> Iterator[LoopFinding]:
    if s.padded >= ROWS_AT_LEAST and s.opposite >= MOST_OPPOSITE * s.padded:
        yield _found(
            Level.ALARM,
            Cause.TARGETS_MISPLACED,
            f"Inputs and targets are filled up at opposite ends: in {s.opposite:,} of {s.padded:,} shorter rows "
            "the padding of the tokens stands where targets count, and the other way round, so that no target "
            "stands at its own token.",
            "Pad inputs and targets on the same side.",
            "A model that moves the tokens to the other end before it answers.",
        )
    elif s.places >= PLACES_AT_LEAST and _elsewhere(s):
        places = f"{abs(s.shift)} place{'s' if abs(s.shift) > 1 else ''}"
        where = f"{places} {'further on' if s.shift > 0 else 'before'}"
        where = "at the same place counted from the other end of the row" if s.reversed else where
        yield _found(
            Level.WARNING,
            Cause.TARGETS_MISPLACED if s.reversed else Cause.TARGETS_SHIFTED,
            f"The targets of sequences seem to be {'in reverse order' if s.reversed else 'shifted'}: the token "
            f"{where} says more of a target than the token at its own place ({format_number(s.best)} against "
            f"{format_number(s.here)} of {format_number(s.entropy)} nats, over {s.places:,} places).",
            "Print one row's tokens beside its targets; take both from one window, in one order.",
            "Targets that are meant to tell of the token there.",
        )
    if s.filled >= FILLED_UP and s.filled_class >= 0 and s.padded == 0:
        yield _found(
            Level.WARNING,
            Cause.IGNORED_LABELS_COUNTED,
            f"Padding counts in the loss: at {format_share(s.filled)} of the places that count the token is the "
            f"one that fills the ends of rows, and the target is {s.filled_class} at all of them.",
            "Give these places the loss's ignore_index.",
            "Ends of rows that are meant to be told from the rest.",
        )


def _elsewhere(s: SequenceFacts) -> bool:
    """Whether another place says much more of a target than its own, which says something too."""
    says_more = s.best >= TIMES_AS_MUCH * s.here and s.best >= SAYS_MUCH * s.entropy
    themselves = s.best >= SAYS_ALL * s.tokens_entropy  # tokens to come, or gone by, under other numbers
    return says_more and s.here >= SAYS_SOMETHING * s.entropy and not themselves


def _answers(m: MaskFacts) -> Iterator[LoopFinding]:
    turned, count = max(m.turned.items(), key=lambda found: found[1], default=("", 0))
    others = [m.as_given, *(number for way, number in m.turned.items() if way != turned)]
    all_of_them = count >= ABOVE_OTHER_WAYS * max(others)
    among = "" if all_of_them else ", in all rows or a part of them"
    learned = all_of_them or m.as_given + count >= ROWS_LEARNED * m.rows
    if m.rows >= ROWS_AT_LEAST and count >= max(TURNED_AT_LEAST, ROWS_TURNED * m.rows) and learned:
        yield _found(
            Level.WARNING,
            Cause.TARGETS_MISPLACED,
            f"Images and masks are turned without each other{among}: in {count:,} of the {m.rows:,} that were "
            f"looked at the network's answer is most like the row's own mask turned {turned}, in {m.as_given:,} "
            "like the mask as it stands.",
            "Look at the order of axes in which images and masks are read."
            if all_of_them
            else "Look at the order of axes in which images and masks are read; draw a random flip or turn once "
            "for an example, and apply it to image and mask alike.",
            "An augmented image that still lies on its mask.",
            explained_by=(Cause.LABELS_SHUFFLED,),
        )


def _images(m: MaskFacts) -> Iterator[LoopFinding]:
    far = max(map(abs, m.best_shift)) > 2 or bool(m.best_turned)
    clear = m.best >= max(LIKE_ELSEWHERE, ABOVE_OTHERS * m.unrelated, ABOVE_HERE * m.related)
    if m.images >= 2 and far and clear:
        how = " and ".join(p for p in (f"turned {m.best_turned}" if m.best_turned else "", _moved(m)) if p)
        yield _found(
            Level.WARNING,
            Cause.TARGETS_MISPLACED,
            f"Masks do not lie on their images: {how}, a mask is {format_number(m.best)} correlated with what its "
            f"image shows, and {format_number(m.related)} as it stands (masks of other images: up to "
            f"{format_number(m.unrelated)}).",
            "Draw some masks over their images as the loop sees them; look at the order of axes and at the "
            "transforms.",
            "Masks that are meant to lie elsewhere.",
        )


def _moved(m: MaskFacts) -> str:
    """By how many of the image's own pixels, and which way, masks lie on their images; empty: as they are."""
    (down, right), about = m.best_shift, "about " if m.block > 1 else ""
    ways = [(down, "down" if down > 0 else "up"), (right, "to the right" if right > 0 else "to the left")]
    parts = [f"{abs(by) * m.block} pixels {way}" for by, way in ways if by]
    return f"moved by {about}{' and '.join(parts)}" if parts else ""


def _unrelated(step: int, m: MaskFacts) -> Iterator[LoopFinding]:
    fitting = max(m.as_given, *m.turned.values(), 0)
    nothing_learned = m.rows >= UNRELATED_ROWS and fitting <= NO_MORE_THAN_CHANCE * m.rows
    if step >= UNRELATED_FROM_STEP and nothing_learned and m.images >= 2 and m.related <= m.unrelated:
        yield _found(
            Level.WARNING,
            Cause.LABELS_SHUFFLED,
            f"Masks do not seem to belong to their images: after {step:,} steps the network's answer is most like "
            f"the row's own mask in {m.as_given:,} of {m.rows:,} rows that were looked at, and what an image shows "
            f"is no more correlated with its own mask (up to {format_number(m.related)}) than with those of other "
            f"images (up to {format_number(m.unrelated)}).",
            "Draw some masks over their images as the loop sees them: one of the two may have been listed, "
            "sorted or shuffled without the other.",
            "A network that learns these masks with more steps.",
            explained_by=WHAT_ELSE,
        )


def _found(
    level: Level,
    cause: Cause,
    sentence: str,
    advice: str,
    refutation: str,
    explained_by: tuple[Cause, ...] = (),
) -> LoopFinding:
    return LoopFinding(
        level,
        cause,
        sentence,
        advice,
        refutation,
        step=1,
        explained_by=explained_by,
        confidence=Confidence.STRONG_EMPIRICAL,
    )
