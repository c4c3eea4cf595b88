"""The output maps of Fisher matrices: their Jacobian in the outputs is the Fisher information S.

For logits of a categorical distribution the map is the softmax, whose Jacobian is diag(p) - p p^T; for the mean
of a Gaussian of unit variance it is the identity. The empirical Fisher is the Gauss-Newton matrix of half the
squared losses of the examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from diag.curvature.objective import Objective, output_tensors
from diag.curvature.products import GeneralisedGaussNewton, Pieces
from diag.errors import InvalidInput, MissingQuantity
from diag.snapshot.batch import Batch
from diag.snapshot.example_losses import example_losses
from diag.snapshot.forward import IGNORED_LABEL

LIKELIHOODS = ("categorical", "gaussian", "empirical")


def curvature(likelihood: str, class_dim: int | None) -> GeneralisedGaussNewton:
    """The curvature J^T S J of a likelihood."""
    if likelihood == "empirical":
        return GeneralisedGaussNewton(_mean_of_examples, losses_of_examples)
    if likelihood == "gaussian":
        return GeneralisedGaussNewton(_mean_of_examples)

    def softmax(objective: Objective, outputs: Sequence[Tensor], rebuilt: Any, batch: Batch) -> Pieces:
        logits = _logits(rebuilt(outputs), outputs)
        dim = class_dim if class_dim is not None else class_axis(logits, batch.targets)
        counted = counted_positions(batch.targets, logits, dim)
        probabilities = logits.softmax(dim) * (counted.unsqueeze(dim) if counted is not None else 1.0)
        positions = counted.sum() if counted is not None else logits.numel() / logits.shape[dim]
        return [probabilities / positions if z is logits else None for z in outputs]

    return GeneralisedGaussNewton(softmax)


def likelihood_of(targets: Any) -> str:
    """The model's own distribution: categorical where the targets are integers, else Gaussian of unit variance."""
    integers = isinstance(targets, Tensor) and not targets.is_floating_point()
    return "categorical" if integers else "gaussian"


def class_axis(logits: Tensor, targets: Any) -> int:
    """The axis of the classes: 1 where the targets have the logits' other axes (torch's convention), else -1."""
    if isinstance(targets, Tensor) and logits.ndim > 2:
        if targets.shape == logits.shape[:-1]:
            return -1
        if targets.shape == (logits.shape[0], *logits.shape[2:]):
            return 1
    return -1


def losses_of_examples(objective: Objective, parameters: Sequence[Tensor], batch: Batch) -> Tensor:
    """The loss of each example alone, (n_b,), with a graph.

    Raises InvalidInput where the outputs' first axis is not the examples.
    """
    outputs = objective.outputs(parameters, batch)
    tensors, _ = output_tensors(outputs)
    if any(z.ndim == 0 or z.shape[0] != batch.size for z in tensors):
        raise InvalidInput(
            f"The model's outputs have shapes {[tuple(z.shape) for z in tensors]} for {batch.size} examples; "
            "expected the examples as their first axis."
        )

    def loss(outputs: Any, targets: Any) -> Tensor:
        return objective.loss_of(outputs, replace(batch, targets=targets))

    return example_losses(loss, outputs, batch.targets, batch.size)


def _mean_of_examples(
    objective: Objective, outputs: Sequence[Tensor], rebuilt: Callable[..., Any], batch: Batch
) -> Pieces:
    return [z / batch.size for z in outputs]


def _logits(rebuilt: Any, outputs: Sequence[Tensor]) -> Tensor:
    if len(outputs) == 1:
        return outputs[0]
    found = rebuilt.get("logits") if isinstance(rebuilt, dict) else getattr(rebuilt, "logits", None)
    if not isinstance(found, Tensor):
        raise MissingQuantity(
            f"The model returns {len(outputs)} tensors and none is called logits; wrap it so that it "
            "returns the logits."
        )
    return found


def counted_positions(targets: Any, logits: Tensor, dim: int) -> Tensor | None:
    """Which positions count, where the targets are labels of the logits' positions: 1 or 0."""
    positions = logits.movedim(dim, -1).shape[:-1]
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.shape != positions:
        return None
    return (targets != IGNORED_LABEL).to(logits)
