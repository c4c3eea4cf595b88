"""Curvature seen from the examples: who carries a direction's curvature, and the directions of the classes.

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
from diag.quantities.curvature_fisher import IGNORED_LABEL
from diag.quantities.curvature_objective import gradients, output_tensors
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


def class_directions(operator: CurvatureOperator) -> Tensor:
    """d_c for each class, (K, P): mean over examples i of class c and classes c' != c of
    sqrt(p_ic') grad (z_ic' - sum_k p_ik z_ik). They span the outliers of the cross-entropy's Hessian.

    One backward pass per class and batch. Source: Papyan (2019), arXiv:1901.08244, equation 28.
    Raises InvalidInput unless the targets are class numbers of (..., K) logits.
    """
    objective = operator.objective
    labels = [_labels(batch).to(operator.device) for batch in objective.batches]
    counts: Tensor | None = None
    directions = torch.empty(0)
    with objective.measured():
        parameters = objective.parameters()
        for batch, y in zip(objective.batches, labels, strict=True):
            (z,), _ = output_tensors(objective.outputs(parameters, batch))
            if z.shape[:-1].numel() != y.numel():
                raise InvalidInput(
                    f"The targets have shape {tuple(batch.targets.shape)} for outputs of shape {tuple(z.shape)}; "
                    "expected one class number for each row of logits."
                )
            z = z.reshape(-1, z.shape[-1])
            if counts is None:
                counts = torch.bincount(torch.cat([c[c >= 0] for c in labels]), minlength=z.shape[1])
                directions = torch.zeros(z.shape[1], operator.size, dtype=operator.dtype, device=operator.device)
            weights = _class_weights(z.detach(), y.clamp(min=0)) / counts[y.clamp(min=0)][:, None]
            for c in range(z.shape[1]):
                pulled = torch.autograd.grad(
                    z, parameters, weights * (y == c)[:, None], retain_graph=True, allow_unused=True
                )
                directions[c] += operator.layout.flatten(pulled, directions)
    return directions


def _class_weights(z: Tensor, labels: Tensor) -> Tensor:
    """w_i = 1/(K-1) sum over c' != c of sqrt(p_ic') (e_c' - p_i), one row for each example i of class c."""
    p = z.softmax(1)
    roots = p.sqrt().scatter(1, labels[:, None], 0.0)
    return (roots - p * roots.sum(1, keepdim=True)) / (z.shape[1] - 1)


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


def _labels(batch: Batch) -> Tensor:
    targets = batch.targets
    if not isinstance(targets, Tensor) or targets.is_floating_point():
        raise InvalidInput("The targets are not class numbers; class directions need a classification task.")
    flat = targets.reshape(-1)
    return torch.where(flat == IGNORED_LABEL, -1, flat)
