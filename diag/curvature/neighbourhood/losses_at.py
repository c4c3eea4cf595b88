"""The loss of every example at other parameters than the model's own, and the way down from there."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from diag.snapshot.batch import Batch
from diag.snapshot.call_at import call_at
from diag.snapshot.example_losses import example_losses
from diag.snapshot.parameters import FlatLayout, flat_of, params
from diag.snapshot.picking import partitioned
from diag.snapshot.preserve import preserved
from diag.snapshot.snapshot import Snapshot


class LossesAt:
    """Per-example losses as a function of the trainable parameters, on the snapshot's data.

    `center`: the model's own parameters, flat (P,), in `named_parameters()` order.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._batches: Sequence[Batch] = snapshot.batches
        self._values = params(snapshot)
        self._layout = FlatLayout.of({name: v.shape for name, v in self._values.items()})
        self.center = flat_of(self._values.values())

    @property
    def num_examples(self) -> int:
        """The number of losses."""
        return sum(batch.size for batch in self._batches)

    def groups(self, size: int, seed: int = 0) -> Iterator[LossesAt]:
        """The same on disjoint random groups of `size` examples each; the last may be smaller."""
        for batches in partitioned(self._batches, size, seed):
            group = copy.copy(self)  # the centre is shared
            group._batches = batches
            yield group

    def __call__(self, point: Tensor) -> Tensor:
        """(n,) float64: the losses at the flat parameters `point` (P,)."""
        with torch.no_grad():
            return self._measure(self._layout.named_views(point), gradient=False)[0]

    def step(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """The losses (n,) float64 at `point` and the gradient (P,) of their mean."""
        values = {name: v.detach().requires_grad_() for name, v in self._layout.named_views(point).items()}
        with torch.enable_grad():
            losses, gradient = self._measure(values, gradient=True)
        assert gradient is not None
        return losses, gradient

    def _measure(self, values: Mapping[str, Tensor], gradient: bool) -> tuple[Tensor, Tensor | None]:
        snapshot, found = self._snapshot, []
        total = torch.zeros_like(self.center) if gradient else None
        with preserved(snapshot.model):
            for batch in self._batches:
                outputs = call_at(snapshot.model, values, batch.args, batch.kwargs)
                with torch.no_grad():
                    found.append(example_losses(snapshot.batch_loss, outputs, batch.targets, batch.size).double())
                if total is not None:
                    loss = snapshot.batch_loss(outputs, batch.targets) * (batch.size / self.num_examples)
                    parts = torch.autograd.grad(loss, list(values.values()), allow_unused=True)
                    total += self._layout.flatten(parts, total)
        return torch.cat(found).cpu(), total


def losses_at(snapshot: Snapshot) -> LossesAt:
    """Per-example losses as a function of the parameters.

    Raises MissingQuantity without a loss_fn, data or trainable parameters; InvalidInput where the model or the
    loss cannot be called on the data.
    """
    found = LossesAt(snapshot)
    found(found.center)
    return found
