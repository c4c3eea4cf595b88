"""Whether a model's output at a position depends on later positions of its input, tried on a few rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diag.errors import DiagError, MissingQuantity
from diag.snapshot.batch import Batch, map_tensors, tensors_in
from diag.snapshot.explain import CALL_ERRORS, explained
from diag.snapshot.objective.comparison import output_tensor
from diag.snapshot.preserve import preserved, seed_generators
from diag.snapshot.snapshot import Snapshot

ROWS_TRIED, SHORTEST = 8, 4
CANDIDATES = 3  # inputs that may be the tokens
MIXING_ROWS = (nn.modules.batchnorm._BatchNorm,)  # in training mode, in their statistics


@dataclass(frozen=True)
class LaterTokens:
    """What the first half of the output became when the second half of the tokens was that of other rows.

    change: the largest change, over the standard deviation of those outputs. positions: the length of the
    sequences. rows: how many were tried. in_training: the same change in training mode, with equal random numbers;
    NaN where that was not tried, or other things than the tokens change the outputs there.
    """

    change: float
    positions: int
    rows: int
    in_training: float = math.nan


def later_tokens(snapshot: Snapshot) -> LaterTokens:
    """Replace later tokens of a few rows and see what becomes of the outputs before them, in evaluation mode.

    The last integer tensor (rows, positions) among the inputs on which the output depends is taken for the tokens
    that are predicted: a decoder has the source before them, and labels may come after them. Raises MissingQuantity
    for a model that reads no tokens, or whose output has no axis of their positions.
    """
    (first,) = snapshot.cuttable(snapshot.batches[:1])
    rows = first.few(ROWS_TRIED)
    found = [*_sequences(rows.args), *_sequences(rows.kwargs)]
    if not found or rows.size < 2:
        raise MissingQuantity(f"the model reads no sequences of {SHORTEST} tokens or more.")
    with torch.no_grad():
        tried = ((_changed(snapshot, rows, tokens), tokens) for tokens in reversed(found[-CANDIDATES:]))
        last = next(tried)
        (earlier, positions, _), tokens = last if last[0][2] else next((t for t in tried if t[0][2]), last)
        return LaterTokens(earlier, positions, rows.size, _in_training(snapshot, rows, tokens))


def _in_training(snapshot: Snapshot, rows: Batch, tokens: Tensor) -> float:
    """What changes in training mode: a mask may be made in evaluation alone."""
    if any(isinstance(m, MIXING_ROWS) for m in snapshot.model.modules()):
        return math.nan  # rows see each other's tokens in the statistics
    try:
        with preserved(snapshot.model, mode="train"):
            outputs = [_output(snapshot, rows) for _ in range(2)]
        return _changed(snapshot, rows, tokens, "train")[0] if torch.equal(*outputs) else math.nan
    except (DiagError, *CALL_ERRORS):
        return math.nan


def _changed(snapshot: Snapshot, rows: Batch, tokens: Tensor, mode: str = "eval") -> tuple[float, int, bool]:
    """What changed in the first half of the output, how many positions there are, and whether anything did.

    In training mode one row alone is changed and looked at, the first: rows may see each other there, as those
    that share the capacity of an expert do.
    """
    some = 1 if mode == "train" else len(tokens)
    changed = map_tensors(lambda t: _mixed(t, some) if t is tokens else t, (rows.args, rows.kwargs))
    other = replace(rows, args=changed[0], kwargs=changed[1])
    snapshot.deadline.check()
    try:
        with preserved(snapshot.model, mode=mode):
            before, after = (_output(snapshot, b) for b in (rows, other))
    except CALL_ERRORS as error:
        raise explained(snapshot.model, snapshot.batches, error) from error
    half = tokens.shape[1] // 2
    axis = next((a for a in range(1, before.ndim) if before.shape[a] == tokens.shape[1]), None)
    if axis is None or before.ndim < 3 or before.shape != after.shape:
        raise MissingQuantity("the model's output has no axis of the tokens' positions.")
    anything = not torch.equal(before, after)
    before, after = (t[:some].narrow(axis, 0, half).double() for t in (before, after))
    finite = before.isfinite() & after.isfinite()  # of a row that may look at nothing, attention gives NaN
    if not finite.any():
        raise MissingQuantity("the model's outputs are not finite.")
    before, after = before[finite], after[finite]
    spread = float(before.std())
    change = float((after - before).abs().max())
    return change / spread if spread > 0 else change, tokens.shape[1], anything


def _output(snapshot: Snapshot, rows: Batch) -> Tensor:
    """The model's output, with the same random numbers at each call."""
    seed_generators(snapshot.seed)
    return output_tensor(rows.forward(snapshot.model))


def _sequences(value: Any) -> Iterator[Tensor]:
    for t in tensors_in(value):
        if t.ndim == 2 and t.shape[1] >= SHORTEST and t.dtype in (torch.int64, torch.int32):
            yield t


def _mixed(tokens: Tensor, some: int) -> Tensor:
    """Each of the first rows takes its second half from the next one."""
    half = tokens.shape[1] // 2
    later = torch.cat([tokens.roll(-1, 0)[:some, half:], tokens[some:, half:]])
    return torch.cat([tokens[:, :half], later], 1)
