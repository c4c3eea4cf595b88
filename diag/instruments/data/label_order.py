"""Whether labels come in the order of their classes, so that the first of them say little of the others."""

from __future__ import annotations

from torch import Tensor

FEWEST_LABELS_IN_ORDER = 32
HALFWAY = 0.5


def in_order(labels: Tensor) -> bool:
    """Whether neighbours have the same label far more often than in random order.

    labels (n,). In random order two neighbours agree with the probability sum(p^2) of the class shares p; sorted
    ones nearly always do. In order are labels that agree more than halfway from the one to the other.
    """
    if len(labels) < FEWEST_LABELS_IN_ORDER:
        return False
    shares = labels.unique(return_counts=True)[1].double() / len(labels)
    at_random = float(shares.square().sum())
    agree = float((labels[1:] == labels[:-1]).double().mean())
    return agree - at_random > HALFWAY * (1.0 - at_random)
