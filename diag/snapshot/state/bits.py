"""What tensors held at one moment, by their bits, so that any later change is seen.

A write through `.data` or NumPy counts no version, statistics move in a forward pass, and averaged weights are put
in the place of others: only the bits show all of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diag.snapshot.state.tensors import keeper_of, version_of

BYTES_KEPT_WHOLE = 1 << 14  # bytes that are kept as they are
ROW = 1 << 10  # integers of a larger tensor that are summed up
MANY_SMALL = (
    64  # small tensors, from which on they are read together: one by one each takes as long as a thousand numbers
)
JOINED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32)


class TensorBits:
    """The bits of a model's tensors, and of its loss function's where that has any."""

    def __init__(self, model: nn.Module, loss_fn: Any = None) -> None:
        self._modules = {"the model's": model}
        if isinstance(loss_fn, nn.Module):
            self._modules["the loss function's"] = loss_fn
        self._kept_by_others = keeper_of(model) != ""  # who put the tensors in place and take them out again
        self._seen = self._read()

    def changed(self) -> str:
        """The first tensor that is not as it was, or is no longer there, by name; "" where all are."""
        now = self._read()
        if now == self._seen:
            return ""
        return next(n for n in dict.fromkeys([*self._seen, *now]) if self._seen.get(n) != now.get(n))

    @property
    def digest(self) -> str:
        """One hash of all, equal for equal bits in another process, too."""
        return hashlib.blake2b(repr(sorted(self._seen.items())).encode(), digest_size=12).hexdigest()

    def _read(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for whose, module in self._modules.items():
            named = [*module.named_parameters(), *module.named_buffers()]
            tensors = [t for _, t in named]
            bits = [version_of(t) for t in tensors] if self._kept_by_others else bits_of_all(tensors)
            found |= {f"{whose} {n}": (t.requires_grad, b) for (n, t), b in zip(named, bits, strict=True)}
        return found


def bits_of_all(tensors: Sequence[Tensor]) -> list[Any]:
    """`bits_of` each; many small ones in the host's memory are read together."""
    small: dict[torch.dtype, list[int]] = {}
    for i, t in enumerate(tensors):
        plain = type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.layout is torch.strided
        if plain and t.dtype in JOINED_DTYPES and 0 < t.numel() * t.itemsize <= BYTES_KEPT_WHOLE:
            small.setdefault(t.dtype, []).append(i)
    found: list[Any] = [None] * len(tensors)
    for dtype, places in small.items():
        if len(places) < MANY_SMALL:
            continue
        with torch.no_grad():
            flat = torch.cat([tensors[i].reshape(-1) for i in places])
        raw, at, name = flat.view(torch.uint8).numpy().tobytes(), 0, str(dtype)
        for i in places:
            end = at + tensors[i].numel() * dtype.itemsize
            found[i], at = (tuple(tensors[i].shape), name, raw[at:end]), end
    return [bits_of(t) if f is None else f for f, t in zip(found, tensors, strict=True)]


def bits_of(tensor: Tensor) -> Any:
    """What tells a tensor's values from others: they themselves, or sums of a large one's bits by row and
    column."""
    with torch.no_grad():
        try:
            raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            if raw.numel() <= BYTES_KEPT_WHOLE:
                return tuple(tensor.shape), str(tensor.dtype), raw.cpu().numpy().tobytes()
            return tuple(tensor.shape), str(tensor.dtype), *_sums(raw)
        except (RuntimeError, NotImplementedError, TypeError, ValueError):  # sparse, meta, sharded, without a shape
            return version_of(tensor)


def _sums(raw: Tensor) -> tuple[bytes, ...]:
    """A change of one value moves a row's sum and a column's; integers wrap and lose nothing."""
    raw = raw.clone() if raw.storage_offset() % 8 else raw
    whole = raw.numel() // (8 * ROW) * 8 * ROW
    rows = raw[:whole].view(torch.int64).view(-1, ROW)
    parts = (rows.sum(0), rows.sum(1), raw[whole:])
    return tuple(part.cpu().numpy().tobytes() for part in parts)
