"""What rows of inputs and targets say of the order in which they stand: scores of their own order, of others in
their batch, and of the order of the data set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diag.linalg.geometry.pairing import centred, crossing_score, pairing_scores, similarity
from diag.snapshot.loop.paired import PairedFacts
from diag.watching.observe.loop.answers.features import kernel_of, standardised, target_columns
from diag.watching.observe.loop.data.asked import affine_features

ROWS_AT_ONCE, ROWS_TO_CHOOSE = 512, 256  # that are compared; and to choose one of several orders
MOST_OF_A_TABLE, NEXT_ROWS = 64, 6  # numbers of a row; and rows that count as next to one
FEWEST_OF_A_BATCH = 8  # rows
MOVED_BY = (1, -1, 2, -2, 3, -3)  # rows
TURNED_ROUND = 0
SPLITS = (0.25, 0.375, 0.5, 0.625, 0.75)  # of the data set's rows that stand before a split


@dataclass
class PairedRows:
    """Rows of one batch: features (n, d) of each input and whether they are counts, targets (n, ...) side by side
    with them, and their places (n,) in the data set if those are known."""

    features: list[Tensor]
    whole: tuple[bool, ...]
    targets: Tensor
    places: Tensor | None


def paired_facts(
    function: str, number: int, looks: Sequence[PairedRows], before: PairedFacts | None = None
) -> PairedFacts:
    """What the looks at one loss say together; before: what the first of them said."""
    kept = _of_one_form(looks)
    first: list[PairedRows] = []
    rows = 0
    for look in kept:
        if rows < ROWS_AT_ONCE:
            first.append(look)
            rows += len(look.targets)
    if before is None or before.rows != rows:
        before = _in_batches(function, number, first)
    return replace(before, **_in_data(kept))


def _in_batches(function: str, number: int, looks: Sequence[PairedRows]) -> PairedFacts:
    sizes = [len(k.targets) for k in looks]
    features, targets = _together(looks)
    whole = looks[0].whole
    orders = [torch.arange(sum(sizes)), *(_moved(sizes, by) for by in (*MOVED_BY, TURNED_ROUND))]
    columns = target_columns(targets)
    own, *others = pairing_scores(kernel_of(features, whole), columns, orders)
    best = max(range(len(others)), key=lambda i: _or_least(others[i]))
    return PairedFacts(
        function,
        number,
        rows=sum(sizes),
        own=own,
        nearby=_nearby(features, whole, columns),
        moved=others[best],
        by=(*MOVED_BY, TURNED_ROUND)[best],
        plain=whole == (False,),
        table=_is_table(features, targets),
        **_copied(features, targets),
        **_of_numbers(targets),
    )


def _or_least(score: float) -> float:
    return score if score == score else -math.inf


def _copied(features: list[Tensor], targets: Tensor) -> dict[str, Any]:
    """Which feature of the input the targets are an affine function of."""
    rows = features[0]
    if len(features) != 1 or targets.shape[1] != 1:
        return {}
    found = affine_features(rows.double(), targets[:, 0]).tolist()
    return {"copied": min(found, default=-1), "copied_rows": len(rows), "features": rows.shape[1]}


def _of_numbers(targets: Tensor) -> dict[str, Any]:
    if not targets.is_floating_point():
        return {}
    numbers = targets.double()
    size = float(numbers.square().mean().sqrt())
    return {"size": size, "mean": float(numbers.mean()), "deviation": float(numbers.std(correction=0))}


def _is_table(features: list[Tensor], targets: Tensor) -> bool:
    """Whether the rows are those of a table, mostly of numbers with more than two values, as the targets are."""
    rows = features[0]
    several = (((rows != rows.amin(0)) & (rows != rows.amax(0))).any(0)).float().mean()
    one = len(features) == 1 and rows.shape[1] <= MOST_OF_A_TABLE
    return one and targets.is_floating_point() and len(targets.unique()) > 2 and bool(several > 0.5)


def _nearby(features: list[Tensor], whole: tuple[bool, ...], columns: Tensor) -> float:
    """The score of rows that lie next to one another, where the inputs are one table of numbers."""
    if whole != (False,) or features[0].shape[1] > MOST_OF_A_TABLE:
        return math.nan
    rows = standardised(features[0])
    near = centred(similarity(rows, NEXT_ROWS / len(rows)))
    return pairing_scores(near, columns, [torch.arange(len(rows))])[0]


def _of_one_form(looks: Sequence[PairedRows]) -> list[PairedRows]:
    """The looks like the first; sequences of targets filled up to one length."""
    form = looks[0].whole, looks[0].targets.dtype
    kept = [k for k in looks if (k.whole, k.targets.dtype) == form]
    widths = [tuple(f.shape[1] for f in k.features) for k in kept]
    return [k for k, width in zip(kept, widths, strict=True) if width == widths[0]]


def _together(looks: Sequence[PairedRows]) -> tuple[list[Tensor], Tensor]:
    longest = max(k.targets.shape[1] for k in looks)
    targets = [torch.nn.functional.pad(k.targets, (0, longest - k.targets.shape[1])) for k in looks]
    return [torch.cat(column) for column in zip(*(k.features for k in looks), strict=True)], torch.cat(targets)


def _moved(sizes: Sequence[int], by: int) -> Tensor:
    """The order in which each row gets the target of the row `by` further on in its batch (0: from its other
    end)."""
    start, parts = 0, []
    for n in sizes:
        rows = torch.arange(n)
        parts.append(start + (rows.flip(0) if by == TURNED_ROUND else rows.roll(-by)))
        start += n
    return torch.cat(parts)


def _in_data(looks: Sequence[PairedRows]) -> dict[str, Any]:
    """The scores for rows of the data set in its order."""
    placed = [k for k in looks if k.places is not None]
    if not placed:
        return {}
    features, targets = _together(placed)
    places = torch.cat([k.places for k in placed if k.places is not None])
    places, order = _each_once(places)
    features, targets, whole = [f[order] for f in features], targets[order], placed[0].whole
    sides = features, whole, targets, places
    by = max(MOVED_BY, key=lambda by: _or_least(_beside(*sides, by, ROWS_TO_CHOOSE)[2]))
    rows, own, moved = _beside(*sides, by)
    some = torch.linspace(0, len(places) - 1, min(ROWS_AT_ONCE, len(places))).round().long()
    kernel = kernel_of([f[some] for f in features], whole)
    columns = target_columns(targets[some])
    split, across, within = _parts(kernel, columns, places[some])
    return {
        "data_rows": rows,
        "own_in_data": own,
        "in_data": moved,
        "data_by": by,
        "split": split,
        "across": across,
        "within": within,
    }


def _each_once(places: Tensor) -> tuple[Tensor, Tensor]:
    """The places in order, each once, and where the first row of each stands."""
    ordered, at = places.sort(stable=True)
    first = torch.ones(len(ordered), dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return ordered[first], at[first]


def _beside(
    features: list[Tensor],
    whole: tuple[bool, ...],
    targets: Tensor,
    places: Tensor,
    by: int,
    most: int = ROWS_AT_ONCE,
) -> tuple[int, float, float]:
    """Of at most so many of the rows whose neighbour `by` rows on was seen too: how many, the score of their own
    targets, and of the neighbour's."""
    at = torch.searchsorted(places, places + by).clamp(max=len(places) - 1)
    there = (places[at] == places + by).nonzero().flatten()[:ROWS_AT_ONCE]
    there = there[:: math.ceil(len(there) / most) or 1]
    if len(there) < FEWEST_OF_A_BATCH:
        return 0, math.nan, math.nan
    kernel = kernel_of([f[there] for f in features], whole)
    every = target_columns(torch.cat([targets[there], targets[at[there]]]))
    order = [torch.arange(len(there))]
    own, others = every[: len(there)], every[len(there) :]
    return len(there), pairing_scores(kernel, own, order)[0], pairing_scores(kernel, others, order)[0]


def _parts(kernel: Tensor, columns: Tensor, places: Tensor) -> tuple[int, float, float]:
    """Where the data set is split so that its two parts contradict each other most: the place, the score across,
    and the lower of the parts' own."""
    found = []
    for share in SPLITS:
        at = int(share * len(places))
        across = crossing_score(kernel, columns, at)
        own = [
            pairing_scores(centred(kernel[part, part]), columns[part], [torch.arange(len(columns[part]))])[0]
            for part in (slice(at), slice(at, None))
        ]
        if across == across and min(own) == min(own):
            found.append((across, int(places[at]), min(own)))
    across, split, within = min(found, default=(math.nan, 0, math.nan))
    return split, across, within
