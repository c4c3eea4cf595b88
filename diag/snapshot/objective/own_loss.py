"""The loss that a model computes itself, among its outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


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
