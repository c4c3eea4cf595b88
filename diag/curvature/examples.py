"""Curvature seen from the examples: which of them carry the curvature of a direction.

It comes from one product with the Jacobian, so no per-example gradient is ever formed. v is a flat vector of the
operator's size; an example is a row of the data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diag.curvature.operators import CurvatureOperator
from diag.curvature.products import GaussNewtonGraph, loss_gradient
from diag.errors import InvalidInput, Unsupported


def curvature_shares(operator: CurvatureOperator, v: Tensor) -> Tensor:
    """(J_i v)^T S_i (J_i v) for each example, (n,) float64: their mean is v^T G v, with G the Gauss-Newton matrix.

    An example's share of the curvature along v is its value over n v^T G v. Raises Unsupported where the model
    cannot be differentiated twice, InvalidInput where its outputs do not have the examples along their first axis.
    """
    if operator.self_test.differenced:
        raise Unsupported(
            "Products with the Jacobian need a model that can be differentiated twice, and here "
            f"{operator.self_test.reason}; replace that operation for the measurement."
        )
    operator.check(v, (operator.size,))
    objective, parts = operator.objective, []
    with objective.measured():
        parameters = objective.parameters()
        for batch in objective.batches:
            graph = GaussNewtonGraph(objective, parameters, [batch], loss_gradient)
            tangents = graph.tangents(operator.layout.views(v))
            if len(tangents) != 1 or tangents[0].shape[:1] != (batch.size,):
                raise InvalidInput(
                    f"The model has outputs of shapes {[tuple(t.shape) for t in tangents]} for {batch.size} "
                    "examples; expected one tensor with the examples as its first axis."
                )
            (turned,) = graph.turned(tangents)  # carries the 1/n of the mean
            parts.append((operator.num_examples * _row_sums(tangents[0] * turned)).detach())
    return torch.cat(parts)


def _row_sums(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1).sum(1, dtype=torch.float64)
