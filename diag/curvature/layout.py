"""Where each trainable parameter lies in the flat vectors that curvature operators take.

Order is that of `model.named_parameters()`: tied tensors once, frozen ones left out. A layer is a module that
owns parameters; its parameters are neighbours in the flat vector, so a layer is one slice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diag.errors import InvalidInput, Unsupported
from diag.snapshot.parameters import layer_of


@dataclass(frozen=True)
class Layout:
    """The names and shapes of the trainable parameters and their slices of a flat vector of length `size`."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    slices: tuple[slice, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        """The layout of `model`'s trainable parameters.

        Raises InvalidInput where there is none, or where one has no values yet; Unsupported for complex,
        quantised and sharded ones.
        """
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise InvalidInput("The model has no trainable parameter; set requires_grad=True on those to measure.")
        for name, parameter in trainable.items():
            _check(name, parameter)
        check_one_device({str(p.device) for p in trainable.values()})
        ends = [0]
        for parameter in trainable.values():
            ends.append(ends[-1] + parameter.numel())
        slices = tuple(slice(a, b) for a, b in itertools.pairwise(ends))
        return cls(tuple(trainable), tuple(p.shape for p in trainable.values()), slices)

    @property
    def size(self) -> int:
        """P, the number of trainable numbers."""
        return self.slices[-1].stop

    @property
    def layers(self) -> dict[str, slice]:
        """Layer name -> its slice, in order; see `parameters.layer_of`."""
        layers: dict[str, slice] = {}
        last = None
        for name, part in zip(self.names, self.slices, strict=True):
            layer = layer_of(name)
            if layer in layers and layer != last:  # not neighbours: keep the module's own full path
                layer = name.rpartition(".")[0] if name.rpartition(".")[0] not in layers else name
            layers[layer] = slice(layers[layer].start if layer in layers else part.start, part.stop)
            last = layer
        return layers

    def views(self, flat: Tensor) -> list[Tensor]:
        """The pieces of a flat vector of shape (size,), each in its parameter's shape; they share memory."""
        return [flat[part].view(shape) for part, shape in zip(self.slices, self.shapes, strict=True)]

    def flatten(self, tensors: Sequence[Tensor | None], like: Tensor) -> Tensor:
        """One flat vector of `like`'s dtype and device from a tensor per parameter; None counts as zeros."""
        pieces = []
        for tensor, part in zip(tensors, self.slices, strict=True):
            if tensor is None:
                pieces.append(like.new_zeros(part.stop - part.start))
            else:
                pieces.append(_dense(tensor).reshape(-1).to(like.dtype))
        return torch.cat(pieces)

    def values(self, model: nn.Module) -> list[Tensor]:
        """The parameters' current values, detached; they share memory with the model."""
        named = dict(model.named_parameters())
        return [named[name].detach() for name in self.names]


def participation(layout: Layout, vector: Tensor) -> dict[str, float]:
    """The share of a vector's squared length in each layer: layer name -> share; the shares sum to 1."""
    total = _square(vector)
    return {name: _square(vector[part]) / total if total > 0 else math.nan for name, part in layout.layers.items()}


def _square(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64) ** 2)


def _dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.layout != torch.strided else tensor


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
