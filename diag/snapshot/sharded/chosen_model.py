"""Which model is measured: the one given, a whole copy of a sharded one, or one that gathers layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from diag.checkpoints.unwrap import bare_model
from diag.distributed.together import Together
from diag.linalg.deadline import free_memory
from diag.snapshot.sharded.by_layer import ByLayer, can_gather_by_layer
from diag.snapshot.sharded.whole import fits_whole, is_sharded, whole_copy, whole_optimizer
from diag.snapshot.validation import BY_LAYER


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter; the CPU where there is none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def is_gathered_by_layer(model: nn.Module, chosen: Any, ranks: Together) -> bool:
    """Whether the layers of a sharded model are gathered one at a time: where that is chosen, or nothing else fits.

    Where that cannot be done either, the whole copy is refused with its reason.
    """
    if chosen == BY_LAYER:
        return True
    fits = fits_whole(model, ranks, free_memory(ranks.device))
    return not fits and can_gather_by_layer(model, ranks.world)


def by_layer_of(arguments: Mapping[str, Any], ranks: Together | None) -> ByLayer | None:
    """The sharded model as one whose layers are gathered one at a time, where that is so."""
    model = bare_model(arguments["model"])
    if ranks is None or not is_gathered_by_layer(model, arguments["ranks"], ranks):
        return None
    return ByLayer(model, ranks)


def model_to_measure(
    model: nn.Module,
    optimizer: Any,
    device: torch.device | str | None,
    ranks: Together | None,
    layers: ByLayer | None,
) -> tuple[nn.Module, Any]:
    """The model to measure, whole and on the device asked for, and its optimizer; or the one that gathers."""
    if layers is not None:
        return layers.model, None
    if ranks is None or not is_sharded(model):
        return _on_device(model, device), optimizer
    copied = whole_copy(model, ranks, free_memory(device_of(model)))
    optimizer = None if optimizer is None else whole_optimizer(optimizer, copied.tensors, ranks)
    return _on_device(copied.model, device), optimizer


def _on_device(model: nn.Module, device: torch.device | str | None) -> nn.Module:
    here = next((p.device for p in model.parameters()), None)
    if device is None or here is None or here == torch.device(device):
        return model
    return copy.deepcopy(model).to(device)
