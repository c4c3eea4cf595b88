"""The loss and the error of every example of a data set, for a model that is being overwritten."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from diag.errors import DiagError
from diag.snapshot.forward import look
from diag.snapshot.objective.counting import counted_batches
from diag.snapshot.objective.examples import errors_of, loss_shares
from diag.snapshot.objective.over_ranks import scale_of
from diag.snapshot.objective.shares import plain_targets
from diag.snapshot.snapshot import Snapshot


@dataclass(frozen=True)
class Scores:
    """losses, errors (n,) float64 on the CPU; errors are NaN where there are no class numbers.

    The losses are the examples' shares of the loss, so that their mean is the loss of the data. per_example: False
    where only the loss of each batch is known; it then stands for all its examples.
    """

    losses: Tensor
    errors: Tensor
    per_example: bool

    @property
    def size(self) -> int:
        """How many examples were scored."""
        return len(self.losses)


def score_examples(model: nn.Module, source: Snapshot) -> Scores:
    """One pass of `model` over the data of `source`, with its loss."""
    if source.together is None:
        return _own_scores(model, source)
    scale = scale_of(source, source.together)

    def table() -> Tensor:
        own = _own_scores(model, source)
        return torch.stack([own.losses * scale, own.errors, torch.full_like(own.losses, own.per_example)], 1)

    losses, errors, known = source.all_rows(table, "losses").T
    return Scores(losses, errors, bool(known.all()))


def _own_scores(model: nn.Module, source: Snapshot) -> Scores:
    losses, errors, known = [], [], True
    for batch in counted_batches(source):
        source.deadline.check()
        seen = look(source, model, replace(batch, targets=plain_targets(batch.targets)))
        try:
            values = loss_shares(source, seen, batch)
        except (DiagError, RuntimeError, ValueError):  # a loss that is defined on a whole batch only
            values, known = source.batch_loss(seen.outputs, batch.targets).detach().expand(batch.size), False
        losses.append(values.detach().double().cpu())
        errors.append(errors_of(seen, batch.size).cpu())
    return Scores(torch.cat(losses), torch.cat(errors), known)
