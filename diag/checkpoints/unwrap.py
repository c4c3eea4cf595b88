"""The module that holds the parameters, under whatever wraps it.

`torch.compile`, `DataParallel` and `DistributedDataParallel` return wrappers. Measuring goes through the bare
module: a compiled one would be compiled again for evaluation mode and cannot be differentiated twice. Accelerate
(and with it the Trainer of transformers) wraps nothing but replaces the model's `forward`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

WRAPPER_CLASSES = ("DistributedDataParallel", "DataParallel", "OptimizedModule")


def bare_model(model: nn.Module) -> nn.Module:
    """`model` without its wrappers."""
    while type(model).__name__ in WRAPPER_CLASSES:
        inner = getattr(model, "_orig_mod", None)
        model = inner if inner is not None else model.module  # type: ignore[assignment]
    return model


@contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """Inside the context the model has the `forward` that accelerate replaced by one under autocast, if it did."""
    attributes = vars(model)
    replaced, own = attributes.get("forward"), attributes.get("_original_forward")
    if replaced is None or own is None:
        yield
        return
    attributes["forward"] = own
    try:
        yield
    finally:
        attributes["forward"] = replaced
