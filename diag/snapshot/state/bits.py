"""What tensors held at one moment, by their bits, so that any later change is seen.

A write through `.data` or NumPy counts no version, statistics move in a forward pass, and averaged weights are put
in the place of others: only the bits show all of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from diag.snapshot.state.tensors import keeper_of, version_of

BYTES_KEPT_WHOLE = 1 << 14  # bytes that are kept as they are
ROW = 1 << 10  # integers of a larger tensor that are summed up

Named = Iterable[tuple[str, Tensor]]


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
        read = version_of if self._kept_by_others else bits_of
        found: dict[str, Any] = {}
        for whose, module in self._modules.items():
            tensors: Named = (*module.named_parameters(), *module.named_buffers())
            found |= {f"{whose} {name}": (t.requires_grad, read(t)) for name, t in tensors}
        return found


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
