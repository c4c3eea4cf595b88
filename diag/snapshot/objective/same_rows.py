"""Find the rows of one matrix among those of another: which outputs of a layer enter the loss, and in what order.

A loss gets rows of a layer's outputs as they are, scaled, through a softmax, without the first or the last position
of each sequence, or picked by a mask.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy
import torch
from torch import Tensor

ROWS_COMPARED = 256  # rows that are compared
COLUMNS_COMPARED = 16  # by which a row is recognised among many
SAME_ROW_WITHIN = 1e-3


def matching_rows(compared: Tensor, outputs: Tensor, changed: bool = False) -> Tensor | None:
    """For each row of `compared` (R, K) the number of the row of `outputs` (..., K) it came from, (R,); None where
    that is not known. changed: whether rows may have been shifted, scaled or normalised on the way.
    """
    rows = outputs.reshape(-1, outputs.shape[-1])
    numbers = torch.arange(len(rows), device=rows.device).view(outputs.shape[:-1])
    candidates = []
    if len(compared) == len(rows):
        candidates.append(numbers)
        if numbers.ndim == 2:
            candidates.append(numbers.T)
    elif numbers.ndim == 2 and len(compared) < len(rows) and len(compared) % len(numbers) == 0:
        length = len(compared) // len(numbers)  # positions of each sequence
        candidates += [numbers[:, :length], numbers[:, numbers.shape[1] - length :]]
    flat = [candidate.reshape(-1) for candidate in candidates]
    exact = next((chosen for chosen in flat if _are_same(compared, rows, chosen, torch.equal)), None)
    exact = _by_value(compared, rows) if exact is None else exact
    if exact is not None or not changed:
        return exact
    return next((chosen for chosen in flat if _are_same(compared, rows, chosen, _alike)), None)


def _are_same(compared: Tensor, rows: Tensor, chosen: Tensor, same: Callable[[Tensor, Tensor], bool]) -> bool:
    if not len(compared):
        return True
    at = _spread(len(compared), ROWS_COMPARED).to(compared.device)
    return same(compared[at].double(), rows[chosen[at]].double())


def _spread(length: int, at_most: int) -> Tensor:
    """Places from 0 to length - 1, evenly spread."""
    return torch.linspace(0, length - 1, min(at_most, length), dtype=torch.float64).round().long()


def _alike(compared: Tensor, found: Tensor) -> bool:
    """Whether the rows are the same but for a shift and a scale, or for a softmax."""
    normal = _normal(found)
    forms = [compared] + ([compared.log()] if bool((compared >= 0).all()) else [])
    return any(
        torch.allclose(_normal(form), normal, rtol=0, atol=SAME_ROW_WITHIN, equal_nan=True) for form in forms
    )


def _normal(rows: Tensor) -> Tensor:
    """Rows without what a shift and a positive scale can change; entries that are not finite are zero."""
    finite = torch.isfinite(rows)
    kept = torch.where(finite, rows, 0)
    centred = torch.where(finite, kept - kept.sum(1, keepdim=True) / finite.sum(1, keepdim=True).clamp_min(1), 0)
    return centred / centred.square().mean(1, keepdim=True).sqrt().clamp_min(1e-300)


def _by_value(compared: Tensor, rows: Tensor) -> Tensor | None:
    """The rows with the same values, each taken as often as it is there."""
    if len(compared) > len(rows):
        return None
    columns = _spread(rows.shape[1], COLUMNS_COMPARED).to(rows.device)
    keys, own = (m[:, columns].double().cpu().numpy() for m in (compared, rows))
    places: dict[bytes, list[int]] = {}
    for number, row in enumerate(own[::-1]):
        places.setdefault(numpy.ascontiguousarray(row).tobytes(), []).append(len(own) - 1 - number)
    found = []
    for row in keys:
        left = places.get(numpy.ascontiguousarray(row).tobytes())
        if not left:
            return None
        found.append(left.pop())
    return torch.tensor(found, dtype=torch.long, device=rows.device)
