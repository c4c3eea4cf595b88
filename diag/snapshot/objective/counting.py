"""How much each example counts in a loss: by the labels it has that are not ignored, by their weights.

A mean over tokens is not the mean of the sequences' means, and a mean with class weights is not that of the
examples' losses. With c_i what example i counts, the loss of all the data is sum_i c_i l_i / sum_i c_i, l_i its
loss alone, whatever batches it is computed in. It is written as the mean over the examples of s_i l_i with the
shares s_i = n c_i / sum c, which go with the targets of each batch. Where all examples count alike, nothing is
changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diag.errors import DiagError, InvalidInput, Unsupported
from diag.snapshot.batch import COUPLED, COUPLED_EXAMPLES, Batch, map_tensors, tensors_in
from diag.snapshot.explain import CALL_ERRORS
from diag.snapshot.forward import Looked, forward_pass, look, look_at
from diag.snapshot.objective.comparison import Comparison, is_whole
from diag.snapshot.objective.coupling import ADDS_UP, couples_within
from diag.snapshot.objective.loss_spy import BY_BATCH
from diag.snapshot.objective.own_loss import is_models_own
from diag.snapshot.objective.shares import Counted
from diag.snapshot.objective.trying import joined_rows, tried_counts
from diag.snapshot.preserve import preserved
from diag.snapshot.snapshot import Snapshot
from diag.snapshot.state.python import renew

EQUAL_COUNTS_WITHIN = 1e-4  # relative: counts that differ by no more are taken to be equal
MICRO_BATCH = (
    f"{COUPLED}, so what it is depends on the batches; leave out micro_batch=, and give the data in the batches "
    "that are meant."
)


def counted_batches(snapshot: Snapshot) -> tuple[Batch, ...]:
    """The snapshot's batches to take the loss of: with each example its share, where they do not all count alike.

    The mean of `batch_loss` over them, by their sizes, is the loss of all the data, however it is cut.
    """
    return snapshot.once("counted batches", lambda: _counted(snapshot))


def _counted(snapshot: Snapshot) -> tuple[Batch, ...]:
    counts = example_counts(snapshot)
    tied = any(batch.why for batch in snapshot.batches)  # which micro_batch= has left whole
    if not tied and _couples(snapshot, counts):
        if snapshot.cut.part is not None and snapshot.micro_batch is not None:
            raise Unsupported(MICRO_BATCH)
        return tuple(replace(batch, coupled=True) for batch in snapshot.batches)
    if counts is None:
        return snapshot.batches
    total = sum(float(c.sum()) for c in counts)
    shares = [c * (snapshot.num_examples / total) for c in counts]
    empty = bool((torch.cat(shares) == 0).any())
    rows = zip(snapshot.batches, shares, strict=True)
    return tuple(replace(batch, targets=Counted(batch.targets, s, empty)) for batch, s in rows)


def example_counts(snapshot: Snapshot) -> list[Tensor] | None:
    """c_i of each example, one float64 tensor (n_b,) a batch; None where all count alike.

    Examples of a loss that couples them count alike, so that batches weigh by their sizes.
    """
    looked, batches = forward_pass(snapshot).looked, snapshot.batches
    if looked[0].value is None:
        return None
    factor = float(getattr(snapshot.loss_fn, "factor", 1.0))
    counts = [_counts(seen, batch, factor) for seen, batch in zip(looked, batches, strict=True)]
    known = [c for c in counts if c is not None]
    if len(known) < len(counts):
        known = _found_by_trying(snapshot) or []
    if not known or not float(torch.cat(known).sum()) > 0:
        return None
    every = torch.cat(known)
    alike = bool(((every - every[0]).abs() <= EQUAL_COUNTS_WITHIN * every[0].abs()).all())
    return None if alike else known


def refuse_coupled(whole: float, losses: Tensor, model: nn.Module | None = None) -> None:
    """Raises Unsupported where the examples' own losses (with their shares) do not make up the loss of them all.

    model: what they were computed by, in the precision of its parameters.
    """
    mean, size = float(losses.double().mean()), float(losses.double().abs().mean())
    kinds = [losses.dtype, *(p.dtype for p in model.parameters())] if model is not None else [losses.dtype]
    coarsest = max(torch.finfo(kind).eps for kind in kinds if kind.is_floating_point)
    within = max(10 * ADDS_UP, 8 * coarsest)
    if abs(mean - whole) > within * max(size, abs(whole)):
        raise Unsupported(COUPLED_EXAMPLES)


def _couples(snapshot: Snapshot, counts: list[Tensor] | None) -> bool:
    """Whether the loss of a batch is not made up by those of its parts."""
    looked, batches = forward_pass(snapshot).looked, snapshot.batches
    if looked[0].value is None:
        return False
    own = snapshot.loss_fn is None or is_models_own(snapshot.loss_fn)
    # Where layers are gathered one at a time, a pass of the model waits for the other ranks.
    if snapshot.layers is None and couples_within(snapshot, counts, uncut=own or not _is_known(looked[0])):
        return True
    if own and (len(batches) == 1 or _is_of_rows(looked[0])):
        return False  # a model's own loss can only be cut by calling the model again
    ones = [torch.ones(b.size, dtype=torch.float64) for b in batches]
    return not _adds_up(snapshot, looked, batches, ones if counts is None else counts)


def _is_of_rows(seen: Looked) -> bool:
    """Whether the loss compares rows with classes, of which there are not as many as rows."""
    found = seen.comparison
    return isinstance(found, Comparison) and found.exact and found.logits.shape[1] not in (len(found.labels), 1)


# ---- what a call of a loss function shows


def _counts(seen: Looked, batch: Batch, factor: float) -> Tensor | None:
    """What each example of one batch counts, where the loss is a call's mean; None where that does not tell."""
    found = seen.comparison
    if isinstance(found, Comparison) and found.exact and found.weights is not None:
        return by_example(found.weights, batch.size)
    if isinstance(found, Comparison) or len(seen.calls) != 1 or not seen.calls[0].is_mean:
        return None
    call = seen.calls[0]
    if not is_whole(call, seen.value, factor):
        return None
    if call.name in BY_BATCH or call.settings.get("reduction") == "batchmean":
        return torch.ones(batch.size, dtype=torch.float64)
    elements = call.input.numel()  # of which each example has as many
    return torch.full((batch.size,), elements / batch.size, dtype=torch.float64)


