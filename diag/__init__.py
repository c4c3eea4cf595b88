"""diag tells what state a PyTorch network is in, while it trains and afterwards, with evidence.

Every instrument is an attribute of this package: `diag.neural_collapse(snapshot)`. See `diag list`.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Snapshot": "diag.snapshot.snapshot",
    "watch": "diag.watching.watcher",
    "report": "diag.reporting",
    "load": "diag.run.run",
    "measure": "diag.registry",
    "measure_all": "diag.registry",
    "instrument": "diag.registry",
    "Result": "diag.result",
    "Verdict": "diag.result",
    "Precondition": "diag.result",
    "measured": "diag.result",
    "stable_cross_entropy": "diag.remedies",
}


def __getattr__(name: str) -> Any:
    # Loading on first use keeps `import diag` as cheap as `import torch`.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if not name.startswith("_"):
        if importlib.util.find_spec(f"diag.{name}") is not None:
            return importlib.import_module(f"diag.{name}")
        from diag.registry import instruments

        if name in instruments():
            return instruments()[name]
    raise AttributeError(f"module 'diag' has no attribute {name!r}; see diag.__all__ and `diag list`.")


def __dir__() -> list[str]:
    from diag.registry import instruments

    return sorted([*_HOMES, *instruments(), "errors"])


__all__ = list(_HOMES)
