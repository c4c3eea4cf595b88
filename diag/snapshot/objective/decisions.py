"""Yes-or-no decisions: what a sigmoid loss compares, logit by logit, as the user's own loss does it.

A call of `F.binary_cross_entropy_with_logits` shows it. Without one, outputs are taken as logits where they have
the shape of targets of zeros and ones, and are differentiated through the loss; what uses them compares
the gradients with the sigmoid's, and so learns whether the loss is of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diag.errors import MissingQuantity
from diag.snapshot.forward import Looked, forward_pass
from diag.snapshot.objective.loss_spy import LossFunctionCall
from diag.snapshot.objective.own_loss import NO_LOSS
from diag.snapshot.snapshot import Snapshot

SIGMOID_LOSS = "binary_cross_entropy_with_logits"
NO_DECISIONS = (
    "the loss compares no logits with targets of zeros and ones of the same shape; this needs a binary or "
    "multi-label task whose loss takes logits."
)


@dataclass(frozen=True)
class BinaryDecisions:
    """Every decision of every example whose target is 0 or 1.

    logits (m,) in the dtype in which they enter the loss; positive (m,): whether the target is 1; gradients (m,): d
    loss / d logit, up to one factor for each output and target; outputs (m,): the number of the output.
    """

    logits: Tensor
    positive: Tensor
    gradients: Tensor
    outputs: Tensor


def binary_decisions(snapshot: Snapshot) -> BinaryDecisions:
    """The decisions of all the data. Raises MissingQuantity where the loss makes none that can be seen."""
    if snapshot.loss_fn is None and forward_pass(snapshot).looked[0].value is None:
        raise MissingQuantity(NO_LOSS)
    looked = forward_pass(snapshot).looked
    parts = [_decided(snapshot, *row) for row in zip(looked, snapshot.batches, strict=True)]
    return BinaryDecisions(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _decided(snapshot: Snapshot, looked: Looked, batch: Any) -> Sequence[Tensor]:
    calls = [call for call in looked.calls if call.name == SIGMOID_LOSS]
    if len(calls) == 1 and len(looked.calls) == 1:
        z, y, gradients = _by_call(calls[0])
    elif looked.calls:
        raise MissingQuantity(NO_DECISIONS)
    else:
        z, y, gradients = _by_outputs(snapshot, looked.outputs, batch.targets)
    hard = (y == 0) | (y == 1)
    if not bool(hard.any()):
        raise MissingQuantity("the targets are neither 0 nor 1, so that no decision is ever certain.")
    outputs = torch.arange(z.shape[-1] if z.ndim > 1 else 1, device=z.device).expand(
        z.shape if z.ndim > 1 else (len(z),)
    )
    return z.detach()[hard], y[hard] == 1, gradients[hard], outputs[hard]


def _by_call(call: LossFunctionCall) -> tuple[Tensor, Tensor, Tensor]:
    z, y = call.input.detach().requires_grad_(), call.target
    if z.shape != y.shape or not z.ndim:
        raise MissingQuantity(NO_DECISIONS)
    weights = {name: call.settings.get(name) for name in ("weight", "pos_weight")}
    with torch.enable_grad():
        loss = F.binary_cross_entropy_with_logits(z, y, reduction="sum", **weights)
        return z, y, torch.autograd.grad(loss, z)[0]


def _by_outputs(snapshot: Snapshot, outputs: Any, targets: Any) -> tuple[Tensor, Tensor, Tensor]:
    tensors = isinstance(outputs, Tensor) and isinstance(targets, Tensor)
    if not tensors or outputs.shape != targets.shape or not outputs.is_floating_point() or not outputs.ndim:
        raise MissingQuantity(NO_DECISIONS)
    z = outputs.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(snapshot.batch_loss(z, targets), z)
    return z, targets, gradient * z.numel()
