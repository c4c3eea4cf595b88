"""2-norms of many tensors without waiting for the device.

On the CPU the arithmetic is right to about 1e-6 at any size: a float32 `vector_norm` is off by 4e-4 at ten
million entries, sums over blocks are not. Where the squares leave the range of float32 the numbers are scaled
first. On another device the norms stay there until they are read (see `rows`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

SMALL_TENSOR = 1 << 13
PUT_TOGETHER, MANY_TENSORS = 1 << 8, 64
NORM_BLOCK = 1 << 17
TINY_SUM = 1e-28  # of a sum of squares
HALF_PRECISION = (torch.float16, torch.bfloat16)
PLAIN_TENSORS = (Tensor, nn.Parameter)

Norms = NDArray[numpy.float64] | Tensor


def norms(tensors: Sequence[Tensor]) -> Norms:
    """The 2-norms (len,) of dense, sparse, complex or sharded tensors: a float64 array where the tensors are on
    the CPU, a float32 tensor on their device elsewhere.

    A sharded tensor (DTensor) gives the norm of this process's shard (see `ranks`). Tensors of several devices
    give a result on the first one's.
    """
    if (plain := _plain_norms(tensors)) is not None:
        return plain
    local = [_dense(t) for t in tensors]
    if all(t.is_cpu for t in local):
        return _norms_on_cpu(local)
    device = local[0].device
    if all(t.device == device for t in local):
        values = _norms_on_device(local)
    else:
        values = [_norms_on_device([t])[0].to(device, non_blocking=True) for t in local]
    return torch.stack([v.float() for v in values])


def differences(after: Sequence[Tensor], before: Sequence[Tensor], scratch: Tensor | None = None) -> Norms:
    """The norms of `after - before`. On the CPU, `scratch` (NORM_BLOCK float32 elements) saves touching new
    memory."""
    local = [_dense(a) for a in after]
    if all(a.is_cpu for a in local):
        return _distances(local, before, scratch)
    # The difference of two half-precision numbers need not be one.
    wide = [a.float() if a.dtype in HALF_PRECISION else a for a in local]
    parts = [norms([a - b.to(a.device, non_blocking=True)]) for a, b in zip(wide, before, strict=True)]
    return torch.cat([torch.as_tensor(p, device=local[0].device) for p in parts])


def copies(tensors: Sequence[Tensor], device: torch.device | None = None) -> list[Tensor]:
    """Copies of the values as they are now, of this process's shard where sharded; on `device` if given."""
    return [_dense(t).to(device, copy=True) for t in tensors]


def _dense(t: Tensor) -> Tensor:
    if t.requires_grad:
        t = t.detach()
    if type(t) not in PLAIN_TENSORS and hasattr(t, "to_local"):
        t = t.to_local()
    if t.layout is not torch.strided:
        # Duplicate entries of a sparse gradient add up, so they must be merged before they are squared.
        return t.coalesce().values() if t.layout is torch.sparse_coo else t.to_dense()
    return t


def _plain_norms(tensors: Sequence[Tensor]) -> NDArray[numpy.float64] | None:
    """Those of a few usual gradients, at every step: dense, in float32 on the CPU, with squares in its range."""
    if len(tensors) >= MANY_TENSORS:
        return None
    squares = []
    for t in tensors:
        if type(t) is not Tensor or t.dtype is not torch.float32 or t.requires_grad or not t.is_cpu:
            return None
        if t.layout is not torch.strided:
            return None
        if t.numel() <= SMALL_TENSOR:
            array = t.numpy()
            square = float(numpy.vdot(array, array))  # as in `_square`, without a call for each
        else:
            square = _square(t)
        if not TINY_SUM <= square < math.inf:
            return None
        squares.append(square)
    return numpy.sqrt(squares)


