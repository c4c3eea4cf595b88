"""Activation matching: pair the units of two networks whose pre-activations correlate on a probe set.

The correlation of every unit of A with every unit of B is accumulated in float64 over the probe set, for each
operation whose output carries units (linear maps and convolutions; a residual stream has several). One linear
assignment a group, parents first. Source: Li et al. 2016; Jordan et al. 2023 (arXiv:2211.08403, section 2).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from diag.connectivity.alignment import Alignment, Ascent, result_of
from diag.connectivity.fit import check_states_fit
from diag.connectivity.matching import ActivationEvidence
from diag.connectivity.symmetries.find import find_symmetries
from diag.connectivity.symmetries.groups import Symmetries, UnitActivation, UnitBlock, UnitGroup
from diag.connectivity.symmetries.tracing import operation_name, unfused
from diag.errors import InvalidInput, Unsupported
from diag.snapshot.batch import Batch, tensors_in
from diag.snapshot.call_at import call_at
from diag.snapshot.preserve import preserved


def align_activations(
    symmetries: Symmetries,
    model: nn.Module,
    state_a: Mapping[str, Tensor],
    state_b: Mapping[str, Tensor],
    batches: Iterable[Batch],
) -> Alignment:
    """Activation matching of B to A on `batches` (in evaluation mode; the model is left as it was).

    Raises InvalidInput where the states do not fit or there is no batch, and Unsupported where the forward
    pass does other operations than at tracing.
    """
    check_states_fit(state_a, state_b, symmetries.shapes)
    moments = moments_of(model, state_a, state_b, batches, symmetries.groups)
    evidence = [m.evidence() for group in moments.values() for m in group if m.units]
    if not evidence:
        raise InvalidInput("Activation matching found no activation to pair; give at least one batch of data.")
    ascent = Ascent(symmetries, list(evidence))
    ascent.run(symmetries.order, max_passes=10)
    return result_of(ascent, symmetries.apply(ascent.element, state_b), 1, "activations")


def moments_of(
    model: nn.Module,
    state_a: Mapping[str, Tensor],
    state_b: Mapping[str, Tensor],
    batches: Iterable[Batch],
    units: Mapping[str, UnitGroup],
) -> dict[int, list[Moments]]:
    """Moments of the activations that carry `units`, by batch size: PyTorch may choose other operations for
    another. Raises Unsupported where the forward pass does other operations than at tracing."""
    moments: dict[int, list[Moments]] = {}
    with preserved(model), torch.no_grad(), unfused():
        for batch in batches:
            if batch.size not in moments:
                captures = find_symmetries(model, batch, check=False, max_examples=None).captures
                moments[batch.size] = [Moments(c, units) for c in captures]
            found = moments[batch.size]
            left, right = (_activations(model, s, batch, found) for s in (state_a, state_b))
            for moment, a, b in zip(found, left, right, strict=True):
                moment.add(a, b)
    return moments


class Moments:
    """Sums over examples and positions from which the correlations of one activation's units follow."""

    def __init__(self, capture: UnitActivation, groups: Mapping[str, UnitGroup]) -> None:
        self.capture, self.groups = capture, groups
        names = capture.block.names
        needed = {n for n in names if n in self.groups} | {
            p for n in names if n in self.groups for p in self.groups[n].parents
        }
        self.units = [i for i, n in enumerate(names) if n in needed]
        self.sizes = tuple(capture.block.sizes[i] for i in self.units)
        self.count = 0
        self.sums: list[Tensor | float] = [0.0] * 5

    def add(self, a: Tensor, b: Tensor) -> None:
        """Count the two networks' activation on a batch."""
        x, y = (self._rows(t) for t in (a, b))
        self.count += len(x)
        for i, value in enumerate((x.sum(0), y.sum(0), x.square().sum(0), y.square().sum(0), x.T @ y)):
            self.sums[i] = self.sums[i] + value

    def _rows(self, activation: Tensor) -> Tensor:
        """(observations, units), float64. Axes of the batch may be longer than at tracing."""
        block = self.capture.block
        axes = sorted({block.axis_of[i] for i in self.units})
        front = activation.movedim(axes, list(range(-len(axes), 0)))
        for k, axis in enumerate(axes):
            front = front.index_select(front.ndim - len(axes) + k, block.positions[axis].to(front.device))
        sizes = [block.sizes[i] for i in range(len(block.names)) if block.axis_of[i] in axes]
        values = front.reshape(-1, *sizes)
        names = [i for i in range(len(block.names)) if block.axis_of[i] in axes]
        order = [1 + names.index(i) for i in self.units]
        rest = [d for d in range(1, values.ndim) if d not in order]
        size = 1
        for n in self.sizes:
            size *= n
        return values.permute(0, *rest, *order).reshape(-1, size).double()

    def covariances(self) -> tuple[Tensor, Tensor, Tensor]:
        """The deviations of A's units and of B's, and the products of every unit of A with every one of B."""
        sum_x, sum_y, square_x, square_y, cross = (torch.as_tensor(s) / self.count for s in self.sums)
        squares = ((square_x, sum_x), (square_y, sum_y))
        deviations = [(s - m.square()).clamp_min(0).sqrt() for s, m in squares]
        return deviations[0], deviations[1], cross - torch.outer(sum_x, sum_y)

    def evidence(self) -> ActivationEvidence:
        """What align_activations weighs."""
        a, b, products = self.covariances()
        scale = torch.outer(a, b)
        correlations = torch.where(scale > 0, products / scale.clamp_min(1e-300), 0.0)
        block = self.capture.block
        kept = UnitBlock(
            positions=(torch.arange(len(a)),),
            names=tuple(block.names[i] for i in self.units),
            sizes=self.sizes,
            axis_of=(0,) * len(self.units),
        )
        return ActivationEvidence(kept, correlations.cpu().reshape(*self.sizes, *self.sizes), self.groups)


class _Recorder(TorchDispatchMode):
    """Keeps the outputs of chosen operations, by their number since the start of the pass."""

    def __init__(self, read: Mapping[int, str]) -> None:
        super().__init__()
        self.read, self.number = read, -1
        self.kept: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        self.number += 1
        if self.number in self.read:
            if operation_name(func) != self.read[self.number]:
                raise Unsupported(
                    f"Operation {self.number} of the forward pass is aten.{operation_name(func)} and was "
                    f"aten.{self.read[self.number]} at tracing; the model's operations depend on its data, so "
                    "align by weights instead."
                )
            self.kept[self.number] = tensors_in(outputs)[0].clone()  # later operations may write into it
        return outputs


def _activations(
    model: nn.Module, state: Mapping[str, Tensor], batch: Batch, moments: list[Moments]
) -> list[Tensor]:
    captures = [m.capture for m in moments]
    recorder = _Recorder({c.operation: c.name for c in captures})
    own = dict([*model.named_parameters(), *model.named_buffers()])
    # PyTorch chooses between matrix products by requires_grad too, so it has to be as at tracing.
    values = {n: t.detach().requires_grad_(own[n].requires_grad) for n, t in state.items() if n in own}
    with recorder:
        call_at(model, values, batch.args, batch.kwargs)
    missing = [c for c in captures if c.operation not in recorder.kept]
    if missing:
        raise Unsupported(
            f"The forward pass ended after {recorder.number + 1} operations, before aten.{missing[0].name} seen at "
            "tracing; the model's operations depend on its data, so align by weights instead."
        )
    return [recorder.kept[c.operation] for c in captures]
