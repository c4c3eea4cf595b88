"""Targets that go with the share of each example in the loss of all the data (see `counting`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diag.snapshot.batch import Batch, map_tensors


class Counted(NamedTuple):
    """Targets, and for each example its share (n,) in the loss of all the data; the shares' mean is 1.

    some_empty: whether any example of the data counts nothing at all.
    """

    targets: Any
    shares: Tensor
    some_empty: bool

    def cut_off(self, outputs: Any) -> Any:
        """The outputs, of which no gradient is asked where none of these examples counts: it would be 0 / 0."""
        if not self.some_empty:
            return outputs
        counts = self.shares.sum() > 0
        return map_tensors(lambda t: torch.where(counts, t, t.detach()) if t.is_floating_point() else t, outputs)

    def share_of(self, loss: Tensor) -> Tensor:
        """The loss of these examples times their mean share; 0 where none of them counts."""
        share = self.shares.mean().to(loss.dtype)
        return torch.where(share > 0, loss * share, torch.zeros_like(loss))


def plain_targets(targets: Any) -> Any:
    """The targets without shares."""
    return targets.targets if isinstance(targets, Counted) else targets


def own_shares(batches: Sequence[Batch]) -> Sequence[Batch]:
    """The same examples as data of their own: their shares with mean 1 among themselves."""
    shares = [b.targets.shares for b in batches if isinstance(b.targets, Counted)]
    if not shares:
        return batches
    mean = float(torch.cat(shares).mean())
    return [
        replace(b, targets=b.targets._replace(shares=b.targets.shares / mean)) if mean > 0 else b for b in batches
    ]