def _norms_on_cpu(tensors: Sequence[Tensor]) -> NDArray[numpy.float64]:
    """One by one, but for many small ones, which are put together: a call for each would take ten times as long."""
    together = [0 < t.numel() <= PUT_TOGETHER and t.dtype is torch.float32 for t in tensors]
    small = [t.reshape(-1) for t, is_small in zip(tensors, together, strict=True) if is_small]
    if len(small) < MANY_TENSORS:
        return numpy.array([_norm(t) for t in tensors])
    found = numpy.empty(len(tensors))
    found[together] = _norms_of_parts(torch.cat(small), [t.numel() for t in small])
    for i, (t, is_small) in enumerate(zip(tensors, together, strict=True)):
        if not is_small:
            found[i] = _norm(t)
    return found


def _norms_of_parts(flat: Tensor, sizes: Sequence[int]) -> NDArray[numpy.float64]:
    """The norms of the parts of these sizes, one after the other, none of them empty."""
    squares = numpy.square(flat.numpy(), dtype=numpy.float64)
    return numpy.sqrt(numpy.add.reduceat(squares, numpy.cumsum([0, *sizes[:-1]])))


def _norm(t: Tensor) -> float:
    if t.is_complex():
        t = torch.view_as_real(t.resolve_conj())
    square = _square(t)
    if TINY_SUM <= square < math.inf or t.dtype is torch.float64:
        return math.sqrt(square)
    # In float32 the squares leave its range beyond 1e19 and below 1e-19, where the norm itself does not.
    scale = 1e20 if square < TINY_SUM else 1e-30
    return math.sqrt(_square(t.float() * scale)) / scale


def _square(t: Tensor) -> float:
    if t.dtype in HALF_PRECISION:
        t = t.float()
    if t.numel() <= SMALL_TENSOR:  # BLAS uses more than one thread only beyond this
        array = t.numpy()
        return float(numpy.vdot(array, array))  # which says nothing of squares beyond the range
    total = 0.0
    for block in t.reshape(-1).split(NORM_BLOCK):
        total += float(torch.dot(block, block))
    return total


def _distances(after: Sequence[Tensor], before: Sequence[Tensor], scratch: Tensor | None) -> Norms:
    """One by one, but for many small ones, as in `_norms_on_cpu`."""
    pairs = list(zip(after, before, strict=True))
    small = [i for i, (a, b) in enumerate(pairs) if 0 < a.numel() <= PUT_TOGETHER and _are_float32(a, b)]
    if len(small) < MANY_TENSORS:
        return numpy.array([_distance(a, b, scratch) for a, b in pairs])
    now, then = (torch.cat([pairs[i][k].reshape(-1) for i in small]) for k in (0, 1))
    found = numpy.empty(len(pairs))
    found[small] = _norms_of_parts(now - then, [pairs[i][0].numel() for i in small])
    others = numpy.setdiff1d(numpy.arange(len(pairs)), small)
    found[others] = [_distance(pairs[i][0], pairs[i][1], scratch) for i in others.tolist()]
    return found


def _are_float32(a: Tensor, b: Tensor) -> bool:
    return a.dtype is torch.float32 and b.dtype is torch.float32 and a.shape == b.shape and b.is_cpu


def _distance(a: Tensor, b: Tensor, scratch: Tensor | None) -> float:
    # The difference of two half-precision numbers need not be one.
    a, b = (a.float(), b.float()) if a.dtype in HALF_PRECISION else (a, b)
    if a.numel() <= SMALL_TENSOR or scratch is None or a.dtype is not scratch.dtype:
        return _norm(a - b)
    pairs = zip(a.reshape(-1).split(NORM_BLOCK), b.reshape(-1).split(NORM_BLOCK), strict=True)
    blocks = (torch.sub(x, y, out=scratch[: len(x)]) for x, y in pairs)
    square = sum(float(torch.dot(d, d)) for d in blocks)
    return math.sqrt(square) if TINY_SUM <= square < math.inf else _norm(a - b)


def _norms_on_device(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    kinds = {t.dtype for t in tensors}
    half = not kinds.isdisjoint(HALF_PRECISION)
    if any(k.is_complex for k in kinds) or (half and len(kinds) > 1):
        return [
            torch.linalg.vector_norm(t, dtype=torch.float32 if t.dtype in HALF_PRECISION else None) for t in tensors
        ]
    return torch._foreach_norm(list(tensors), 2, dtype=torch.float32 if half else None)
