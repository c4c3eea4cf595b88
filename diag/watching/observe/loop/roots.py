"""What a backward pass is called on, read from its graph: the mean over a batch, or a fraction of it, and how the
value that a loss function gave enters it.

A loss that is divided by a number of micro-batches carries that factor in all of its terms, so one term that is the
plain mean of something says that the whole was not divided.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from diag.snapshot.autograd_graph import PASSING_ON, first_arguments, kind_of
from diag.watching.observe.loop.formula.parts import MEAN_REDUCTION, parts_of
from diag.watching.observe.terms import Term, product, terms_of

NODES_TO_VALUE = 24  # between the root and what a loss function gave


def undivided(root: Tensor) -> bool | None:
    """Whether a term of the root is a mean over a batch, times one; None where no term's factor is known."""
    known = [f for f in map(_of_mean, terms_of(root, ())) if not math.isnan(f)]
    return any(math.isclose(f, 1.0, rel_tol=1e-6) for f in known) if known else None


def _of_mean(term: Term) -> float:
    """The size of the factor of the mean that this term takes, NaN where it takes none."""
    whole = product(term.factors)
    factor = math.nan if isinstance(whole, Tensor) else abs(whole)
    if term.name == "Mean":
        return factor
    if term.name == "Sum":  # divided by the length of the batch it is a mean over the examples
        sizes = getattr(term.node, "_saved_self_sym_sizes", ())
        return factor * sizes[0] if sizes and math.isclose(factor * sizes[0], 1.0, rel_tol=1e-6) else math.nan
    return factor if getattr(term.node, "_saved_reduction", None) == MEAN_REDUCTION else math.nan


class LossInRoot:
    """How the value that a loss function gave, the graph node `number`, enters the root of a backward pass."""

    def __init__(self, root: Tensor, number: int) -> None:
        self._root, self._number = root, number
        self._parts = parts_of(root, {number})
        self._own = [part for part in self._parts if part.node._sequence_nr() == number]

    @property
    def factor(self) -> float | None:
        """What it was multiplied with where that is all there is and is known; else None."""
        alone = len(self._parts) == len(self._own) == 1 and math.prod(self._own[0].shape) == 1
        return self._own[0].number if alone and not math.isnan(self._own[0].number) else None

    @property
    def ascends(self) -> bool:
        """Whether it is a term with a minus sign in a sum of terms with numbers as factors."""
        return any(not part.factors and part.number < 0 for part in self._own)

    @property
    def is_plain_mean(self) -> bool:
        """Whether the root is the mean of all that the loss function gave, times a number."""
        means = 0
        for node in first_arguments(self._root.grad_fn, NODES_TO_VALUE):
            if node._sequence_nr() == self._number:
                return means == 1
            name = kind_of(node)
            means += name == "Mean"
            if not (name == "Mean" or name in PASSING_ON or _is_multiple(node)):
                return False
        return False


def _is_multiple(node: Any) -> bool:
    other = getattr(node, "_saved_other", None) if kind_of(node) in ("Mul", "Div") else None
    return isinstance(other, (int, float)) or (isinstance(other, Tensor) and other.is_cpu and other.numel() == 1)
