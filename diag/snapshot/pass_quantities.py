"""What is read off the one forward pass over the data: logits, labels, features and the final classifier.

Each position whose label is not ignored counts as an example.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diag.errors import MissingQuantity
from diag.snapshot.batch import Batch
from diag.snapshot.forward import Looked, comparisons, forward_pass
from diag.snapshot.objective.comparison import Comparison
from diag.snapshot.objective.own_loss import NO_LOSS
from diag.snapshot.preserve import preserved
from diag.snapshot.snapshot import Snapshot


class Classifier(NamedTuple):
    """The final linear layer: weight (K, d) and bias (K), zeros where the layer has none."""

    weight: Tensor
    bias: Tensor


def inputs(snapshot: Snapshot) -> Any:
    """The model's inputs: a tensor (n, ...) where the model takes one tensor, else a tuple of batches' inputs."""
    batches = snapshot.batches
    if all(len(b.args) == 1 and not b.kwargs and isinstance(b.args[0], Tensor) for b in batches):
        return torch.cat([b.args[0] for b in batches])
    return tuple((b.args, b.kwargs) for b in batches)


def labels(snapshot: Snapshot) -> Tensor:
    """Class numbers, integer tensor (n,): those that the loss counts.

    Raises MissingQuantity where there are none.
    """
    return snapshot.all_rows(lambda: torch.cat([c.labels[c.counted] for c in comparisons(snapshot)]), "labels")


def targets(snapshot: Snapshot) -> Tensor:
    """What a regression asks for, floating tensor (n, ...).

    Raises MissingQuantity where the targets are not floating-point numbers, one or several an example.
    """
    return snapshot.all_rows(lambda: _targets(snapshot), "targets")


def _targets(snapshot: Snapshot) -> Tensor:
    found = [batch.targets for batch in snapshot.batches]
    for t, batch in zip(found, snapshot.batches, strict=True):
        if not isinstance(t, Tensor) or not t.is_floating_point() or not t.ndim or len(t) != batch.size:
            raise MissingQuantity(
                "the targets are not floating-point numbers, one or several an example; pass targets= yourself."
            )
    return torch.cat(found)


def logits(snapshot: Snapshot) -> Tensor:
    """What enters the softmax for each label, floating tensor (n, K), in the dtype in which it does."""
    return snapshot.all_rows(lambda: torch.cat([c.logits[c.counted] for c in comparisons(snapshot)]), "logits")


def logit_gradients(snapshot: Snapshot) -> Tensor:
    """d loss_i / d logits_i for each label alone, (n, K), in the dtype and by the loss that training uses."""
    return snapshot.all_rows(lambda: _logit_gradients(snapshot), "gradients by the logits")


def _logit_gradients(snapshot: Snapshot) -> Tensor:
    if snapshot.loss_fn is None and forward_pass(snapshot).looked[0].value is None:
        raise MissingQuantity(NO_LOSS)
    found = comparisons(snapshot)
    looked = forward_pass(snapshot).looked
    parts = [_gradients(snapshot, *row) for row in zip(looked, snapshot.batches, found, strict=True)]
    return torch.cat(parts)


def features(snapshot: Snapshot) -> Tensor:
    """The inputs of the final linear layer for each label, floating tensor (n, d)."""
    return snapshot.all_rows(lambda: _features(snapshot), "features")


def _features(snapshot: Snapshot) -> Tensor:
    comparisons(snapshot)
    found = forward_pass(snapshot).features
    if found is None:
        raise MissingQuantity(_NO_FINAL_LAYER)
    return found


def classifier(snapshot: Snapshot) -> Classifier:
    """Weight (K, d) and bias (K) of the final linear layer."""
    layer = forward_pass(snapshot).final_layer
    if layer is None:
        raise MissingQuantity(_NO_FINAL_LAYER)
    with preserved(snapshot.model), torch.no_grad():  # reading a parametrized weight may change its buffers
        weight = layer.weight.detach()
        bias = layer.bias.detach() if layer.bias is not None else weight.new_zeros(len(weight))
    return Classifier(weight, bias)


_NO_FINAL_LAYER = (
    "the model's outputs do not come from a final Linear layer; pass features= and classifier= yourself."
)


def layer_features(snapshot: Snapshot) -> dict[str, Tensor]:
    """The outputs of every leaf module on the data, flattened per example: name -> (n, size)."""
    parts: dict[str, list[Tensor]] = {}
    batches = snapshot.batches  # which may call the model, before anything listens

    def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            parts.setdefault(name, []).append(output.detach().flatten(1))

    leaves = [(n, m) for n, m in snapshot.model.named_modules() if not any(m.children())]
    hooks = [m.register_forward_hook(lambda *a, n=n: keep(n, *a)) for n, m in leaves]
    try:
        with preserved(snapshot.model), torch.no_grad():
            for batch in batches:
                batch.forward(snapshot.model)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def _gradients(snapshot: Snapshot, looked: Looked, batch: Batch, found: Comparison) -> Tensor:
    with torch.enable_grad():
        if found.call is not None:
            z = found.logits.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(found.row_losses(z).sum(), z)
            return gradient[found.counted]
        if not isinstance(looked.outputs, Tensor):
            raise MissingQuantity(
                "the outputs are not a plain tensor, so the loss cannot be differentiated by them."
            )
        z = looked.outputs.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(snapshot.batch_loss(z, batch.targets), z)
    classes = found.logits.shape[1]
    axis = -1 if z.shape[-1] == classes and z.shape[:-1].numel() == len(found.labels) else 1
    rows = gradient.movedim(axis, -1).reshape(-1, classes)[found.counted]
    # The batch's mean divides by the number of counted rows; undone, each row is its own loss's gradient.
    return rows * int(found.counted.sum())
