"""Graphs from which curvature products are read: double backward for the Hessian, two passes for J^T S J.

A graph is built once for a list of batches and gives as many products as are asked for. Keeping it costs
memory and saves the forward and backward pass that every product would repeat otherwise. The second half of the
file holds the finite differences that the self-test compares with, and that stand in where they must.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from diag.curvature.objective import Objective, gradients
from diag.curvature.probe import hold_fixed, rows_held_fixed
from diag.curvature.vocabulary.jacobian import Point, PointOf, at_the_outputs
from diag.errors import Unsupported, type_of
from diag.linalg.deadline import Deadline
from diag.linalg.reductions import length
from diag.snapshot.batch import Batch

Pieces = Sequence[Tensor | None]  # one tensor for each parameter; None is zero

# m(z, batch): a map of the outputs whose Jacobian is the curvature S of the loss in the outputs.
OutputMap = Callable[[Objective, Sequence[Tensor], Callable[[Sequence[Tensor]], Any], Batch], Pieces]


class Graph(Protocol):
    """What gives products with the curvature of some batches."""

    def product(self, views: Sequence[Tensor], keep: bool) -> Pieces:
        """The product with a vector given as a piece for each parameter; `keep` if more will be asked for."""
        ...


class Curvature(Protocol):
    """One kind of curvature matrix of an objective."""

    def check(self, objective: Objective, parameters: Sequence[Tensor]) -> None:
        """Raises Unsupported where the matrix is not defined for this model's outputs."""
        ...

    def graph(self, objective: Objective, parameters: Sequence[Tensor], batches: Sequence[Batch]) -> Graph:
        """The part of `batches` in the curvature, as a graph."""
        ...

    def finite_difference(
        self, objective: Objective, parameters: Sequence[Tensor], direction: Sequence[Tensor], step: float
    ) -> Tensor:
        """The product with `direction` from first derivatives only, flat."""
        ...


class HessianOfLoss:
    """H = Hess L, by differentiating <grad L, v> (double backward)."""

    def check(self, objective: Objective, parameters: Sequence[Tensor]) -> None:
        """Nothing: every dependence of the loss counts."""

    def graph(self, objective: Objective, parameters: Sequence[Tensor], batches: Sequence[Batch]) -> HessianGraph:
        """The gradient over `batches` with its graph."""
        return HessianGraph(objective, parameters, batches)

    def finite_difference(
        self, objective: Objective, parameters: Sequence[Tensor], direction: Sequence[Tensor], step: float
    ) -> Tensor:
        """(grad L(theta + h d) - grad L(theta - h d)) / 2h, with an error of order h^2."""
        ahead = objective.gradient(objective.shifted(parameters, direction, step))
        return ahead.sub_(objective.gradient(objective.shifted(parameters, direction, -step))).div_(2 * step)


class HessianGraph:
    """sum_b (n_b / n) grad L_b, kept differentiable."""

    def __init__(self, objective: Objective, parameters: Sequence[Tensor], batches: Sequence[Batch]):
        self.parameters = parameters
        total: list[Tensor | None] = [None] * len(parameters)
        for batch in batches:
            loss = objective.loss(parameters, batch) * objective.weight(batch)
            total = _added(total, gradients(loss, parameters, create_graph=True))
        self.gradient = total

    def product(self, views: Sequence[Tensor], keep: bool) -> Pieces:
        """d <gradient, v> / d parameters."""
        return _pulled_back(self.gradient, self.parameters, views, keep)


def model_outputs(objective: Objective, parameters: Sequence[Tensor], batch: Batch) -> Any:
    """What J is the Jacobian of: the model's outputs."""
    return objective.outputs(parameters, batch)