def by_example(rows: Tensor, size: int) -> Tensor | None:
    """Sums (n,) over each example's rows, which follow one another; None where the rows cannot be dealt out."""
    if len(rows) % size:
        return None
    return rows.double().reshape(size, -1).sum(1).cpu()


def _adds_up(
    snapshot: Snapshot, looked: tuple[Looked, ...], batches: tuple[Batch, ...], counts: Sequence[Tensor]
) -> bool:
    """Whether each batch that can be cut has the loss that its two parts make up.

    Of a loss function of torch that is known to be one, one batch shows it for all.
    """
    rows = [row for row in zip(looked, batches, counts, strict=True) if row[1].size > 1]
    if all(_is_known(seen) for seen in looked):
        rows = rows[:1]
    # A loss that keeps something between calls gives the same value only once that is put back.
    return all(any(_made_up(snapshot, *row, renewed) for renewed in (False, True)) for row in rows)


def _is_known(seen: Looked) -> bool:
    return isinstance(seen.comparison, Comparison) and seen.comparison.exact


def _made_up(snapshot: Snapshot, seen: Looked, batch: Batch, counts: Tensor, renewed: bool) -> bool:
    parts = _parts(snapshot, seen, batch, renewed)
    if parts is None or seen.value is None:
        return False
    k = batch.size // 2
    weights = torch.stack([counts[:k].sum(), counts[k:].sum()])
    values = torch.tensor(parts, dtype=torch.float64)
    made = float((torch.where(weights > 0, values, 0) * weights).sum() / weights.sum())
    whole, size = float(seen.value.double().mean()), float(values.abs().nan_to_num().max())
    within = max(ADDS_UP, 8 * torch.finfo(seen.value.dtype).eps) * max(abs(whole), size)
    is_sum = abs(sum(parts) - whole) <= within  # which is said elsewhere
    return abs(made - whole) <= within or is_sum


def _parts(snapshot: Snapshot, seen: Looked, batch: Batch, renewed: bool) -> tuple[float, float] | None:
    """The losses of the first and the second half of a batch; None where it cannot be cut."""
    k = batch.size // 2
    halves = [batch.slice(0, k), batch.slice(k, batch.size)]
    values = []
    with preserved(snapshot.model), torch.no_grad():
        for half, cut in zip(halves, (slice(0, k), slice(k, None)), strict=True):
            try:
                found = _loss_of_part(snapshot, seen, half, cut, batch.size, renewed)
            except (DiagError, *CALL_ERRORS):
                return None
            if found is None:
                return None
            values.append(float(found.double().mean()))
    return values[0], values[1]


def _loss_of_part(
    snapshot: Snapshot, seen: Looked, part: Batch, rows: slice, size: int, renewed: bool
) -> Tensor | None:
    """The loss of some rows of a batch of this size."""
    own = snapshot.loss_fn is None or is_models_own(snapshot.loss_fn)
    if own or _holds_more_than_rows(seen.outputs, size):
        return look(snapshot, snapshot.model, part).value
    if renewed:
        renew(snapshot.model)
    return look_at(snapshot, _cut(seen.outputs, rows, size), part.targets, tries=False).value


def _holds_more_than_rows(outputs: Any, size: int) -> bool:
    """Whether something besides the rows is given back, as a penalty that the model computes over the batch."""
    by_row = [bool(t.ndim) and t.shape[0] == size for t in tensors_in(outputs) if t.is_floating_point()]
    return any(by_row) and not all(by_row)


def _cut(outputs: Any, rows: slice, size: int) -> Any:
    return map_tensors(lambda t: t[rows] if t.ndim and t.shape[0] == size else t, outputs)


# ---- by trying


def _found_by_trying(snapshot: Snapshot) -> list[Tensor] | None:
    """What each example counts in a loss of which no call of torch tells it; None where it couples the examples."""
    looked, batches = forward_pass(snapshot).looked, snapshot.batches
    ones = [torch.ones(b.size, dtype=torch.float64) for b in batches]
    if snapshot.loss_fn is None or is_models_own(snapshot.loss_fn):
        return ones if len(batches) > 1 and _adds_up(snapshot, looked, batches, ones) else None
    rows = [(seen.outputs, batch) for seen, batch in zip(looked, batches, strict=True)]
    try:
        joined = tried_counts(snapshot.batch_loss, [joined_rows(rows)])
        return None if joined is None else list(joined[0].split([b.size for b in batches]))
    except InvalidInput:  # batches of several shapes: counts are known within a batch, not between batches
        found = tried_counts(snapshot.batch_loss, rows)
        alike = found is not None and all(bool((c - c[0]).abs().max() <= EQUAL_COUNTS_WITHIN) for c in found)
        return ones if alike else None
