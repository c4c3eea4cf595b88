"""What a checkpoint file holds, by itself: weights and optimizer states, with no model and no data.

`diag report CKPT...` makes a `Saved` of each file; an instrument asks for it as `saved`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diag.errors import MissingQuantity

if TYPE_CHECKING:
    from diag.snapshot.snapshot import Snapshot

SAVED_ENTRIES_AT_ONCE = 1 << 22  # so that a large file needs little more than its own memory


@dataclass(frozen=True)
class Saved:
    """A checkpoint file.

    name: the file's. state: the weights and buffers by name. shapes: of every tensor in the file that is no part of
    an optimizer's state. optimizers: what `optimizer.state_dict()` gave, by where it stands in the file. previous:
    the state of the file before this one; previous_name: that file's name, empty where there is none.
    """

    name: str
    state: Mapping[str, Any]
    shapes: frozenset[tuple[int, ...]] = frozenset()
    optimizers: Mapping[str, Any] = field(default_factory=dict)
    previous: Mapping[str, Any] | None = None
    previous_name: str = ""

    def weights(self) -> dict[str, Tensor]:
        """The tensors of real floating-point numbers, by name."""
        return numbers_in(self.state)


def numbers_in(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state whose entries are real floating-point numbers that lie in memory as they are."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and _plain(value)}


def _plain(value: Tensor) -> bool:
    if type(value) not in (Tensor, torch.nn.Parameter) or value.is_nested or value.layout is not torch.strided:
        return False
    if value.is_meta or value.is_quantized or not value.is_floating_point() or not value.numel():
        return False
    # A view that repeats its entries may claim more of them than could ever be gone through.
    return value.numel() * value.itemsize <= value.untyped_storage().nbytes()


def entry_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same entries of tensors of one shape, in float64, some million at a time."""
    flat = [t.detach().reshape(-1) for t in tensors]
    for start in range(0, flat[0].numel(), SAVED_ENTRIES_AT_ONCE):
        yield tuple(f[start : start + SAVED_ENTRIES_AT_ONCE].to(torch.float64) for f in flat)


def square_sum(value: Tensor) -> float:
    """The sum of the squared entries, in float64."""
    return sum(float(block.square().sum()) for (block,) in entry_blocks(value))


def saved(snapshot: Snapshot) -> Saved:
    """A checkpoint file; a snapshot is of a model and has none. Raises MissingQuantity."""
    raise MissingQuantity("only diag report FILE looks at checkpoint files by themselves; give it the file.")
