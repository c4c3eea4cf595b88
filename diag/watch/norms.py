"""2-norms of many tensors without waiting for the device.

On the CPU the arithmetic is right to about 1e-6 at any size: a float32 `vector_norm` is off by 4e-4 at ten
million entries, sums over blocks are not. Where the squares leave the range of
float32 the numbers are scaled first.
On another device the norms stay there until somebody has time to read them (see `rows`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 1 << 16
GROUP = 1 << 20
TINY = 1e-14
HALVES = (torch.float16, torch.bfloat16)


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norms of dense, sparse, complex or sharded tensors, float64 (len,) on the CPU, float32 elsewhere.

    A sharded tensor (DTensor) gives the norm of this process's shard. Tensors of several devices give a
    result on the first one's.
    """
    local = [_dense(t.detach()) for t in tensors]
    if not local:
        return torch.zeros(0, dtype=torch.float64)
    device = local[0].device
    if all(t.device == device for t in local):
        values = _of_one_device(local, device)
    else:
        values = [_of_one_device([t], t.device)[0].to(device, non_blocking=True) for t in local]
    if device.type == "cpu":
        return _checked(torch.stack([v.double() for v in values]), local)
    return torch.stack([v.float() for v in values])


def differences(after: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
    """The 2-norms of `after - before`, with temporary memory for about a million entries (or one tensor)."""
    parts, group, size = [], [], 0
    for a, b in zip(after, before, strict=True):
        local = _dense(a.detach())
        # The difference of two half-precision numbers need not be one.
        local = local.float() if local.dtype in HALVES else local
        group.append(local - b.to(local.device, non_blocking=True))
        size += local.numel()
        if size > GROUP:
            parts.append(norms(group))
            group, size = [], 0
    return torch.cat([*parts, norms(group)])


def copies(tensors: Sequence[Tensor], device: torch.device | None = None) -> list[Tensor]:
    """Copies of the values as they are now, of this process's shard where sharded; on `device` if given."""
    return [_dense(t.detach()).to(device, copy=True) for t in tensors]


def _dense(t: Tensor) -> Tensor:
    if hasattr(t, "to_local"):
        t = t.to_local()
    if t.layout is not torch.strided:
        # Duplicate entries of a sparse gradient add up, so they must be merged before they are squared.
        return t.coalesce().values() if t.layout is torch.sparse_coo else t.to_dense()
    return t


def _of_one_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    kinds = {t.dtype for t in tensors}
    half = not kinds.isdisjoint(HALVES)
    if any(k.is_complex for k in kinds) or (half and len(kinds) > 1) or any(t.numel() == 0 for t in tensors):
        return [torch.linalg.vector_norm(t, dtype=torch.float32 if t.dtype in HALVES else None) for t in tensors]
    dtype = torch.float32 if half else None
    if device.type != "cpu":
        return list(torch._foreach_norm(list(tensors), 2, dtype=dtype))
    large = [t.numel() > BLOCK for t in tensors]
    small = [t for t, is_large in zip(tensors, large, strict=True) if not is_large]
    given = iter(torch._foreach_norm(small, 2, dtype=dtype) if small else ())
    return [_in_blocks(t) if is_large else next(given) for t, is_large in zip(tensors, large, strict=True)]


def _in_blocks(t: Tensor) -> Tensor:
    blocks = t.reshape(-1).split(BLOCK)
    if t.dtype in HALVES:
        blocks = tuple(b.float() for b in blocks)
    return torch.stack([torch.dot(b, b) for b in blocks]).double().sum().sqrt()


def _checked(values: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    # In float32 the squares leave its range beyond 1e19 and below 1e-19, where the norm itself does not.
    for i in ((values < TINY) | ~torch.isfinite(values)).nonzero().flatten().tolist():
        t = tensors[i]
        if t.numel() and t.dtype in (torch.float32, *HALVES):
            scale = 1e20 if values[i] < TINY else 1e-30
            values[i] = _of_one_device([t.float() * scale], t.device)[0].double() / scale
    return values
