"""At which places of an example targets stand, as plain data: positions of sequences, pixels of masks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class HiddenTokenFacts:
    """Targets that are numbers of tokens, at the places of these tokens, in a loss whose places count alike.

    Of calls in which a chosen few places of a row count (`chosen` in all, for `asked` different tokens): copied,
    those at which the input holds the very token that is asked for. at_place: the largest share that one token has
    of them. mask: a token that is never asked for and stands at most places (at_mask, a share) that lie `away`
    places on from those that count; mask_asked: the share of its own places to which that applies; -1: none.

    Of calls in which all places count (`whole`): changed, those at which the input holds another token than the
    one asked for, changed_to: the one that it mostly is, which is never asked for, -1 where there is none. fill: a
    class that is asked for at a share `filled` of the places, at `filled_elsewhere` of those without the token
    `fill_mask`, and at `filled_at_mask` of those with it, which have `asked_at_mask` different classes; -1: none.
    """

    chosen: int = 0
    copied: int = 0
    asked: int = 0
    at_place: float = 0.0
    mask: int = -1
    away: int = 0
    at_mask: float = 0.0
    mask_asked: float = 0.0
    whole: int = 0
    changed: int = 0
    changed_to: int = -1
    fill: int = -1
    filled: float = 0.0
    fill_mask: int = -1
    filled_elsewhere: float = 0.0
    filled_at_mask: float = 1.0
    asked_at_mask: int = 0


@dataclass(frozen=True)
class SequenceFacts:
    """Tokens and the class numbers that are asked for at their places, in `calls` calls with `places` of them that
    count: what the one says of the other (mutual information, nats, less its bias).

    entropy: of the class numbers. tokens_entropy: of the tokens that say the most. here: what the token at its
    place says of a class; best: the most that another one says, `shift` places on in the input, or counted from the
    other end of the row (reversed). padded: rows that are filled up; opposite: those of them filled at the start by
    the inputs and at the end by the targets, or the other way round. filled: the share of the places that count
    where the row's tokens are one that fills its end, and filled_class the one class that stands at all of them, -1
    where there are several. hidden: what is asked for of the tokens themselves."""

    calls: int = 0
    places: int = 0
    entropy: float = math.nan
    here: float = math.nan
    best: float = math.nan
    tokens_entropy: float = math.nan
    shift: int = 0
    reversed: bool = False
    padded: int = 0
    opposite: int = 0
    filled: float = 0.0
    filled_class: int = -1
    hidden: HiddenTokenFacts = field(default_factory=HiddenTokenFacts)


@dataclass(frozen=True)
class MaskFacts:
    """Masks that are asked for beside images, in the `calls` calls that were looked at last.

    rows: those whose mask is told from its mirror images and from the other rows' masks. as_given: rows for which
    the network's answer is most like their own mask as it stands, turned: for which it is most like their own mask
    turned in this way ("left to right"), each among all masks of the batch in both ways.

    images: calls whose images were compared with their masks without the network. related: the correlation of the
    best of a few local features of the image with the mask where it stands; unrelated: the largest with other
    rows' masks; best: the largest with the row's own mask, turned (`best_turned`, "" for not) and moved by
    `best_shift` pixels (down, to the right), of which each stands for a block of `block` pixels a side."""

    calls: int = 0
    rows: int = 0
    as_given: int = 0
    turned: Mapping[str, int] = field(default_factory=dict)
    images: int = 0
    related: float = math.nan
    unrelated: float = math.nan
    best: float = math.nan
    best_turned: str = ""
    best_shift: tuple[int, int] = (0, 0)
    block: int = 1
