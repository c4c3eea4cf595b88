"""The axes of every tensor of a forward pass, as symbols, which the rules of the operations assign.

`diag.connectivity.symmetries.tracing` follows a pass with one of these.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from diag.connectivity.symmetries.axes import AxisAlgebra, AxisFactors, Labels, Mismatch


class Labelling:
    """The labels of every tensor seen, and the layouts (`occurrences`) that limit what may move freely."""

    def __init__(self) -> None:
        self.algebra = AxisAlgebra()
        self.occurrences: list[Labels] = []
        self.used: list[Labels] = []  # operands of an operation on data
        self._labels = WeakIdKeyDictionary()
        self._data = WeakIdKeyDictionary()
        self._data_storages: set[int] = set()

    # ---- labels

    def labels(self, tensor: Tensor) -> Labels:
        """The axes of `tensor`; a tensor of unknown origin is a constant and cannot move."""
        if tensor not in self._labels:
            self._labels[tensor] = tuple(self.algebra.axis(n, "a constant in the code") for n in tensor.shape)
        return self._labels[tensor]

    def label(self, tensor: Tensor, labels: Labels) -> None:
        """Assign the axes of `tensor`."""
        self._labels[tensor] = labels
        self.occurrences.append(labels)

    def is_labelled(self, tensor: Tensor) -> bool:
        """Whether the axes of `tensor` have been assigned."""
        return tensor in self._labels

    def is_data(self, tensor: Tensor) -> bool:
        """Whether `tensor` depends on the inputs."""
        return tensor in self._data or tensor.untyped_storage()._cdata in self._data_storages

    def mark_data(self, tensor: Tensor, in_place: bool = False) -> None:
        """`tensor` depends on the inputs; where it was written in place, so does every view of its storage."""
        self._data[tensor] = True
        if in_place:
            self._data_storages.add(tensor.untyped_storage()._cdata)

    # ---- what the rules use

    def one(self) -> AxisFactors:
        """An axis of size 1 as a symbol, for a concatenation."""
        return (self.algebra.new(1),)

    def occur(self, labels: Labels) -> None:
        """Record a layout that no tensor of the pass has, such as the statistics inside a norm."""
        self.occurrences.append(labels)

    def mixed(self, labels: Labels, dims: Iterable[int]) -> None:
        """Positions along `dims` influence each other: other axes must move alike at all of them."""
        gone = {d % len(labels) for d in dims} if labels else set()
        self.occur(tuple(axis for i, axis in enumerate(labels) if i not in gone))

    def freeze_axes(self, groups: Iterable[Sequence[AxisFactors]], reason: str) -> None:
        """The units along all of these axes cannot move, for this reason."""
        for axes in groups:
            for axis in axes:
                self.algebra.freeze(axis, reason)

    def grouped(self, axis: AxisFactors, groups: int) -> tuple[AxisFactors, AxisFactors] | None:
        """`axis` as (groups, units within a group), or None where blocks are in the way."""
        size = 1
        for symbol in axis:
            size *= symbol.size
        try:
            first, rest = self.algebra.regroup(axis, (groups, size // groups))
        except Mismatch:
            return None
        return first, rest
