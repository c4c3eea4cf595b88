"""What one forward pass over the data gives: logits, labels, losses, features and the final classifier.

All quantities here come from one pass, which is made when the first of them is asked for. A sequence model's
(n, T, K) outputs count each position whose label is not ignored as an example.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diag.errors import MissingQuantity
from diag.snapshot.example_losses import example_losses
from diag.snapshot.explain import CALL_ERRORS, explained
from diag.snapshot.preserve import preserved
from diag.snapshot.snapshot import Snapshot

IGNORED_LABEL = -100  # the convention of torch's cross_entropy and of Hugging Face


class Classifier(NamedTuple):
    """The final linear layer: weight (K, d) and bias (K), zeros where the layer has none."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class ForwardPass:
    """Everything that one pass gives; what could not be had is None, with the reason in `missing`."""

    outputs: tuple[Any, ...]
    features: Tensor | None
    final_layer: nn.Linear | None


def inputs(snapshot: Snapshot) -> Any:
    """The model's inputs: a tensor (n, ...) where the model takes one tensor, else a tuple of batches' inputs."""
    batches = snapshot.batches
    if all(len(b.args) == 1 and not b.kwargs and isinstance(b.args[0], Tensor) for b in batches):
        return torch.cat([b.args[0] for b in batches])
    return tuple((b.args, b.kwargs) for b in batches)


def labels(snapshot: Snapshot) -> Tensor:
    """Class numbers, integer tensor (n,). Raises MissingQuantity where the targets are not class numbers."""
    flat = [b.targets for b in snapshot.batches]
    if not all(isinstance(t, Tensor) and not t.is_floating_point() and not t.is_complex() for t in flat):
        raise MissingQuantity("the targets are not class numbers (integers); this needs a classification task.")
    values = torch.cat([t.reshape(-1) for t in flat])
    return values[values != IGNORED_LABEL]


def logits(snapshot: Snapshot) -> Tensor:
    """The outputs before the softmax, floating tensor (n, K), in the dtype in which the model gives them."""
    parts = []
    for outputs, batch in zip(_pass(snapshot).outputs, snapshot.batches, strict=True):
        z = output_tensor(outputs)
        parts.append(z.reshape(-1, z.shape[-1])[_kept(batch.targets, z)])
    return torch.cat(parts)


def losses(snapshot: Snapshot) -> Tensor:
    """The loss of each example alone, floating tensor (n,), by the snapshot's own loss_fn.

    Raises MissingQuantity without a loss_fn, and InvalidInput where loss_fn is not a mean over examples.
    """
    parts = []
    with preserved(snapshot.model), torch.no_grad():
        for outputs, batch in zip(_pass(snapshot).outputs, snapshot.batches, strict=True):
            if snapshot.loss_fn is None:
                snapshot.batch_loss(outputs, batch.targets)  # says so where there is none at all
                raise MissingQuantity(
                    "the model gives its own loss, a mean over the batch, which shows no single example's; give "
                    "loss_fn= for that: loss_fn(outputs, targets)."
                )
            parts.append(example_losses(snapshot.batch_loss, outputs, batch.targets, batch.size))
    return torch.cat(parts)


def previous_losses(snapshot: Snapshot) -> Tensor:
    """The losses (n,) of the snapshot's `previous` state on the same data."""
    state = snapshot.previous
    if state is None:
        raise MissingQuantity("the snapshot has no earlier state; give it previous= a state dict or a Snapshot.")
    earlier = copy.deepcopy(snapshot.model)
    earlier.load_state_dict(getattr(getattr(state, "model", state), "state_dict", lambda: state)())
    return losses(snapshot.with_data(snapshot.batches, model=earlier))


def logit_gradients(snapshot: Snapshot) -> Tensor:
    """d loss_i / d logits_i for each example alone, (n, K), in the dtype and by the loss that training uses."""
    parts = []
    for outputs, batch in zip(_pass(snapshot).outputs, snapshot.batches, strict=True):
        if not isinstance(outputs, Tensor):
            raise MissingQuantity("the outputs are no plain tensor, so the loss cannot be differentiated by them.")
        z = outputs.detach().requires_grad_()
        with torch.enable_grad():
            total = snapshot.batch_loss(z, batch.targets)
            (gradient,) = torch.autograd.grad(total, z)
        kept = _kept(batch.targets, z)
        # The batch's mean divides by the number of counted rows; undone, each row is its own loss's gradient.
        parts.append(gradient.reshape(-1, z.shape[-1])[kept] * int(kept.sum()))
    return torch.cat(parts)


