"""At which places of an example targets stand, as plain data: positions of sequences, pixels of masks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SequenceFacts:
    """Tokens and the class numbers that are asked for at their places, in `calls` calls with `places` of them that
    count: what the one says of the other (mutual information, nats, less its bias).

    entropy: of the class numbers. tokens_entropy: of the tokens that say the most. here: what the token at its
    place says of a class; best: the most that another one says, `shift` places on in the input, or counted from the
    other end of the row (reversed). padded: rows that are filled up; opposite: those of them filled at the start by
    the inputs and at the end by the targets, or the other way round. filled: the share of the places that count
    where the row's tokens are one that fills its end, and filled_class the one class that stands at all of them, -1
    where there are several."""

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
