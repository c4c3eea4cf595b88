"""Where a Gauss-Newton matrix J^T S J is split, so that no tensor of the size of many classes' logits is kept.

J may be the Jacobian of any tensors that the outputs are a function of, with S the curvature of the loss in them
through the outputs, whose own Jacobian is held fixed. For a last linear layer over many classes these are the
layer's inputs, weight and bias: the layer goes with S, which `loss.py` computes in pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from diag.curvature.objective import output_tensors
from diag.curvature.vocabulary.loss import MovedLayer, PieceForm, Projected, unviewed

T = TypeVar("T")
Rebuilt = Callable[[Sequence[Tensor]], Any]
PointOf = Callable[[Any], "Point"]


class LogitsUsed(Exception):
    """The loss is a function of the logits in another way than by the cross-entropy with labels."""


class Point:
    """The outputs as a function of `tensors`: of those among them that can be differentiated."""

    def __init__(self, tensors: Sequence[Tensor], rebuilt: Rebuilt):
        self.tensors, self.rebuilt = tensors, rebuilt

    @classmethod
    def of(cls, outputs: Any) -> Point:
        """At the outputs themselves."""
        return cls(*output_tensors(outputs))

    def leaves(self) -> list[Tensor]:
        """The tensors, to differentiate by."""
        return [z.detach().requires_grad_() for z in self.tensors]

    def moved(self, tangents: Sequence[Tensor], step: float) -> tuple[list[Tensor], Rebuilt]:
        """Leaves and the function of them, with outputs that are moved by `step` J tangents."""
        pairs = zip(self.tensors, tangents, strict=True)
        return [(z.detach() + step * t).requires_grad_() for z, t in pairs], self.rebuilt


class LastLayer(Point):
    """The outputs as a function of what one of them, the logits z, was `made` of, and of the others.

    logits: which of `tensors` they are. rebuilt: the outputs from `tensors`.
    """

    def __init__(self, tensors: Sequence[Tensor], rebuilt: Rebuilt, logits: int, made: Projected):
        self._z, self._made, self._logits, self._outputs = tensors[logits].detach(), made, logits, rebuilt
        parts = (made.x, made.weight, made.bias)
        self._free = [k for k, part in enumerate(parts) if part is not None and part.requires_grad]
        self._others = [z for k, z in enumerate(tensors) if k != logits]
        self._parts = parts
        free: list[Any] = [parts[k] for k in self._free]
        super().__init__([*free, *self._others], self._rebuilt)

    def _rebuilt(self, leaves: Sequence[Tensor], moved: MovedLayer | None = None) -> Any:
        x, w, b = self._in_place(leaves, self._parts)
        z = self._z
        if moved is not None:
            rows = x.detach().reshape(-1, x.shape[-1])
            z = z + moved.logits(rows, w.detach(), slice(None)).view_as(z)
        logits: Any = LinearOutput.apply(x, w, b, z)
        logits.projected = Projected(x, w, b, logits._version, PieceForm(jacobian_fixed=True, moved=moved))
        others = list(leaves[len(self._free) :])
        return self._outputs([*others[: self._logits], logits, *others[self._logits :]])

    def _in_place(self, tensors: Sequence[Tensor], around: Sequence[Tensor | None]) -> list[Any]:
        """x, weight and bias: those given that are free, and of `around` the others."""
        found = list(around)
        for k, tensor in zip(self._free, tensors, strict=False):
            found[k] = tensor
        return found

    def moved(self, tangents: Sequence[Tensor], step: float) -> tuple[list[Tensor], Rebuilt]:
        """The layer's Jacobian stays that of the tensors where they are."""
        x, w, b = self._in_place([step * t.detach() for t in tangents[: len(self._free)]], (None, None, None))
        moved = MovedLayer(None if x is None else x.reshape(-1, x.shape[-1]), w, b)
        leaves = self.leaves()
        own, others = leaves[: len(self._free)], zip(self._others, tangents[len(self._free) :], strict=True)
        further = [(z.detach() + step * t).requires_grad_() for z, t in others]
        return [*own, *further], lambda tensors: self._rebuilt(tensors, moved)


class LinearOutput(torch.autograd.Function):
    """Logits of x, w and b that were computed before."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, logits: Tensor) -> Tensor:
        """The logits."""
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Nothing has derivatives here: the cross-entropy has its own way to x, w and b."""
        raise LogitsUsed


def last_layer(outputs: Any) -> Point:
    """At what a last layer over many classes was given, where the outputs have one; else at the outputs."""
    tensors, rebuilt = output_tensors(outputs)
    made = {k: found for k, z in enumerate(tensors) if (found := _made(z)) is not None}
    if len(made) != 1:
        return Point(tensors, rebuilt)
    ((logits, of),) = made.items()
    return LastLayer(tensors, rebuilt, logits, of)


def _made(z: Tensor) -> Projected | None:
    base = unviewed(z)
    made: Projected | None = getattr(base, "projected", None)
    if made is None or made.version != base._version or z.numel() != base.numel() or z.dtype != made.x.dtype:
        return None
    rows = z.is_contiguous() and base.is_contiguous() and z.shape[-1] == len(made.weight)
    return made if rows else None


def at_the_last_layer(attempt: Callable[[PointOf], T]) -> T:
    """What `attempt` gives at the last layer, or where the loss needs more than its labels at the outputs."""
    try:
        return attempt(last_layer)
    except LogitsUsed:
        return attempt(Point.of)


def at_the_outputs(attempt: Callable[[PointOf], T]) -> T:
    """What `attempt` gives at the outputs."""
    return attempt(Point.of)
