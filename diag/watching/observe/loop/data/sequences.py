"""Tokens of the input and the class numbers asked for at their places: do they stand beside what they belong to?

What a token says of the class at its own place is compared with what the tokens before and after it say, and those
at the same place counted from the other end. A few calls are looked at, on the host.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diag.snapshot.batch import tensors_in
from diag.snapshot.loop.data import OF_LOG_PROBABILITIES
from diag.snapshot.loop.places import SequenceFacts
from diag.snapshot.objective.comparison import IGNORED_LABEL
from diag.snapshot.objective.loss_spy import input_and_target
from diag.watching.observe.loop.data.hidden_tokens import TokensAsked, hidden_tokens
from diag.watching.observe.loop.data.padding import sequences_of
from diag.watching.observe.loop.moment import Moment, due

CALLS_COMPARED, PLACES_KEPT = 8, 1 << 14  # calls that are kept, then ever fewer; and places in all
COMPARED_NEWS = (4, 6, 8)
PLACES_AWAY = 8  # places
MOST_KINDS = 512  # tokens, and classes, that are told apart
FEWEST_KINDS = 4  # of tokens: fewer are a mask
WHOLE_ROWS = 0.9  # of the places up to the last that counts


class _Shared(NamedTuple):
    """Entropies of classes and tokens, and their mutual information, in nats."""

    classes: float
    tokens: float
    shared: float


class Sequences:
    """Follows the inputs of training calls and the class numbers of their losses."""

    def __init__(self, moment: Moment) -> None:
        self._moment = moment
        self._calls = self._kept = 0
        self._inputs: list[Tensor] = []
        self._looks: list[TokensAsked] = []
        self._facts: SequenceFacts | None = SequenceFacts()

    def training_call(self, args: Any, kwargs: Mapping[str, Any]) -> None:
        """The model was called in training."""
        self._calls += 1
        self._inputs = []
        if self._kept < PLACES_KEPT and (self._calls <= CALLS_COMPARED or due(self._calls)):
            self._inputs = [t.detach() for t in tensors_in((args, dict(kwargs))) if t.ndim == 2 and t.is_cpu]

    def loss_called(self, name: str, args: Any, kwargs: Mapping[str, Any]) -> None:
        """A loss function of torch returned a value that has a graph."""
        if not self._inputs or name not in OF_LOG_PROBABILITIES:
            return
        prediction, target = input_and_target(args, kwargs)
        if not isinstance(prediction, Tensor) or not isinstance(target, Tensor):
            return
        classes = sequences_of(prediction, target)
        inputs, self._inputs = self._inputs, []
        if classes is None:
            return
        tokens = [t for t in inputs if _is_tokens(t, classes)]
        if len(tokens) == 1:
            ignored = kwargs.get("ignore_index")
            counts = classes != (ignored if isinstance(ignored, int) else IGNORED_LABEL)
            plain = kwargs.get("reduction", "mean") != "none" and kwargs.get("weight") is None and len(args) < 3
            outputs = prediction.shape[1] if plain else 0
            self._looks.append(TokensAsked(tokens[0].clone(), classes.clone(), counts, outputs))
            self._kept, self._facts = self._kept + classes.numel(), None
            if len(self._looks) in COMPARED_NEWS:
                self._moment.news(("places", len(self._looks)), "sequences")

    def facts(self) -> SequenceFacts:
        """As plain data."""
        if self._facts is None:
            self._facts = facts_of(self._looks)
        return self._facts


def _is_tokens(t: Tensor, classes: Tensor) -> bool:
    """Whether they are sequences of token numbers, one a class, and neither a mask, the classes nor positions."""
    whole = t.dtype in (torch.int64, torch.int32) and t.shape == classes.shape
    if not whole or torch.equal(t.long(), classes.long()) or bool((t == t[:1]).all()):
        return False
    return len(t.unique()) >= FEWEST_KINDS


def facts_of(looks: list[TokensAsked]) -> SequenceFacts:
    """What the looks say together."""
    hidden = hidden_tokens(looks)
    looks = [look for look in looks if len(look.tokens.unique()) <= MOST_KINDS]
    kept = [look for look in looks if _whole(look.counts)]
    places = sum(int(look.counts.sum()) for look in kept)
    if not places:
        return SequenceFacts(hidden=hidden)
    own = _information(kept, 0, False)
    others = [(_information(kept, s, False), s, False) for s in range(-PLACES_AWAY, PLACES_AWAY + 1) if s]
    others.append((_information(kept, 0, True), 0, True))
    best, shift, backwards = max(others, key=lambda found: found[0].shared)
    by_chance = max(_information([_other_rows(k) for k in kept], shift, backwards).shared, 0.0)
    padded, opposite = (sum(n) for n in zip(*(_opposite(look) for look in looks), strict=True))
    filled, filled_class = _filled(looks)
    return SequenceFacts(
        calls=len(kept),
        places=places,
        entropy=own.classes,
        here=own.shared,
        best=best.shared - by_chance,
        tokens_entropy=best.tokens,
        shift=shift,
        reversed=backwards,
        padded=padded,
        opposite=opposite,
        filled=filled,
        filled_class=filled_class,
        hidden=hidden,
    )


def _whole(counts: Tensor) -> bool:
    """Whether all places of a row count but those that fill it up, and not a chosen few."""
    last = (counts.flip(1).long().cumsum(1) > 0).flip(1)
    first = counts.long().cumsum(1) > 0
    inside = int((last & first).sum())
    return inside > 0 and int(counts.sum()) >= WHOLE_ROWS * inside


def _information(looks: list[TokensAsked], shift: int, backwards: bool) -> _Shared:
    """What the tokens so many places on say of the classes, where both stand."""
    tokens, classes = (torch.cat(side) for side in zip(*(_pairs(k, shift, backwards) for k in looks), strict=True))
    if not len(classes):
        return _Shared(math.nan, math.nan, -math.inf)
    t, c = (side.unique(return_inverse=True)[1] for side in (tokens, classes))
    if int(c.max()) >= MOST_KINDS:
        return _Shared(math.nan, math.nan, -math.inf)
    table = torch.bincount(t * (int(c.max()) + 1) + c).double()
    cells = [table, torch.bincount(t).double(), torch.bincount(c).double()]
    joint, of_tokens, of_classes = (_entropy(x) for x in cells)
    used = [int((x > 0).sum()) for x in cells]
    bias = (used[0] - used[1] - used[2] + 1) / (2 * len(classes))  # Miller 1955
    return _Shared(of_classes, of_tokens, of_tokens + of_classes - joint - bias)


def _other_rows(look: TokensAsked) -> TokensAsked:
    """Each row's tokens with the classes of the row before: what these share is chance, or of the place alone."""
    if len(look.classes) < 2:
        return look._replace(counts=torch.zeros_like(look.counts))
    return look._replace(classes=look.classes.roll(1, 0), counts=look.counts & look.counts.roll(1, 0))


