"""Linear assignment: the permutation that pairs rows with columns at the highest total score."""

from __future__ import annotations

import torch
from torch import Tensor

from diag.errors import InvalidInput


def best_assignment(scores: Tensor) -> Tensor:
    """For each row, the column assigned to it, at the highest total score.

    scores: (..., n, n) floating; entry [i, j] is the gain of pairing row i with column j.
    Returns integer indices (..., n) on the CPU: a permutation in each batch entry. Among equal totals the
    solver's choice is deterministic. Raises InvalidInput where scores are not square or not finite.
    Solver: scipy.optimize.linear_sum_assignment (Crouse 2016, the shortest augmenting path method, O(n^3)).
    """
    from scipy.optimize import linear_sum_assignment

    if scores.ndim < 2 or scores.shape[-1] != scores.shape[-2]:
        raise InvalidInput(f"The scores have shape {tuple(scores.shape)}; expected square matrices (..., n, n).")
    values = scores.detach().cpu().numpy()
    if not bool(torch.isfinite(scores).all()):
        raise InvalidInput("The scores of an assignment hold NaN or infinity; check the weights for such values.")
    flat = values.reshape(-1, *values.shape[-2:])
    columns = [torch.from_numpy(linear_sum_assignment(matrix, maximize=True)[1]) for matrix in flat]
    n = scores.shape[-1]
    return torch.stack(columns).reshape(scores.shape[:-1]) if columns else torch.zeros(0, n, dtype=torch.long)
