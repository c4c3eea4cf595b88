"""The loss of a batch: by the loss function, or the one that a model computes itself, among its outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from diag.errors import InvalidInput, MissingQuantity, first_line
from diag.snapshot.state.host import as_the_program

NO_LOSS = (
    "the snapshot has no loss; give loss_fn=, mean-reduced: loss_fn(outputs, targets), or in each batch what the "
    "model computes its own from (its labels)."
)


def loss_of(loss_fn: Callable[[Any, Any], Tensor] | None, outputs: Any, targets: Any) -> Tensor:
    """The mean loss of a batch, by loss_fn or, without one, the outputs' own `.loss`.

    Raises InvalidInput where loss_fn cannot be called on them, MissingQuantity where there is no loss.
    """
    if loss_fn is not None:
        try:
            with as_the_program():
                return loss_fn(outputs, targets)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise InvalidInput(
                f"loss_fn cannot be called on the model's outputs and the targets ({first_line(error)}); check "
                "their shapes, types and ranges."
            ) from error
    loss = own_loss(outputs)
    if loss is None:
        raise MissingQuantity(NO_LOSS)
    return loss


def own_loss(outputs: Any) -> Tensor | None:
    """The loss among a model's outputs: `.loss`, the entry "loss", or the only number of a tuple."""
    if isinstance(outputs, Mapping):
        return outputs.get("loss")
    if isinstance(outputs, (tuple, list)) and not hasattr(outputs, "_fields"):
        numbers = [t for t in outputs if isinstance(t, Tensor) and t.ndim == 0 and t.is_floating_point()]
        return numbers[0] if len(numbers) == 1 else None
    return getattr(outputs, "loss", None)


def is_models_own(loss_fn: Any) -> bool:
    """Whether this loss only picks what the model has computed itself."""
    return hasattr(loss_fn, "place") and not hasattr(loss_fn, "route")
