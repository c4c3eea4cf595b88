"""What rounding does to a softmax cross-entropy, example by example.

Everything here is computed block by block over the examples, so that a large vocabulary fits in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diag.linalg.margins import margins
from diag.linalg.reductions import ELEMENTS_AT_ONCE

SIGNIFICAND_BITS = {"bfloat16": 8, "float16": 11, "float32": 24, "float64": 53}


def collapse_margin(dtype: str) -> float:
    """The margin b ln 2 (nats) from which 1 + exp(-m) rounds to 1 in `dtype`, by round-to-nearest-even."""
    return SIGNIFICAND_BITS[dtype] * math.log(2)


def in_blocks(function: Any, *tensors: Tensor | None) -> Tensor:
    """`function` of blocks of rows of the tensors, its results joined along the examples."""
    rows = max(1, ELEMENTS_AT_ONCE // next(t for t in tensors if t is not None).shape[1])
    return torch.cat(list(_blocks(function, rows, tensors)))


def _blocks(function: Any, rows: int, tensors: tuple[Tensor | None, ...]) -> Iterator[Tensor]:
    for start in range(0, len(next(t for t in tensors if t is not None)), rows):
        yield function(*(t if t is None else t[start : start + rows] for t in tensors))


def float64_margins(z: Tensor, y: Tensor) -> Tensor:
    """Log-odds margins (n,) in float64; minus infinity where the label itself is ruled out."""
    m = margins(z.double(), y)
    return torch.where(z.gather(1, y[:, None])[:, 0] == -torch.inf, -torch.inf, m)


EXAMPLE_LOSS, ZERO_LOSS, PAPER, REPOSITORY, ZERO_GRADIENT = range(5)


def counters(z: Tensor, y: Tensor, dtype: str) -> Tensor:
    """For each example, by F.cross_entropy in `dtype`: the loss, and four ways to say that it collapsed."""
    cast = z.detach().to(getattr(torch, dtype))
    losses = F.cross_entropy(cast, y, reduction="none")
    largest = cast.max(1, keepdim=True)
    alone = (cast - largest.values).exp().sum(1) == 1
    columns = [
        losses.double(),
        losses == 0,
        alone & (largest.indices[:, 0] == y),
        alone,
        _gradients(cast, y).gather(1, y[:, None])[:, 0] == 0,
    ]
    counted = torch.stack([c.double() for c in columns], 1)
    # A logit beyond the range of the dtype gives no number there.
    overflow = (cast == torch.inf).any(1, keepdim=True)
    return torch.where(overflow, torch.nan, counted)


def shares_of(counted: Tensor) -> list[float]:
    """The shares of the four counts in the rows of `counters`."""
    return counted[:, ZERO_LOSS:].mean(0).tolist()


def _gradients(z: Tensor, y: Tensor) -> Tensor:
    z = z.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(F.cross_entropy(z, y, reduction="sum"), z)[0]


LABEL_GRADIENT, ROW_SUM, ROW_SIZE, GG, GP, PP = range(6)


def compared_with_exact(z: Tensor, y: Tensor, gradients: Tensor | None) -> Tensor:
    """For each example in float64: its gradient on the label, |sum| and size of the row, and the inner products
    of its wrong-class gradients G and the softmax's own wrong-class probabilities P."""
    g = (_gradients(z, y) if gradients is None else gradients.to(z.device)).double()
    own = F.one_hot(y, z.shape[1]).bool()
    p = z.double().softmax(1).masked_fill(own, 0)
    wrong = g.masked_fill(own, 0)
    columns = [g[own], g.sum(1).abs(), g.abs().sum(1), (wrong**2).sum(1), (wrong * p).sum(1), (p**2).sum(1)]
    return torch.stack(columns, 1)


def class_factors(compared: Tensor, labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """The factor of each example's class in a weighted loss, by least squares G = factor * P; 0 for no loss.

    dtype: of the gradients; where the probabilities may have underflowed in it, the factor is taken to be 1.
    """
    sums = compared.new_zeros(classes, 2).index_add_(0, labels, compared[:, [GP, PP]])
    known = sums[:, 1].sqrt() > underflow_limit(dtype)
    return torch.where(known, sums[:, 0] / sums[:, 1].clamp_min(1e-300), 1.0)[labels]


def distance_from_softmax(compared: Tensor, factor: Tensor, dtype: torch.dtype) -> float:
    """Mean over the examples of |G - factor P| / max(|G|, factor |P|); NaN where all of them may have
    underflowed."""
    gg, gp, pp = compared[:, GG], compared[:, GP], factor**2 * compared[:, PP]
    squared = (gg - 2 * factor * gp + pp).clamp_min(0) / torch.maximum(gg, pp)
    measurable = torch.maximum(gg, pp).sqrt() > underflow_limit(dtype)
    return float(squared[measurable].sqrt().mean())


def underflow_limit(dtype: torch.dtype) -> float:
    """The norm above which a vector of gradients in `dtype` is not just what underflow has left of it."""
    return 1000 * torch.finfo(dtype).tiny
