"""Rows of attention scores as numbers: tensors in, tensors out, in float64.

A row is what one query says to its keys before the softmax; a score of -inf is a key that it may not see, and so
is one that a large negative number was added to (-1e4, -1e9, the least of the dtype). Rows that see fewer than two
keys choose nothing and are left out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# What is known of a row, in the order of the columns that `row_statistics` gives.
ENTROPY, WEIGHT, LOGIT, SPREAD, GAP, MARGIN, KEYS = range(7)


# A mask that is added: at least so low, as far below the other scores, and so many times what these differ among
# each other; conventions begin at -1e4.
MASKED, TIMES = -5e3, 10.0


def row_statistics(scores: Tensor) -> Tensor:
    """What the softmax makes of each row: (heads, rows, 7) float64 from scores (examples, heads, queries, keys).

    Columns: entropy of the weights over the log of the number of keys seen; largest weight; largest score in
    absolute value; standard deviation of the scores; gap between the largest score and the next; log-odds margin of
    the largest, s_1 - logsumexp of the others; keys seen. All but the third are blind to a constant added to a row.
    A row with fewer than two keys to see, or with scores that are not numbers, is NaN.
    """
    s = without_masked(scores.double().transpose(0, 1).flatten(1, 2))
    seen = ~torch.isneginf(s)
    keys = seen.sum(-1)
    known = (keys > 1) & ~(torch.isnan(s) | torch.isposinf(s)).any(-1)
    s = torch.where(known[..., None], s, torch.arange(s.shape[-1], dtype=s.dtype, device=s.device))
    seen = seen | ~known[..., None]
    top = s.topk(2, dim=-1)
    log_weights = s.log_softmax(-1)
    entropy = -torch.where(seen, log_weights.exp() * log_weights, 0.0).sum(-1)
    others = s.scatter(-1, top.indices[..., :1], -torch.inf)
    visible = torch.where(seen, s, 0.0)
    mean = visible.sum(-1) / keys
    variance = torch.where(seen, (s - mean[..., None]).square(), 0.0).sum(-1) / keys
    columns = [
        entropy / keys.double().log(),
        log_weights.amax(-1).exp(),
        visible.abs().amax(-1),
        variance.sqrt(),
        top.values[..., 0] - top.values[..., 1],
        top.values[..., 0] - others.logsumexp(-1),
        keys.double(),
    ]
    return torch.where(known[..., None], torch.stack(columns, -1), math.nan)


def without_masked(s: Tensor) -> Tensor:
    """The rows (..., keys) with -inf where a mask was added: the scores below a gap that no score would make."""
    if not bool((s <= MASKED).any()) or s.shape[-1] < 2:
        return s
    ordered = s.sort(dim=-1).values
    finite = torch.where(torch.isfinite(ordered), ordered, math.nan)
    gaps = (finite[..., 1:] - finite[..., :-1]).nan_to_num(0.0)
    gap, at = gaps.max(-1, keepdim=True)
    below, above = ordered.gather(-1, at), ordered.gather(-1, at + 1)
    least, most = finite.nan_to_num(torch.inf).amin(-1, keepdim=True), ordered[..., -1:]
    apart = torch.maximum(most - above, below - least) * TIMES < gap
    masked = apart & (below <= MASKED) & (gap >= -MASKED)
    return torch.where(masked & (s <= below), -torch.inf, s)


def product_norm(query: Tensor | None, key: Tensor | None) -> float:
    """|W_Q^T W_K| (Frobenius) of weights (head size, width), by their Gram matrices; NaN without them."""
    if query is None or key is None or query.shape != key.shape:
        return math.nan
    q, k = query.detach().double(), key.detach().double()
    return float(((q @ q.T) * (k @ k.T)).sum().clamp_min(0).sqrt())
