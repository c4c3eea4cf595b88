"""The closed glossary: everything an instrument may ask for, by name, with its shape, kind and cost.

An instrument's positional parameters are names from this table. A quantity is one documented function of a
`Snapshot` in the module named here; the module is imported when the quantity is first asked for. Shapes are
letters that one call must use consistently: m examples, n labels (one an example, or one a position of it that
counts), K classes, d features.

The prefix `held_out_` asks for a quantity on the snapshot's held-out data instead of its data.
"""

from __future__ import annotations

import enum
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diag.errors import InvalidInput, did_you_mean

HELD_OUT = "held_out_"


class Effort(enum.Enum):
    """What computing a quantity takes: in words, and in forward passes over the data.

    For what is called again and again the passes are those of a usual number of calls; thirty products.
    """

    NONE = "none", 0.0
    FORWARD = "one forward pass", 1.0
    TRACED_FORWARD = "one traced forward pass", 10.0
    FORWARD_A_CALL = "one forward pass a call", 10.0
    FORWARD_A_POINT = "one forward pass a point", 30.0
    FORWARD_A_STEP = "one forward pass a step", 30.0
    GRADIENT = "one gradient", 3.0
    TWO_GRADIENTS = "about two gradients", 6.0
    BACKWARD_A_CLASS = "one backward pass a class", 30.0
    PRODUCTS = "about three gradients a product", 300.0

    def __init__(self, text: str, passes: float) -> None:
        self.text, self.passes = text, passes

    @property
    def one_look(self) -> bool:
        """Whether the data are gone through once at most."""
        return self in (Effort.NONE, Effort.FORWARD, Effort.TRACED_FORWARD, Effort.GRADIENT)


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
    cost: Effort
    how: str

    @property
    def external(self) -> bool:
        """Whether no snapshot can have it."""
        return self.module.startswith("snapshot.external.")

    def function(self) -> Callable[[Any], Any]:
        """The documented function that computes it from a snapshot."""
        return getattr(importlib.import_module(f"diag.{self.module}"), self.name)


_DATA = "give the snapshot data= with (inputs, targets)"
_LOSS = "give the snapshot loss_fn= (mean-reduced) and data= with (inputs, targets)"
_LAST = "give a model whose last layer is a Linear, or pass features= and classifier= yourself"

_WATCHED = "measure inside diag.watch, or pass loss_record="

