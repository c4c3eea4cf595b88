"""The closed glossary: everything an instrument may ask for, by name, with its shape, kind and cost.

An instrument's positional parameters are names from this table. A quantity is one documented function of a
`Snapshot` in the module named here; the module is imported when the quantity is first asked for. Shapes are
letters that one call must use consistently: n examples, K classes, d features.

The prefix `held_out_` asks for a quantity on the snapshot's held-out data instead of its data.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diag.errors import InvalidInput

HELD_OUT = "held_out_"


@dataclass(frozen=True)
class Quantity:
    """One row of the glossary.

    `shape` is a string of axis letters for a tensor and None for an object; `kind` is "floating", "integer"
    or "object"; `cost` says what computing it takes; `how` says how a user can give what is missing.
    """

    name: str
    module: str
    shape: str | None
    kind: str
    cost: str
    how: str

    def function(self) -> Callable[[Any], Any]:
        """The documented function that computes it from a snapshot."""
        return getattr(importlib.import_module(f"diag.{self.module}"), self.name)


_DATA = "give the snapshot data= with (inputs, targets)"
_LOSS = "give the snapshot loss_fn= (mean-reduced) and data= with (inputs, targets)"
_LAST = "give a model whose last layer is a Linear, or pass features= and classifier= yourself"

_WATCHED = "measure inside diag.watch, or pass loss_record="
_HISTORY = "measure inside diag.watch, or give history="

GLOSSARY: dict[str, Quantity] = {
    q.name: q
    for q in (
        Quantity("inputs", "snapshot.forward", "n *", "object", "none", _DATA),
        Quantity(
            "labels", "snapshot.forward", "n", "integer", "none", _DATA + " where the targets are class numbers"
        ),
        Quantity("logits", "snapshot.forward", "n K", "floating", "one forward pass", _DATA),
        Quantity("losses", "snapshot.forward", "n", "floating", "one forward pass", _LOSS),
        Quantity("logit_gradients", "snapshot.forward", "n K", "floating", "one forward pass", _LOSS),
        Quantity("features", "snapshot.forward", "n d", "floating", "one forward pass", _LAST),
        Quantity("layer_features", "snapshot.forward", None, "object", "one forward pass", _DATA),
        Quantity("activations", "snapshot.activations", None, "object", "one forward pass", _DATA),
        Quantity("classifier", "snapshot.forward", None, "object", "one forward pass", _LAST),
        Quantity("params", "snapshot.parameters", None, "object", "none", "give a model with trainable parameters"),
        Quantity("gradient", "snapshot.parameters", None, "object", "one gradient", _LOSS),
        Quantity("loss_at", "snapshot.parameters", None, "object", "one forward pass a call", _LOSS),
        Quantity(
            "losses_at", "curvature.neighbourhood.losses_at", None, "object", "one forward pass a call", _LOSS
        ),
        Quantity(
            "divergence_at",
            "curvature.neighbourhood.divergence_at",
            None,
            "object",
            "one forward pass a call",
            _DATA,
        ),
        Quantity(
            "loss_record",
            "snapshot.history",
            None,
            "object",
            "one forward pass a step",
            _WATCHED,
        ),
        Quantity("per_example_gradients", "gradients", None, "object", "about two gradients", _LOSS),
        Quantity("hessian", "curvature.operators", None, "object", "about three gradients a product", _LOSS),
        Quantity("gauss_newton", "curvature.operators", None, "object", "about three gradients a product", _LOSS),
        Quantity(
            "class_directions", "curvature.class_directions", None, "object", "one backward pass a class", _DATA
        ),
        Quantity("fisher", "curvature.operators", None, "object", "about three gradients a product", _LOSS),
        Quantity("interpolation", "connectivity.interpolation", None, "object", "one forward pass a point", _DATA),
        Quantity("other", "connectivity.interpolation", None, "object", "none", "give the snapshot other="),
        Quantity("ancestor", "connectivity.interpolation", None, "object", "none", "give previous="),
        Quantity("other_params", "snapshot.parameters", None, "object", "none", "give the snapshot other="),
        Quantity("previous_losses", "snapshot.forward", "n", "floating", "one forward pass", "give previous="),
        Quantity("symmetries", "connectivity.symmetries", None, "object", "one traced forward pass", _DATA),
        Quantity("module_graph", "snapshot.module_graph", None, "object", "one traced forward pass", _DATA),
        Quantity("optimizer", "snapshot.optimizer", None, "object", "none", "give the snapshot optimizer="),
        Quantity("update", "snapshot.optimizer", None, "object", "none", "give the snapshot previous="),
        Quantity(
            "history", "snapshot.history", None, "object", "none", "measure inside diag.watch, or give history="
        ),
        Quantity("loop", "snapshot.loop.facts", None, "object", "none", "measure inside diag.watch"),
    )
}


def lookup(name: str) -> Quantity:
    """The glossary row of `name`, which may carry the prefix `held_out_`.

    Raises InvalidInput for a name that is not in the glossary.
    """
    row = GLOSSARY.get(name.removeprefix(HELD_OUT))
    if row is None:
        raise InvalidInput(
            f"{name!r} is not a quantity of the glossary; expected one of {', '.join(sorted(GLOSSARY))}."
        )
    return row
