"""The permutation symmetries of any model, found from its data flow and proved before they are used."""

from __future__ import annotations

from diag.connectivity.symmetries.find import find_symmetries, verify
from diag.connectivity.symmetries.groups import Element, Symmetries, UnitBlock, UnitGroup
from diag.snapshot.snapshot import Snapshot

__all__ = [
    "Element",
    "Symmetries",
    "UnitBlock",
    "UnitGroup",
    "find",
    "find_symmetries",
    "groups",
    "symmetries",
    "tracing",
    "verify",
]


def symmetries(snapshot: Snapshot) -> Symmetries:
    """The permutation groups of the snapshot's model, traced on its first examples and checked there.

    Raises MissingQuantity without data, and Unsupported where the forward pass fails.
    """
    return find_symmetries(snapshot.model, snapshot.batches[0], seed=snapshot.seed)
