"""The symmetries of any model, found from its data flow and gradients and proved before they are used."""

from __future__ import annotations

from diag.connectivity.symmetries.find import find_symmetries, verify
from diag.connectivity.symmetries.groups import Element, Symmetries, UnitBlock, UnitGroup
from diag.connectivity.symmetries.linear_find import find_linear_symmetries
from diag.connectivity.symmetries.linear_groups import LinearGroup, LinearSymmetries
from diag.snapshot.snapshot import Snapshot

__all__ = [
    "Element",
    "LinearGroup",
    "LinearSymmetries",
    "Symmetries",
    "UnitBlock",
    "UnitGroup",
    "find",
    "find_linear_symmetries",
    "find_symmetries",
    "gauge",
    "groups",
    "linear_groups",
    "linear_symmetries",
    "symmetries",
    "tracing",
    "verify",
]


def symmetries(snapshot: Snapshot) -> Symmetries:
    """The permutation groups of the snapshot's model, traced on its first examples and checked there.

    Raises MissingQuantity without data, and Unsupported where the forward pass fails.
    """
    return find_symmetries(snapshot.model, snapshot.batches[0], seed=snapshot.seed)


def linear_symmetries(snapshot: Snapshot) -> LinearSymmetries:
    """The linear symmetries beyond permutations of the snapshot's model, found on its first examples and checked.

    Raises MissingQuantity without data, and Unsupported where the model does not run in float64 on a copy.
    """
    found = snapshot.quantity("symmetries")
    tick = snapshot.deadline.check
    return find_linear_symmetries(snapshot.model, snapshot.batches[0], found, seed=snapshot.seed, tick=tick)