class GeneralisedGaussNewton:
    """G = sum_b (n_b / n) J_b^T S_b J_b, with S the Jacobian of `output_map` (symmetric, block per example).

    at: where J and S meet (see `vocabulary.jacobian`).
    """

    def __init__(
        self,
        output_map: OutputMap,
        outputs: Callable[..., Any] = model_outputs,
        at: Callable[..., Any] = at_the_outputs,
    ):
        self.output_map, self.outputs, self.at = output_map, outputs, at

    def check(self, objective: Objective, parameters: Sequence[Tensor]) -> None:
        """Raises Unsupported where the loss depends on the parameters past the tensors in the outputs."""
        for batch in objective.batches:
            outputs = self.outputs(objective, parameters, batch)
            point = Point.of(outputs)
            values = point.rebuilt(point.leaves()) if point.tensors else outputs
            hidden = not point.tensors
            if self.output_map is loss_gradient:
                past = gradients(objective.loss_of(values, batch), parameters, create_graph=False)
                hidden = any(grad is not None for grad in past)
            if hidden:
                raise Unsupported(
                    f"The model returns {type_of(outputs)} that holds tensors out of reach; return a "
                    "tensor, or a tuple or dict of tensors, so that the loss can be differentiated by them."
                )

    def graph(
        self, objective: Objective, parameters: Sequence[Tensor], batches: Sequence[Batch]
    ) -> GaussNewtonGraph:
        """The outputs of `batches` with their graph, and the graph of the map."""
        return GaussNewtonGraph(objective, parameters, batches, self.output_map, self.outputs, self.at)

    def finite_difference(
        self, objective: Objective, parameters: Sequence[Tensor], direction: Sequence[Tensor], step: float
    ) -> Tensor:
        """J^T of the differenced map along the differenced outputs; each difference has an error of order h^2."""
        total = torch.zeros(objective.layout.size, dtype=objective.dtype, device=objective.device)
        ahead = objective.shifted(parameters, direction, step)
        behind = objective.shifted(parameters, direction, -step)
        for batch in objective.batches:
            pulled = self.at(partial(self._differenced, objective, batch, (behind, parameters, ahead), step))
            total += objective.layout.flatten(pulled, total)
        return total

    def _differenced(
        self,
        objective: Objective,
        batch: Batch,
        along: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]],
        step: float,
        point_of: PointOf,
    ) -> Pieces:
        """A batch's part. along: the parameters a step behind, in the middle and ahead."""
        behind, parameters, ahead = along
        point = point_of(self.outputs(objective, parameters, batch))
        plus = point_of(self.outputs(objective, ahead, batch)).tensors
        minus = point_of(self.outputs(objective, behind, batch)).tensors
        tangent = [(a.detach() - b.detach()) / (2 * step) for a, b in zip(plus, minus, strict=True)]
        del plus, minus
        turned = self._differenced_map(objective, point, tangent, batch)
        weighted = [t * objective.weight(batch) for t in turned]
        return torch.autograd.grad(point.tensors, parameters, weighted, allow_unused=True)

    def _differenced_map(
        self, objective: Objective, point: Point, tangent: Sequence[Tensor], batch: Batch
    ) -> list[Tensor]:
        outputs = point.tensors
        size = max(length(tangent), 1e-300)
        eps = max(torch.finfo(z.dtype).eps for z in outputs)
        step = eps ** (1 / 3) * max(length(outputs), 1e-3) / size

        def value(h: float) -> Pieces:
            return self.output_map(objective, *point.moved(tangent, h), batch)

        pairs = zip(value(step), value(-step), outputs, strict=True)
        return [
            torch.zeros_like(z) if a is None or b is None else torch.sub(a.detach(), b.detach()).div(2 * step)
            for a, b, z in pairs
        ]


