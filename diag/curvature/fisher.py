"""The output maps of Fisher matrices: their Jacobian in the outputs is the Fisher information S.

For logits of a categorical distribution the map is the softmax, whose Jacobian is diag(p) - p p^T; for the mean
of a Gaussian of unit variance it is the identity. The empirical Fisher is the Gauss-Newton matrix of half the
squared losses of the examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diag.curvature.objective import Objective, output_tensors
from diag.curvature.products import GeneralisedGaussNewton, Pieces
from diag.errors import InvalidInput, MissingQuantity
from diag.snapshot.batch import Batch, tensors_in
from diag.snapshot.example_losses import example_losses
from diag.snapshot.forward import comparisons, forward_pass
from diag.snapshot.objective.comparison import IGNORED_LABEL
from diag.snapshot.objective.shares import Counted, plain_targets
from diag.snapshot.snapshot import Snapshot

LIKELIHOODS = ("categorical", "gaussian", "empirical")


def curvature(likelihood: str, class_dim: int | None, ignored: int = IGNORED_LABEL) -> GeneralisedGaussNewton:
    """The curvature J^T S J of a likelihood; `ignored`: the label of positions that do not count."""
    if likelihood == "empirical":
        return GeneralisedGaussNewton(_mean_of_examples, losses_of_examples)
    if likelihood == "gaussian":
        return GeneralisedGaussNewton(_mean_of_examples)

    def softmax(objective: Objective, outputs: Sequence[Tensor], rebuilt: Any, batch: Batch) -> Pieces:
        logits = _logits(rebuilt(outputs), outputs)
        targets = plain_targets(batch.targets)
        dim = class_dim if class_dim is not None else class_axis(logits, targets)
        counted = counted_positions(targets, logits, dim, ignored)
        positions: Any = counted.sum() if counted is not None else logits.numel() / logits.shape[dim]
        if isinstance(batch.targets, Counted):
            counted, positions = _weighed(counted, batch.targets.shares.to(logits), positions)
        probabilities = logits.softmax(dim) * (counted.unsqueeze(dim) if counted is not None else 1.0)
        return [probabilities / positions if z is logits else None for z in outputs]

    return GeneralisedGaussNewton(softmax)


def _weighed(counted: Tensor | None, shares: Tensor, positions: Any) -> tuple[Tensor | None, Any]:
    """Which positions count how much, and what the batch's mean divides by, where examples have shares."""
    if counted is None or counted.shape == shares.shape:  # one label each
        return shares if counted is not None else None, len(shares)
    return counted, positions / shares.mean()


def shape_of_logits(snapshot: Snapshot) -> tuple[int, int]:
    """The axis of the classes in the outputs, and the label that the snapshot's loss ignores.

    Raises MissingQuantity where what the loss compares with classes is not the outputs, position by position.
    """
    found, outputs = comparisons(snapshot)[0], forward_pass(snapshot).looked[0].outputs
    classes = found.logits.shape[1]
    for z in tensors_in(outputs):
        for dim in {-1: None, 1: None} if z.ndim > 2 else {-1: None}:
            if z.ndim < 2 or z.shape[dim] != classes:
                continue
            rows = z.movedim(dim, -1).reshape(-1, classes)
            if rows.shape == found.logits.shape and torch.equal(rows.double(), found.logits.double()):
                ignored = (
                    IGNORED_LABEL if found.call is None else found.call.settings.get("ignore_index", IGNORED_LABEL)
                )
                return dim, ignored
    raise MissingQuantity(
        "the loss compares something else with the labels than the outputs, position by position (they are "
        "shifted, scaled or normalised on the way); wrap the model so that it returns what enters the loss."
    )


def likelihood_of(targets: Any) -> str:
    """The model's own distribution: categorical where the targets are integers, else Gaussian of unit variance."""
    targets = plain_targets(targets)
    integers = isinstance(targets, Tensor) and not targets.is_floating_point()
    return "categorical" if integers else "gaussian"


def class_axis(logits: Tensor, targets: Any) -> int:
    """The axis of the classes: 1 where the targets have the logits' other axes (torch's convention), else -1."""
    positions = (logits.shape[0], *logits.shape[2:])
    return 1 if isinstance(targets, Tensor) and logits.ndim > 2 and targets.shape == positions else -1


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


def counted_positions(targets: Any, logits: Tensor, dim: int, ignored: int = IGNORED_LABEL) -> Tensor | None:
    """Which positions count, where the targets are labels of the logits' positions: 1 or 0."""
    positions = logits.movedim(dim, -1).shape[:-1]
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.shape != positions:
        return None
    return (targets != ignored).to(logits)
