"""2-norms of many tensors without waiting for the device.

On the CPU the arithmetic is right to about 1e-6 at any size: a float32 `vector_norm` is off by 4e-4 at ten
million entries, sums over blocks are not. Where the squares leave the range of float32 the numbers are scaled
first. On another device the norms stay there until somebody has time to read them (see `rows`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

BLOCK = 1 << 16
GROUP = 1 << 20
TINY = 1e-14
HALVES = (torch.float16, torch.bfloat16)
PLAIN = (Tensor, nn.Parameter)

Norms = NDArray[numpy.float64] | Tensor


def norms(tensors: Sequence[Tensor]) -> Norms:
    """The 2-norms (len,) of dense, sparse, complex or sharded tensors: a float64 array where the tensors are on
    the CPU, a float32 tensor on their device elsewhere.

    A sharded tensor (DTensor) gives the norm of this process's shard. Tensors of several devices give a
    result on the first one's.
    """
    if all(_is_plain(t) for t in tensors):  # the usual case, at every step
        return _on_host(_of_host(tensors), tensors)
    local = [_dense(t.detach()) for t in tensors]
    device = local[0].device
    if all(t.device == device for t in local):
        values = _of_one_device(local, device)
    else:
        values = [_of_one_device([t], t.device)[0].to(device, non_blocking=True) for t in local]
    return _on_host(values, local) if device.type == "cpu" else torch.stack([v.float() for v in values])


def differences(after: Sequence[Tensor], before: Sequence[Tensor]) -> Norms:
    """The norms of `after - before`, with temporary memory for about a million entries (or one tensor)."""
    parts: list[Any] = []
    group: list[Tensor] = []
    for a, b in zip(after, before, strict=True):
        local = _dense(a.detach())
        # The difference of two half-precision numbers need not be one.
        local = local.float() if local.dtype in HALVES else local
        group.append(local - b.to(local.device, non_blocking=True))
        if sum(t.numel() for t in group) > GROUP:
            parts.append(norms(group))
            group = []
    parts.append(norms(group))
    on_host = [p for p in parts if not isinstance(p, Tensor)]
    return numpy.concatenate(on_host) if len(on_host) == len(parts) else torch.cat([p for p in parts if len(p)])


def copies(tensors: Sequence[Tensor], device: torch.device | None = None) -> list[Tensor]:
    """Copies of the values as they are now, of this process's shard where sharded; on `device` if given."""
    return [_dense(t.detach()).to(device, copy=True) for t in tensors]


def _is_plain(t: Tensor) -> bool:
    dense = t.is_cpu and t.dtype is torch.float32 and t.layout is torch.strided
    return dense and not t.requires_grad and type(t) in PLAIN


def _dense(t: Tensor) -> Tensor:
    if hasattr(t, "to_local"):
        t = t.to_local()
    if t.layout is not torch.strided:
        # Duplicate entries of a sparse gradient add up, so they must be merged before they are squared.
        return t.coalesce().values() if t.layout is torch.sparse_coo else t.to_dense()
    return t


def _on_host(values: Sequence[Tensor], tensors: Sequence[Tensor]) -> NDArray[numpy.float64]:
    if not tensors:
        return numpy.zeros(0)
    result = torch.stack(list(values)).numpy().astype(numpy.float64)
    # In float32 the squares leave its range beyond 1e19 and below 1e-19, where the norm itself does not.
    numbers = result.tolist()
    if not (min(numbers) >= TINY and sum(numbers) < numpy.inf):
        _scale_and_repeat(result, tensors)
    return result


def _of_one_device(tensors: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    kinds = {t.dtype for t in tensors}
    half = not kinds.isdisjoint(HALVES)
    if any(k.is_complex for k in kinds) or (half and len(kinds) > 1):
        return [torch.linalg.vector_norm(t, dtype=torch.float32 if t.dtype in HALVES else None) for t in tensors]
    dtype = torch.float32 if half else None
    if device.type == "cpu":
        return _of_host(tensors, dtype)
    return torch._foreach_norm(list(tensors), 2, dtype=dtype)


def _of_host(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Sequence[Tensor]:
    large = [t.numel() > BLOCK for t in tensors]
    small = [t for t, is_large in zip(tensors, large, strict=True) if not is_large]
    given = torch._foreach_norm(small, 2, dtype=dtype) if small else ()
    if len(small) == len(tensors):
        return given
    rest = iter(given)
    return [_in_blocks(t) if is_large else next(rest) for t, is_large in zip(tensors, large, strict=True)]


def _in_blocks(t: Tensor) -> Tensor:
    blocks = t.reshape(-1).split(BLOCK)
    if t.dtype in HALVES:
        blocks = tuple(b.float() for b in blocks)
    total = torch.stack([torch.dot(b, b) for b in blocks]).double().sum()
    return total.sqrt().to(torch.promote_types(t.dtype, torch.float32))


def _scale_and_repeat(result: NDArray[numpy.float64], tensors: Sequence[Tensor]) -> None:
    for i in numpy.flatnonzero(~((result >= TINY) & (result < numpy.inf))).tolist():
        t = tensors[i]
        if t.numel() and t.dtype in (torch.float32, *HALVES):
            scale = 1e20 if result[i] < TINY else 1e-30
            result[i] = float(_of_one_device([t.float() * scale], t.device)[0]) / scale