class GaussNewtonGraph:
    """J v by differentiating J^T u in u, then S by differentiating the map, then J^T: no forward-mode needed.

    `outputs` is a function (objective, parameters, batch) -> what J is the Jacobian of, or `at` takes it there.
    """

    def __init__(
        self,
        objective: Objective,
        parameters: Sequence[Tensor],
        batches: Sequence[Batch],
        output_map: OutputMap,
        outputs: Callable[..., Any] = model_outputs,
        at: Callable[..., Any] = at_the_outputs,
    ):
        self.parameters = parameters
        self.outputs: list[Tensor] = []
        self.cotangents: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self.map: list[Tensor] = []
        self.pulled: list[Tensor | None] = [None] * len(parameters)
        for batch in batches:
            used = at(partial(_mapped, objective, batch, output_map, outputs(objective, parameters, batch)))
            self._add(used, objective.weight(batch))

    def _add(self, used: Sequence[tuple[Tensor, Tensor, Tensor]], weight: float) -> None:
        """used: see `_mapped`."""
        if not used:
            return
        outputs = [z for z, _, _ in used]
        cotangents = [torch.zeros_like(z).requires_grad_() for z in outputs]
        with torch.enable_grad():
            pulled = torch.autograd.grad(outputs, self.parameters, cotangents, create_graph=True, allow_unused=True)
            self.map += [m * weight for _, _, m in used]
        self.pulled = _added(self.pulled, pulled)
        self.outputs += outputs
        self.cotangents += cotangents
        self.leaves += [u for _, u, _ in used]

    def tangents(self, views: Sequence[Tensor]) -> list[Tensor]:
        """J v, one tensor for each output tensor of each batch."""
        found = _pulled_back(self.pulled, self.cotangents, views, keep=True)
        return [torch.zeros_like(u) if t is None else t for t, u in zip(found, self.cotangents, strict=True)]

    def turned(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        """S times tangents of the outputs, with the weight n_b / n."""
        found = _pulled_back(self.map, self.leaves, tangents, keep=True)
        return [torch.zeros_like(t) if s is None else s for s, t in zip(found, tangents, strict=True)]

    def product(self, views: Sequence[Tensor], keep: bool) -> Pieces:
        """J^T S J v."""
        return _pulled_back(self.outputs, self.parameters, self.turned(self.tangents(views)), keep)


def _mapped(
    objective: Objective, batch: Batch, output_map: OutputMap, outputs: Any, point_of: PointOf
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The tensors where J and S meet, leaves of their values, and the map of these."""
    point = point_of(outputs)
    leaves = point.leaves()
    rows = zip(point.tensors, leaves, output_map(objective, leaves, point.rebuilt, batch), strict=True)
    # An output that the loss does not use, or uses linearly, has no curvature.
    return [(z, u, m) for z, u, m in rows if m is not None and m.requires_grad]


class FiniteDifferenceGraph:
    """Products from two gradients each, for models that cannot be differentiated twice."""

    def __init__(self, curvature: Curvature, objective: Objective, parameters: Sequence[Tensor], step: float):
        self.curvature, self.objective, self.parameters = curvature, objective, parameters
        self.step = step * max(objective.length(parameters), 1e-3)

    def product(self, views: Sequence[Tensor], keep: bool) -> Pieces:
        """The product with a unit vector along v, scaled back."""
        size = self.objective.length(views)
        if size == 0:
            return [None] * len(views)
        unit = [v.to(self.objective.dtype) / size for v in views]
        product = self.curvature.finite_difference(self.objective, self.parameters, unit, self.step)
        return self.objective.layout.views(product * size)


def rebuilt_products(
    curvature: Curvature, objective: Objective, batches: Sequence[Batch], vectors: Tensor, deadline: Deadline
) -> Tensor:
    """Products with several vectors (k, P) from graphs that live for one micro-batch each."""
    products, views = torch.zeros_like(vectors), objective.layout.views
    with objective.measured():
        parameters = objective.parameters()
        for batch in batches:
            deadline.check()
            graph = curvature.graph(objective, parameters, [batch])
            for i, v in enumerate(vectors):
                pieces = graph.product(views(v), i < len(vectors) - 1)
                for into, piece in zip(views(products[i]), pieces, strict=True):
                    if piece is not None:
                        into.add_(piece.to_dense() if piece.layout != torch.strided else piece)
            del graph
    return products


def differenced_products(curvature: Curvature, objective: Objective, vectors: Tensor, step: float) -> Tensor:
    """Products with several vectors (k, P) from differences of the gradient, `step` apart."""
    fixed = rows_held_fixed(objective.model, objective)
    products = torch.empty_like(vectors)
    with objective.measured():
        graph = FiniteDifferenceGraph(curvature, objective, objective.parameters(), step)
        for v, product in zip(vectors, products, strict=True):
            free = hold_fixed(v.to(objective.dtype, copy=True), objective, fixed)
            found = objective.layout.flatten(graph.product(objective.layout.views(free), True), free)
            product.copy_(hold_fixed(found, objective, fixed))
    return products


def loss_gradient(
    objective: Objective, outputs: Sequence[Tensor], rebuilt: Callable[[Sequence[Tensor]], Any], batch: Batch
) -> Pieces:
    """The output map of the Gauss-Newton matrix: the loss's gradient in the outputs, as a graph."""
    return gradients(objective.loss_of(rebuilt(outputs), batch), outputs, create_graph=True)


def _pulled_back(outputs: Pieces, inputs: Sequence[Tensor], vectors: Sequence[Tensor], keep: bool) -> Pieces:
    """d <outputs, vectors> / d inputs over those outputs that depend on anything."""
    pairs = [(o, v) for o, v in zip(outputs, vectors, strict=True) if o is not None and o.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    return torch.autograd.grad(
        [o for o, _ in pairs],
        inputs,
        [v.to(o.dtype) for o, v in pairs],
        retain_graph=keep,
        allow_unused=True,
    )


def _added(total: Pieces, more: Pieces) -> list[Tensor | None]:
    return [b if a is None else a if b is None else a + b for a, b in zip(total, more, strict=True)]
