"""What a tensor in a recorded call stands for: a parameter, some of its elements, or a function of parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

# Functions that only rearrange elements: applied to a tensor of positions they tell where each came from.
_VIEWS = {
    *("t", "T", "mT", "transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims"),
    *("view", "view_as", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "clone"),
    *("__getitem__", "select", "narrow", "chunk", "split", "tensor_split", "unbind", "diagonal"),
}
ArgumentPlace = tuple[Any, ...]  # of an argument: (position or keyword,) or (position or keyword, index in a list)


@dataclass(eq=False)
class Source:
    """What a tracked tensor stands for.

    A parameter itself: `names` holds its name. A rearrangement of one parameter: `positions` gives each
    element's flat position in it, when called, since they take more memory than it does. Any other function of
    parameters: `edge` is its place in the graph, through which gradients are pulled back. `made_by` are the indices
    of the recorded calls that made it.
    """

    names: tuple[str, ...]
    shape: torch.Size
    positions: Callable[[], Tensor] | None = None
    edge: GradientEdge | None = None
    made_by: frozenset[int] = frozenset()


def rearranged(
    name: str, func: Any, args: Any, kwargs: Any, slots: dict[ArgumentPlace, Source]
) -> Callable[[], Any] | None:
    """Gives the same rearrangement of flat positions; None where this is none, or the source is none itself."""
    source = slots.get((0,))
    lookup = name == "embedding" and (len(args) < 3 or args[2] < 0)  # rows of a table by constant numbers
    if source is None or len(slots) > 1 or source.edge is not None or not (lookup or name in _VIEWS):
        return None
    device, rest = args[0].device, args[1:]
    # Indices are kept as they are: the graph holds them too, and refuses to go on where they have been overwritten.

    def positions() -> Any:
        if source.positions is None:
            flat = torch.arange(source.shape.numel(), device=device).view(source.shape)
        else:
            flat = source.positions()
        return flat[rest[0]] if lookup else func(flat, *rest, **kwargs)

    return cache(positions)


def item(several: Callable[[], Any], i: int) -> Tensor:
    """One output of a function that gives several."""
    return several()[i]
