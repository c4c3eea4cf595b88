"""One number for the bits of a tensor, on its device: equal on two ranks where the tensors are equal, bit for
bit."""

from __future__ import annotations

import torch
from torch import Tensor

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CHECKSUM_BLOCK = 1 << 14
CHECKSUM_ENTRIES = 1 << 20  # entries of a batch's tensor


def checksum_of(tensor: Tensor, limit: int | None = None) -> Tensor:
    """The checksum of this process's part of `tensor`, of its first `limit` entries: int64, without dimensions.

    The entries' bits are summed in blocks, and the blocks with odd weights, in integers that wrap around.
    """
    local = tensor.detach()
    if hasattr(local, "to_local"):
        local = local.to_local()
    if local.is_nested:
        local = local.values()
    if local.layout is not torch.strided:
        local = local.to_dense()
    if local.is_complex():
        local = torch.view_as_real(local.resolve_conj())
    flat = local.contiguous().reshape(-1)[:limit]
    bits = flat.view(torch.uint8) if flat.dtype is torch.bool else flat.view(INTEGERS[flat.element_size()])
    whole = (
        bits[: len(bits) // CHECKSUM_BLOCK * CHECKSUM_BLOCK].reshape(-1, CHECKSUM_BLOCK).sum(1, dtype=torch.int64)
    )
    weights = torch.arange(len(whole), device=whole.device) * 2 + 1
    rest = bits[len(whole) * CHECKSUM_BLOCK :].to(torch.int64)
    places = torch.arange(len(rest), device=rest.device) * 2 + 1
    return (whole * weights).sum() + (rest * places).sum() + flat.numel() * 0x9E3779B9
