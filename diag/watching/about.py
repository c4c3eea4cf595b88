"""What a run says about itself: the model, the machine, the versions and the settings of the watch."""

from __future__ import annotations

import atexit
import os
import platform
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn


def describe_run(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    chosen: Mapping[str, Mapping[str, Any]],
    budget: float,
    every: int | None,
) -> dict[str, Any]:
    """The metadata of a run; `layers` maps each watched parameter to its number of elements."""
    import diag

    first = next(iter(parameters.values()))
    return {
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": {name: p.numel() for name, p in parameters.items()},
        "device": _device(first.device),
        "dtype": str(first.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "seed": torch.initial_seed(),
        "budget": budget,
        "every": every,
        "instruments": list(chosen),
        "settings": {name: dict(settings) for name, settings in chosen.items() if settings},
        "gradient_norms": _gradient_label(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "diag": diag.__version__},
    }


def temporary_folder() -> Path:
    """A folder for a run without one; it is removed when the process ends."""
    folder, owner = tempfile.mkdtemp(prefix="diag-"), os.getpid()
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None)
    return Path(folder)


def _device(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _gradient_label() -> str:
    text = "2-norms of the gradients before clipping by torch.nn.utils, without a GradScaler's scale"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return f"{text}; of the whole tensors, put together over ranks where they are sharded"
    return text
