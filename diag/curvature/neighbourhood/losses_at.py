"""The loss of every example at other parameters than the model's own, and the way down from there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diag.distributed.together import Together
from diag.errors import Unsupported
from diag.snapshot.batch import COUPLED_EXAMPLES, Batch
from diag.snapshot.call_at import call_at
from diag.snapshot.example_losses import example_losses
from diag.snapshot.forward import look_at
from diag.snapshot.objective.counting import counted_batches, refuse_coupled
from diag.snapshot.objective.examples import loss_as_seen, shares_from_rows
from diag.snapshot.objective.loss_spy import LossSpy
from diag.snapshot.objective.over_ranks import scale_of
from diag.snapshot.objective.shares import own_shares, plain_targets
from diag.snapshot.parameters import FlatLayout, flat_of, loss_at, params
from diag.snapshot.picking import partitioned
from diag.snapshot.preserve import preserved
from diag.snapshot.snapshot import Snapshot


class LossesAt:
    """Per-example losses as a function of the trainable parameters, on the snapshot's data.

    Each is the example's share of the loss, so that their mean is the loss of all the data. `center`: the model's
    own parameters, flat (P,), in `named_parameters()` order.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._batches: Sequence[Batch] = snapshot.cuttable(counted_batches(snapshot))
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
            group._batches = own_shares(batches)
            yield group

    def all_rows(self, compute: Callable[[], Tensor]) -> Tensor:
        """The rows (k, ...) that `compute()` gives; of all ranks where they share the data."""
        return compute()

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
                snapshot.deadline.check()
                spy = LossSpy()
                with spy:
                    outputs = call_at(snapshot.model, values, batch.args, batch.kwargs)
                with torch.no_grad():
                    found.append(self._losses(outputs, batch, spy).double().cpu())
                if total is not None:
                    loss = snapshot.batch_loss(outputs, batch.targets) * (batch.size / self.num_examples)
                    parts = torch.autograd.grad(loss, list(values.values()), allow_unused=True)
                    total += self._layout.flatten(parts, total)
        return torch.cat(found), total

    def _losses(self, outputs: Any, batch: Batch, spy: LossSpy) -> Tensor:
        snapshot = self._snapshot
        seen = look_at(snapshot, outputs, plain_targets(batch.targets), spy, tries=False)
        values = shares_from_rows(seen, batch)
        if values is None:
            values = example_losses(loss_as_seen(snapshot), outputs, batch.targets, batch.size)
        return values

    def check(self) -> None:
        """Raises Unsupported where the mean of the losses is not the loss of the data."""
        if any(batch.coupled and not batch.why for batch in self._batches):
            raise Unsupported(COUPLED_EXAMPLES)
        with preserved(self._snapshot.model):
            whole = loss_at(self._snapshot)(self._values)
        refuse_coupled(whole, self(self.center), self._snapshot.model)


class LossesOverRanks(LossesAt):
    """The same of all ranks' examples, each rank having all parameters: those of rank 0, then of the others.

    Every rank asks at the same points in the same order and gets the same numbers, so that all take the same
    decisions. Groups are of one rank's own examples, and what is found of them is put together.
    """

    def __init__(self, snapshot: Snapshot, together: Together) -> None:
        self._together, self._scale, self._all = together, scale_of(snapshot, together), snapshot.all_examples
        super().__init__(snapshot)

    @property
    def num_examples(self) -> int:
        """The number of losses, of all ranks."""
        return self._all

    def groups(self, size: int, seed: int = 0) -> Iterator[LossesAt]:
        """Random groups of this rank's examples, for it alone to measure."""
        return LossesAt(self._snapshot).groups(size, seed)

    def all_rows(self, compute: Callable[[], Tensor]) -> Tensor:
        """The rows (k, ...) that `compute()` gives on each rank."""
        return self._together.rows(compute, "losses of groups")

    def __call__(self, point: Tensor) -> Tensor:
        """(n,) float64: the losses at the flat parameters `point` (P,)."""
        own = super().__call__
        return self._together.rows(lambda: own(point) * self._scale, "losses")

    def step(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """The losses (n,) float64 at `point` and the gradient (P,) of their mean."""
        own, found = super().step, []

        def gradient() -> Tensor:
            losses, slope = own(point)
            found.append(losses * self._scale)
            return slope.double() * self._scale

        total = self._together.sum(gradient, self.center.double())
        return self._together.rows(lambda: found[0], "losses"), total.to(self.center.dtype)


def losses_at(snapshot: Snapshot) -> LossesAt:
    """Per-example losses as a function of the parameters.

    Raises MissingQuantity without a loss_fn, data or trainable parameters; InvalidInput where the model or the
    loss cannot be called on the data; Unsupported where the examples have no losses of their own.
    """
    together = snapshot.together
    found = LossesAt(snapshot) if together is None else LossesOverRanks(snapshot, together)
    found.check()
    return found
