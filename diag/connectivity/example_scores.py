"""The loss and the error of every example of a data set, for a model that is being overwritten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diag.errors import DiagError
from diag.snapshot.batch import Batch
from diag.snapshot.example_losses import example_losses
from diag.snapshot.forward import IGNORED_LABEL, output_tensor
from diag.snapshot.snapshot import Snapshot


@dataclass(frozen=True)
class Scores:
    """losses, errors (n,) float64 on the CPU; errors are NaN where targets are no class numbers.

    per_example: False where only the mean loss of each batch is known; it then stands for all its examples.
    """

    losses: Tensor
    errors: Tensor
    per_example: bool

    @property
    def size(self) -> int:
        return len(self.losses)


def score_examples(model: nn.Module, source: Snapshot) -> Scores:
    """One pass of `model` over the data of `source`, with its loss."""
    losses, errors, known = [], [], True
    for batch in source.batches:
        source.deadline.check()
        outputs = batch.forward(model)
        values, each = _losses(source, outputs, batch)
        known = known and each
        losses.append(values.detach().double().cpu())
        # A model with a loss of its own may shift its labels: which answer is right is then not known here.
        errors.append(_errors(outputs, batch, shifted=source.loss_fn is None).cpu())
    return Scores(torch.cat(losses), torch.cat(errors), known)


def _losses(source: Snapshot, outputs: Any, batch: Batch) -> tuple[Tensor, bool]:
    known = _cross_entropies(source.loss_fn, outputs, batch.targets)
    if known is not None:
        return known, True
    if source.loss_fn is not None:
        try:
            return example_losses(source.batch_loss, outputs, batch.targets, batch.size), True
        except (DiagError, RuntimeError, ValueError):
            pass  # a loss that is defined on a whole batch only
    return source.batch_loss(outputs, batch.targets).detach().expand(batch.size), False


def _cross_entropies(loss_fn: Any, outputs: Any, targets: Any) -> Tensor | None:
    """The commonest loss without the detour of one call an example; None for any other."""
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or not isinstance(targets, Tensor) or targets.ndim != 1:
        return None
    settings: dict[str, Any] = {}
    if type(loss_fn) is nn.CrossEntropyLoss and loss_fn.weight is None and loss_fn.reduction == "mean":
        settings = {"ignore_index": loss_fn.ignore_index, "label_smoothing": loss_fn.label_smoothing}
    elif loss_fn is not F.cross_entropy:
        return None
    if bool((targets == settings.get("ignore_index", IGNORED_LABEL)).any()):
        return None
    return F.cross_entropy(outputs, targets, reduction="none", **settings)


def _errors(outputs: Any, batch: Batch, shifted: bool) -> Tensor:
    """The share of wrong answers in each example (one answer, or one a position)."""
    targets, z = batch.targets, _logits(outputs)
    classes = isinstance(targets, Tensor) and not targets.is_floating_point() and not targets.is_complex()
    if not classes or z is None or z.ndim < 2 or (shifted and z.ndim > 2) or z.shape[:-1] != targets.shape:
        return torch.full((batch.size,), torch.nan, dtype=torch.float64)
    if z.ndim == 2:
        return ((z.argmax(-1) != targets) & (targets != IGNORED_LABEL)).double()
    counted = (targets != IGNORED_LABEL).reshape(batch.size, -1)
    wrong = (z.argmax(-1) != targets).reshape(batch.size, -1) & counted
    return wrong.sum(1).double() / counted.sum(1).clamp_min(1)


def _logits(outputs: Any) -> Tensor | None:
    try:
        return output_tensor(outputs)
    except DiagError:
        return None
