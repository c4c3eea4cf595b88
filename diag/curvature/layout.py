"""What a model's parameters must be for flat vectors of curvature, and the share of a vector in each layer."""

from __future__ import annotations

import math

from torch import Tensor, nn

from diag.errors import InvalidInput, Unsupported
from diag.linalg.reductions import length
from diag.snapshot.parameters import FlatLayout


def layout_of(model: nn.Module) -> FlatLayout:
    """Where each of `model`'s trainable parameters lies in a flat vector.

    Raises InvalidInput where there is none, or where one has no values yet; Unsupported for complex, quantised and
    sharded ones.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise InvalidInput("The model has no trainable parameter; set requires_grad=True on those to measure.")
    for name, parameter in named.items():
        _check(name, parameter)
    check_one_device({str(p.device) for p in named.values()})
    return FlatLayout.of({name: p.shape for name, p in named.items()})


def participation(layout: FlatLayout, vector: Tensor) -> dict[str, float]:
    """The share of a vector's squared length in each layer: layer name -> share; the shares sum to 1."""
    total = length(vector) ** 2
    return {n: length(vector[part]) ** 2 / total if total > 0 else math.nan for n, part in layout.layers.items()}


def check_one_device(devices: set[str]) -> None:
    """Raises Unsupported where a flat vector would span devices."""
    if len(devices) > 1:
        raise Unsupported(
            f"The trainable parameters are on several devices ({', '.join(sorted(devices))}); put a copy of the "
            "model on one of them to measure it."
        )


def _check(name: str, parameter: Tensor) -> None:
    if nn.parameter.is_lazy(parameter):
        raise InvalidInput(f"Parameter {name} of a lazy module has no shape yet; run the model on one batch first.")
    if hasattr(parameter, "full_tensor"):
        raise Unsupported(
            f"Parameter {name} is sharded over processes (a DTensor); gather the parameters into an unsharded "
            "copy of the model and measure that."
        )
    if parameter.is_meta:
        raise InvalidInput(f"Parameter {name} is on the meta device and has no values; load the weights first.")
    if not parameter.is_floating_point():
        raise Unsupported(
            f"Parameter {name} has dtype {parameter.dtype}; curvature is defined here for real parameters: split "
            "it into its real and imaginary parts."
        )
