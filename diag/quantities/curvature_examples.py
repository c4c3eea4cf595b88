"""Curvature seen from the examples: which of them carry the curvature of a direction.

All of it comes from products with the Jacobian, so no per-example gradient is ever formed. v is a flat vector of
the operator's size; an example is a row of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diag.errors import InvalidInput, Unsupported
from diag.quantities.batch import Batch
from diag.quantities.curvature import CurvatureOperator
from diag.quantities.curvature_objective import gradients
from diag.quantities.curvature_products import GaussNewtonGraph, OutputMap, loss_gradient


def output_changes(operator: CurvatureOperator, v: Tensor) -> Tensor:
    """J_i v for each example: the change of its outputs along v, (n, *output shape); cost one J product."""
    return _over_batches(operator, v, _identity, lambda batch, tangent, graph: tangent)


def curvature_shares(operator: CurvatureOperator, v: Tensor) -> Tensor:
    """(J_i v)^T S_i (J_i v) for each example, (n,): their mean is v^T G v, with G the Gauss-Newton matrix.

    An example's share of the curvature along v is its value over n v^T G v.
    """
    n = operator.num_examples

    def share(batch: Batch, tangent: Tensor, graph: GaussNewtonGraph) -> Tensor:
        (turned,) = graph.turned([tangent])  # carries the 1/n of the mean
        return n * _row_sums(tangent * turned)

    return _over_batches(operator, v, loss_gradient, share)


def slopes(operator: CurvatureOperator, v: Tensor) -> Tensor:
    """<g_i, v> for each example, (n,): how its own loss changes along v; their mean is <grad L, v>."""
    objective = operator.objective

    def slope(batch: Batch, tangent: Tensor, graph: GaussNewtonGraph) -> Tensor:
        z = graph.outputs[0].detach().requires_grad_()
        (gradient,) = gradients(objective.loss_of(graph.rebuilt([z]), batch), [z], create_graph=False)
        return _row_sums(tangent * (torch.zeros_like(z) if gradient is None else gradient)) * batch.size

    return _over_batches(operator, v, _identity, slope)


def _over_batches(
    operator: CurvatureOperator,
    v: Tensor,
    output_map: OutputMap,
    measure: Callable[[Batch, Tensor, GaussNewtonGraph], Tensor],
) -> Tensor:
    """measure(batch, J v, its graph) of each batch, one after the other along the examples."""
    if operator.self_test.method == "finite difference":
        raise Unsupported(
            "Products with the Jacobian need a model that can be differentiated twice, and here "
            f"{operator.self_test.reason}; replace that operation for the measurement."
        )
    operator._check(v, (operator.size,))
    objective, parts = operator.objective, []
    with objective.measured():
        parameters = objective.parameters()
        for batch in objective.batches:
            graph = GaussNewtonGraph(objective, parameters, [batch], output_map)
            tangents = graph.tangents(operator.layout.views(v))
            if len(tangents) != 1 or tangents[0].shape[:1] != (batch.size,):
                raise InvalidInput(
                    f"The model has outputs of shapes {[tuple(t.shape) for t in tangents]} for {batch.size} "
                    "examples; expected one tensor with the examples as its first axis."
                )
            parts.append(measure(batch, tangents[0], graph).detach())
    return torch.cat(parts)


def _row_sums(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1).sum(1, dtype=torch.float64)


def _identity(objective: object, outputs: Sequence[Tensor], rebuilt: object, batch: Batch) -> list[Tensor]:
    return [z * 1.0 for z in outputs]