def features(snapshot: Snapshot) -> Tensor:
    """The inputs of the final linear layer, floating tensor (n, d)."""
    found = _pass(snapshot).features
    if found is None:
        raise MissingQuantity(_NO_FINAL_LAYER)
    return found


def classifier(snapshot: Snapshot) -> Classifier:
    """Weight (K, d) and bias (K) of the final linear layer."""
    layer = _pass(snapshot).final_layer
    if layer is None:
        raise MissingQuantity(_NO_FINAL_LAYER)
    with preserved(snapshot.model):  # reading a weight under spectral norm advances it in training mode
        weight = layer.weight.detach()
        bias = layer.bias.detach() if layer.bias is not None else weight.new_zeros(len(weight))
    return Classifier(weight, bias)


_NO_FINAL_LAYER = (
    "the model's outputs do not come from a final Linear layer; pass features= and classifier= yourself."
)


def layer_features(snapshot: Snapshot) -> dict[str, Tensor]:
    """The outputs of every leaf module on the data, flattened per example: name -> (n, size)."""
    parts: dict[str, list[Tensor]] = {}

    def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            parts.setdefault(name, []).append(output.detach().flatten(1))

    leaves = [(n, m) for n, m in snapshot.model.named_modules() if not any(m.children())]
    hooks = [m.register_forward_hook(lambda *a, n=n: keep(n, *a)) for n, m in leaves]
    try:
        _run(snapshot)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def output_tensor(outputs: Any) -> Tensor:
    """The tensor of logits in whatever a model returns: a tensor, a tuple, or an object with `.logits`."""
    if isinstance(outputs, Tensor):
        return outputs
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if found is None and isinstance(outputs, (tuple, list)) and outputs and isinstance(outputs[0], Tensor):
        found = outputs[0]
    if not isinstance(found, Tensor):
        raise MissingQuantity(
            f"the model returns a {type(outputs).__name__} without logits; wrap it so that it returns a tensor."
        )
    return found


def _pass(snapshot: Snapshot) -> ForwardPass:
    return snapshot.once("forward pass", lambda: _run(snapshot))


def _run(snapshot: Snapshot) -> ForwardPass:
    calls: list[tuple[nn.Linear, Tensor, Tensor]] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if args and isinstance(args[0], Tensor):
            calls.append((module, args[0], output))  # type: ignore[arg-type]

    hooks = [m.register_forward_hook(keep) for m in snapshot.model.modules() if isinstance(m, nn.Linear)]
    outputs, features, final = [], [], None
    try:
        with preserved(snapshot.model), torch.no_grad():
            for batch in snapshot.batches:
                snapshot.deadline.check()
                calls.clear()
                outputs.append(batch.forward(snapshot.model))
                final, feature = _final_layer(calls, outputs[-1], batch.targets)
                features.append(feature)
    except CALL_ERRORS as error:
        raise explained(snapshot.model, snapshot.batches, error) from error
    finally:
        for hook in hooks:
            hook.remove()
    found = [f for f in features if f is not None]
    return ForwardPass(tuple(outputs), torch.cat(found) if len(found) == len(features) else None, final)


def _final_layer(calls: list[Any], outputs: Any, targets: Any) -> tuple[nn.Linear | None, Tensor | None]:
    # The final layer is the Linear whose output is, in the same memory, what the model returned.
    try:
        z = output_tensor(outputs)
    except MissingQuantity:
        return None, None
    for module, x, y in reversed(calls):
        if y.data_ptr() == z.data_ptr() and y.numel() == z.numel():
            return module, x.reshape(-1, x.shape[-1])[_kept(targets, z)]
    return None, None


def _kept(targets: Any, z: Tensor) -> Tensor:
    rows = z.numel() // z.shape[-1]
    if isinstance(targets, Tensor) and not targets.is_floating_point() and targets.numel() == rows:
        return targets.reshape(-1) != IGNORED_LABEL
    return torch.ones(rows, dtype=torch.bool, device=z.device)
