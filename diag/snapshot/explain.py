"""Why a model or a loss cannot be called on the data, in one sentence for the user."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diag.errors import DiagError, InvalidInput, Unsupported, first_line
from diag.snapshot.batch import Batch, tensors_in
from diag.snapshot.preserve import preserved
from diag.snapshot.state.unmade import REENTRANT, is_reentrant

CALL_ERRORS = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError)


def try_out(model: nn.Module, loss: Callable[[Any, Any], Tensor], batches: Sequence[Batch]) -> None:
    """Call the model and `loss(outputs, targets)` on each batch; raises InvalidInput where that cannot be done."""
    for batch in batches:
        with preserved(model), torch.no_grad():
            try:
                outputs = batch.forward(model)
            except CALL_ERRORS as error:
                raise explained(model, batches, error) from error
            loss(outputs, batch.targets)


def explained(model: nn.Module, batches: Sequence[Batch], error: Exception) -> DiagError:
    """What `error`, raised by a call of the model on one of the batches, comes from; diag's own are as they are."""
    if isinstance(error, DiagError):
        return error
    if is_reentrant(error):
        return Unsupported(REENTRANT)
    model_device = next((p.device for p in model.parameters()), None)
    devices = {t.device for b in batches[:1] for t in tensors_in((b.args, b.kwargs))}
    if model_device is not None and devices - {model_device}:
        return InvalidInput(
            f"The model is on {model_device} and the data on {', '.join(map(str, devices))}; give the snapshot "
            f"device={str(model_device)!r}."
        )
    return InvalidInput(f"The model cannot be called on this data ({first_line(error)}); check shapes and types.")
