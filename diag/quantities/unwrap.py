"""The module that holds the parameters, under whatever wraps it.

`torch.compile`, `DataParallel` and `DistributedDataParallel` return wrappers. Measuring goes through the bare
module: a compiled one would be compiled again for evaluation mode and cannot be differentiated twice.
"""

from __future__ import annotations

from torch import nn

WRAPPERS = ("DistributedDataParallel", "DataParallel", "OptimizedModule")


def bare_model(model: nn.Module) -> nn.Module:
    """`model` without its wrappers."""
    while type(model).__name__ in WRAPPERS:
        inner = getattr(model, "_orig_mod", None)
        model = inner if inner is not None else model.module  # type: ignore[assignment]
    return model