def _pairs(look: TokensAsked, shift: int, backwards: bool) -> tuple[Tensor, Tensor]:
    """The classes that count, and the token that stands `shift` places on from each, or at its place counted from
    the other end of what counts in the row."""
    n, length = look.classes.shape
    at = torch.arange(length).expand(n, length)
    if backwards:
        first = look.counts.long().argmax(1, keepdim=True)
        last = length - 1 - look.counts.flip(1).long().argmax(1, keepdim=True)
        at = first + last - at
    at = at + shift
    there = look.counts & (at >= 0) & (at < length)
    inside = there & look.counts.gather(1, at.clamp(0, length - 1))  # a token that no class is asked for fills up
    return look.tokens.gather(1, at.clamp(0, length - 1))[inside], look.classes[inside]


def _entropy(counts: Tensor) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log()).sum())


def _ends(filled: Tensor) -> tuple[Tensor, Tensor]:
    """How many places of each row in a row, from the start and from the end, are so."""
    return filled.long().cumprod(1).sum(1), filled.flip(1).long().cumprod(1).sum(1)


def _opposite(look: TokensAsked) -> tuple[int, int]:
    """How many rows are filled up, and how many of them at one end by the tokens and at the other by the
    classes."""
    starts, ends = _ends(~look.counts)
    rows = (starts + ends > 0) & (starts + ends < look.counts.shape[1]) & ((starts == 0) | (ends == 0))
    tokens = look.tokens
    from_start, _ = _ends(tokens == tokens[:, :1])
    _, from_end = _ends(tokens == tokens[:, -1:])
    other_side = torch.where(ends > 0, from_start == ends, from_end == starts)
    value = torch.where(ends > 0, tokens[:, 0], tokens[:, -1])
    found = rows & other_side
    one_filler = len(value[found].unique()) == 1
    return int(rows.sum()), int(found.sum()) if one_filler else 0


def _filled(looks: list[TokensAsked]) -> tuple[float, int]:
    """The share of the places that count whose token fills the end of its row, and the class that is asked for at
    all of them, -1 where there are several or none."""
    tokens = [look.tokens for look in looks]
    fillers = {int(t[:, -1].mode().values) for t in tokens}
    if len(fillers) != 1:
        return 0.0, -1
    filler = fillers.pop()
    counted = filled = 0
    classes: set[int] = set()
    for look in looks:
        _, ends = _ends(look.tokens == filler)
        at = torch.arange(look.tokens.shape[1])
        end = at >= look.tokens.shape[1] - ends[:, None]
        if int((look.tokens == filler).sum()) != int(end.sum()) or len(ends.unique()) < 2:
            return 0.0, -1  # it stands for something, or all rows have one length
        counted, filled = counted + int(look.counts.sum()), filled + int((end & look.counts).sum())
        classes |= set(look.classes[end & look.counts].unique().tolist())
    return filled / max(counted, 1), classes.pop() if len(classes) == 1 else -1
