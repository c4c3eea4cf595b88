"""Whether the examples of a forward pass differ at all, for checks of what depends on the example."""

from __future__ import annotations

from typing import Any

from diag.result import Precondition
from diag.snapshot.batch import tensors_in


def rows_differ(inputs: Any) -> Precondition:
    """That two of the examples have different inputs, as far as that is known.

    Where they have not, as where all of them are the first state of a game, every network answers them alike.
    """
    rows = [t.detach() for t in tensors_in(inputs) if t.ndim and len(t) > 1 and t.numel()]
    differ = not rows or any(bool((t != t[:1]).any()) for t in rows)
    return Precondition("examples that differ", differ, "all examples that were looked at have the same inputs.")