GLOSSARY: dict[str, Quantity] = {
    q.name: q
    for q in (
        Quantity("inputs", "snapshot.pass_quantities", "n *", "object", Effort.NONE, _DATA),
        Quantity(
            "labels",
            "snapshot.pass_quantities",
            "n",
            "integer",
            Effort.NONE,
            _DATA + " where the targets are class numbers",
        ),
        Quantity(
            "targets",
            "snapshot.pass_quantities",
            "n *",
            "object",
            Effort.NONE,
            _DATA + " where the targets are floating-point numbers",
        ),
        Quantity("logits", "snapshot.pass_quantities", "n K", "floating", Effort.FORWARD, _DATA),
        Quantity("losses", "snapshot.objective.examples", "m", "floating", Effort.FORWARD, _LOSS),
        Quantity("logit_gradients", "snapshot.pass_quantities", "n K", "floating", Effort.FORWARD, _LOSS),
        Quantity("binary_decisions", "snapshot.objective.decisions", None, "object", Effort.FORWARD, _LOSS),
        Quantity("features", "snapshot.pass_quantities", "n d", "floating", Effort.FORWARD, _LAST),
        Quantity("layer_features", "snapshot.pass_quantities", None, "object", Effort.FORWARD, _DATA),
        Quantity("activations", "snapshot.activations", None, "object", Effort.FORWARD, _DATA),
        Quantity("layer_outputs", "snapshot.inside.layers", None, "object", Effort.FORWARD_A_CALL, _DATA),
        Quantity(
            "previous_layer_outputs",
            "snapshot.inside.layers",
            None,
            "object",
            Effort.FORWARD_A_CALL,
            "give previous=",
        ),
        Quantity("layer_chain", "snapshot.inside.chain", None, "object", Effort.TWO_GRADIENTS, _DATA),
        Quantity("residual_stack", "snapshot.inside.residual", None, "object", Effort.TRACED_FORWARD, _DATA),
        Quantity(
            "denoiser",
            "snapshot.inside.denoiser",
            None,
            "object",
            Effort.FORWARD_A_CALL,
            "give data= with (noisy inputs, clean targets)",
        ),
        Quantity("quantised_weights", "snapshot.inside.quantised", None, "object", Effort.GRADIENT, _LOSS),
        Quantity("previous_logits", "snapshot.inside.earlier", "n K", "floating", Effort.FORWARD, "give previous="),
        Quantity("running_statistics", "snapshot.inside.normalization", None, "object", Effort.FORWARD, _DATA),
        Quantity("later_tokens", "snapshot.inside.later", None, "object", Effort.FORWARD, _DATA),
        Quantity("other_examples", "snapshot.inside.apart", None, "object", Effort.FORWARD, _DATA),
        Quantity("inputs_tried", "snapshot.inside.ignored", None, "object", Effort.FORWARD, _DATA),
        Quantity("attention_calls", "snapshot.inside.attention", None, "object", Effort.FORWARD, _DATA),
        Quantity("classifier", "snapshot.pass_quantities", None, "object", Effort.FORWARD, _LAST),
        Quantity(
            "params",
            "snapshot.parameters",
            None,
            "object",
            Effort.NONE,
            "give a model with trainable parameters",
        ),
        Quantity("gradient", "snapshot.parameters", None, "object", Effort.GRADIENT, _LOSS),
        Quantity("loss_at", "snapshot.parameters", None, "object", Effort.FORWARD_A_CALL, _LOSS),
        Quantity("losses_at", "curvature.neighbourhood.losses_at", None, "object", Effort.FORWARD_A_CALL, _LOSS),
        Quantity(
            "divergence_at",
            "curvature.neighbourhood.divergence_at",
            None,
            "object",
            Effort.FORWARD_A_CALL,
            _DATA,
        ),
        Quantity(
            "loss_record",
            "snapshot.history",
            None,
            "object",
            Effort.FORWARD_A_STEP,
            _WATCHED,
        ),
        Quantity("per_example_gradients", "gradients", None, "object", Effort.TWO_GRADIENTS, _LOSS),
        Quantity("hessian", "curvature.matrices", None, "object", Effort.PRODUCTS, _LOSS),
        Quantity("gauss_newton", "curvature.matrices", None, "object", Effort.PRODUCTS, _LOSS),
        Quantity("class_directions", "curvature.class_directions", None, "object", Effort.BACKWARD_A_CLASS, _DATA),
        Quantity("fisher", "curvature.matrices", None, "object", Effort.PRODUCTS, _LOSS),
        Quantity("interpolation", "connectivity.interpolation", None, "object", Effort.FORWARD_A_POINT, _DATA),
        Quantity("other", "connectivity.interpolation", None, "object", Effort.NONE, "give the snapshot other="),
        Quantity("ancestor", "connectivity.interpolation", None, "object", Effort.NONE, "give previous="),
        Quantity("other_params", "snapshot.parameters", None, "object", Effort.NONE, "give the snapshot other="),
        Quantity(
            "previous_losses", "snapshot.objective.examples", "m", "floating", Effort.FORWARD, "give previous="
        ),
        Quantity("symmetries", "connectivity.symmetries", None, "object", Effort.TRACED_FORWARD, _DATA),
        Quantity("linear_symmetries", "connectivity.symmetries", None, "object", Effort.TRACED_FORWARD, _DATA),
        Quantity("module_graph", "snapshot.module_graph", None, "object", Effort.TRACED_FORWARD, _DATA),
        Quantity("optimizer", "snapshot.optimizer", None, "object", Effort.NONE, "give the snapshot optimizer="),
        Quantity("update", "snapshot.optimizer", None, "object", Effort.NONE, "give the snapshot previous="),
        Quantity(
            "history",
            "snapshot.history",
            None,
            "object",
            Effort.NONE,
            "measure inside diag.watch, or give history=",
        ),
        Quantity("loop", "snapshot.loop.facts", None, "object", Effort.NONE, "measure inside diag.watch"),
        Quantity("trial", "snapshot.external.trial", None, "object", Effort.NONE, "call diag.preflight"),
        Quantity("saved", "snapshot.external.saved", None, "object", Effort.NONE, "call diag report FILE"),
    )
}


def lookup(name: str) -> Quantity:
    """The glossary row of `name`, which may carry the prefix `held_out_`.

    Raises InvalidInput for a name that is not in the glossary.
    """
    row = GLOSSARY.get(str(name).removeprefix(HELD_OUT))
    if row is None:
        meant = did_you_mean(str(name), GLOSSARY) or f"expected one of {', '.join(sorted(GLOSSARY))}."
        raise InvalidInput(f"{name!r} is not a quantity of the glossary; {meant}")
    return row
