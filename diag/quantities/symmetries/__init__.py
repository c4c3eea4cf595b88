"""The permutation symmetries of any model, found from its data flow and proved before they are used."""

from diag.quantities.symmetries.find import find_symmetries, verify
from diag.quantities.symmetries.groups import Block, Element, Group, Symmetries

__all__ = ["Block", "Element", "Group", "Symmetries", "find_symmetries", "verify"]
