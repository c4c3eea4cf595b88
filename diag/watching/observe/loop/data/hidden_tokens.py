"""Masked language models: are the tokens that are asked for hidden in the input, and is nothing else asked for?

Where a few places of a row count, the tokens there are to be hidden by one token, the mask; where all of them
count, what is hidden is to be told from the rest. Shapes: tokens, classes, counts (rows, length).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diag.snapshot.loop.places import HiddenTokenFacts

FEW_COUNT = 0.5  # of the places, at most, where a chosen few count
HIDES_MOST = 0.7  # of the places that count, which one token hides: eight in ten for BERT (Devlin et al. 2019)
FARTHEST_MASK = 8  # places from those that count, at which the mask is looked for
KNOWN_TARGETS = 0.9  # of the targets, which are tokens of the input elsewhere


class TokensAsked(NamedTuple):
    """Tokens and class numbers, both (rows, length), which of the latter count, and how many classes there are."""

    tokens: Tensor
    classes: Tensor
    counts: Tensor
    outputs: int = 0  # 0 where not all places that count do so alike


def hidden_tokens(looks: Sequence[TokensAsked]) -> HiddenTokenFacts:
    """What the looks say together; empty where the classes are not numbers of tokens."""
    vocabulary = [look for look in looks if look.outputs > int(look.tokens.max()) and _are_tokens(look)]
    few = [look for look in vocabulary if 0 < float(look.counts.double().mean()) <= FEW_COUNT]
    whole = [look for look in vocabulary if bool(look.counts.all())]
    mask, away, share, hidden = _mask_beside(few)
    tokens, classes = _all(whole)
    changed = tokens != classes
    one, share_of_one = _most_frequent(tokens[changed])
    return HiddenTokenFacts(
        chosen=sum(int(look.counts.sum()) for look in few),
        copied=sum(int((look.counts & (look.tokens == look.classes)).sum()) for look in few),
        asked=len(torch.cat([look.classes[look.counts] for look in few]).unique()) if few else 0,
        mask=mask,
        away=away,
        at_mask=share,
        mask_asked=hidden,
        at_place=_at_place(few),
        whole=tokens.numel(),
        changed=int(changed.sum()),
        changed_to=one if share_of_one >= HIDES_MOST and not (classes == one).any() else -1,
        **_filled_in(tokens, classes),
    )


def _are_tokens(look: TokensAsked) -> bool:
    """Whether the numbers asked for are ones that stand in the input too, as tokens."""
    asked = look.classes[look.counts].unique()
    return bool(len(asked)) and float(torch.isin(asked, look.tokens.unique()).double().mean()) >= KNOWN_TARGETS


def _all(looks: Sequence[TokensAsked]) -> tuple[Tensor, Tensor]:
    """All tokens and all classes of the looks, each in one row."""
    if not looks:
        return (torch.zeros(0, dtype=torch.int64),) * 2
    return torch.cat([k.tokens.flatten() for k in looks]), torch.cat([k.classes.flatten() for k in looks])


def _most_frequent(tokens: Tensor) -> tuple[int, float]:
    """The most frequent of them and its share; -1 of none."""
    if not tokens.numel():
        return -1, 0.0
    one = int(tokens.mode().values)
    return one, float((tokens == one).double().mean())


def _beside(looks: Sequence[TokensAsked], away: int) -> Tensor:
    """The tokens that stand so many places on from those that count."""
    found = []
    for look in looks:
        moved, there = _moved(look.counts, away)
        found.append(look.tokens[moved & there])
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)


def _moved(places: Tensor, away: int) -> tuple[Tensor, Tensor]:
    """Marked places, each so many places on in its row, and where in a row they can come to stand."""
    at = torch.arange(places.shape[1])
    there = (at - away >= 0) & (at - away < places.shape[1])
    return places.roll(away, 1), there.expand_as(places)


def _mask_beside(looks: Sequence[TokensAsked]) -> tuple[int, int, float, float]:
    """The token that stands at most of the places so many places on from those that count, which is never asked
    for; how many places on; its share there; and the share of its own places from which that many places back one
    counts. -1 where it stands at their own, or there is none."""
    found = [(_most_frequent(_beside(looks, s)), s) for s in range(-FARTHEST_MASK, FARTHEST_MASK + 1)]
    (mask, share), away = max(found, key=lambda one: one[0][1])
    targets = torch.cat([k.classes[k.counts] for k in looks]) if looks else torch.zeros(0)
    if not looks or not away or share < HIDES_MOST or bool((targets == mask).any()):
        return -1, 0, 0.0, 0.0
    hidden = asked = 0
    for look in looks:
        moved, there = _moved(look.counts, away)
        masked = (look.tokens == mask) & there
        hidden, asked = hidden + int(masked.sum()), asked + int((masked & moved).sum())
    return mask, away, share, asked / max(hidden, 1)


def _at_place(looks: Sequence[TokensAsked]) -> float:
    """The largest share that one token has of the places that count."""
    return _most_frequent(_beside(looks, 0))[1]


def _filled_in(tokens: Tensor, classes: Tensor) -> dict[str, Any]:
    """Where all places count: one class that is asked for wherever the input does not hold the mask, told by what
    is asked for where it does."""
    fill, share = _most_frequent(classes)
    elsewhere = classes != fill
    mask, hides = _most_frequent(tokens[elsewhere])
    others = tokens != mask
    if hides < HIDES_MOST or mask == fill or bool((classes[~others] == mask).any()) or not others.any():
        return {}
    return {
        "fill": fill,
        "filled": share,
        "fill_mask": mask,
        "filled_elsewhere": float((classes[others] == fill).double().mean()),
        "filled_at_mask": float((classes[~others] == fill).double().mean()),
        "asked_at_mask": len(classes[~others].unique()),
    }
