"""Padding among the targets of sequences: one number that fills the ends of rows and stands nowhere else."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from diag.snapshot.autograd_graph import first_arguments

FEWEST_SEQUENCES, SHORTEST_SEQUENCE = 4, 4  # sequences of a batch, and their length
NODES_TO_OUTPUT = 6


def sequences_of(prediction: Tensor, target: Tensor) -> Tensor | None:
    """Class numbers as (sequences, length), also where the loop gave them in one row as it did the outputs; None
    where they are no sequences, or not on the host."""
    if target.is_floating_point() or not target.is_cpu or target.ndim not in (1, 2):
        return None
    shape = tuple(target.shape) if target.ndim == 2 else before_flattening(prediction, len(target))
    if shape is None or shape[0] < FEWEST_SEQUENCES or shape[1] < SHORTEST_SEQUENCE:
        return None
    return target.detach().reshape(shape)


def before_flattening(prediction: Tensor, rows: int) -> tuple[int, int] | None:
    """(sequences, length) of the outputs that were made one long batch of tokens, read from their graph."""
    for node in first_arguments(prediction.grad_fn, NODES_TO_OUTPUT):
        sizes: Any = getattr(node, "_saved_self_sym_sizes", None)
        if sizes is not None and len(sizes) == 3 and math.prod(sizes[:2]) == rows:
            return int(sizes[0]), int(sizes[1])
    return None
