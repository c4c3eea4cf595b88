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
    "Watcher": "diag.watching.watcher",
    "report": "diag.reporting",
    "preflight": "diag.trial.preflight",
    "compare": "diag.reporting",
    "load": "diag.run.saved",
    "gradient_rule": "diag.gradients.layer_rules",
    "Run": "diag.run.run",
    "align": "diag.connectivity.connection",
    "connect": "diag.connectivity.connection_map",
    "fork_stability": "diag.connectivity.connection_map",
    "measure": "diag.registry",
    "measure_all": "diag.registry",
    "instrument": "diag.registry",
    "Result": "diag.result",
    "Verdict": "diag.result",
    "Level": "diag.result",
    "Confidence": "diag.result",
    "Precondition": "diag.result",
    "Skipped": "diag.result",
    "Failed": "diag.result",
    "measured": "diag.result",
    "stable_cross_entropy": "diag.remedies",
    "stable_binary_cross_entropy": "diag.remedies",
    "stablemax": "diag.remedies",
    "stablemax_cross_entropy": "diag.remedies",
    "perp_grad": "diag.remedies",
    "loss_conflict": "diag.instruments.gradient_conflict.instrument",
    "coordinate_check": "diag.trial.coordinates",
}

_MODULES = ("datasets", "errors", "integrations", "testing")  # the modules that are public as such


def __getattr__(name: str) -> Any:
    # Loading on first use keeps `import diag` as cheap as `import torch`.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"diag.{name}")
    if name == "__all__":
        return __dir__()
    if name.startswith("_"):
        raise AttributeError(f"module 'diag' has no attribute {name!r}.")
    if importlib.util.find_spec(f"diag.{name}") is not None:
        # `from diag import display` asks here first, and then imports it.
        raise AttributeError(f"diag.{name} is a module that is not public; `import diag.{name}` if you need it.")
    if (found := _of_instruments().get(name)) is not None:
        return found
    from diag.errors import did_you_mean

    hint = " ".join([did_you_mean(name, __dir__()), "see `diag list`."]).lstrip()
    raise AttributeError(f"module 'diag' has no attribute {name!r}; {hint}")


def __dir__() -> list[str]:
    return sorted([*_HOMES, *_MODULES, *_of_instruments()])


def _of_instruments() -> dict[str, Any]:
    """The instruments, and the classes of their results, by name."""
    from diag.registry import instruments

    found = instruments()
    return {i.result.__name__: i.result for i in found.values()} | dict(found)
