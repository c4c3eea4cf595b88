"""The trainable parameters of a model, as a dict and as one flat vector, and what is differentiated by them.

The order is that of `named_parameters()`: a tied tensor counts once, a frozen one not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diag.errors import InvalidInput, MissingQuantity
from diag.snapshot.call_at import call_at
from diag.snapshot.preserve import preserved
from diag.snapshot.snapshot import Snapshot


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name. Raises MissingQuantity where there is none."""
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise MissingQuantity("the model has no trainable parameter; set requires_grad on what should be measured.")
    return found


def layer_of(parameter: str) -> str:
    """The layer that a parameter belongs to, by name: "encoder.0.weight" -> "encoder.0".

    That is the module that owns it. A parametrised weight ("fc.parametrizations.weight.original0") belongs to the
    module that it parametrises, "fc"; a parameter of the model itself goes by its own name.
    """
    owner, parametrised, rest = f".{parameter}".partition(".parametrizations.")
    own = f"{owner}.{rest.partition('.')[0]}" if parametrised else owner
    return own.rpartition(".")[0].removeprefix(".") or own.removeprefix(".")


def flatten(tensors: Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
    """One flat vector (P,) of the tensors in their order."""
    values = tensors.values() if isinstance(tensors, Mapping) else tensors
    return torch.cat([t.detach().reshape(-1) for t in values])


def unflatten(vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `flatten`: views of `vector` (P,) in the shapes of `like`."""
    parts = vector.split([t.numel() for t in like.values()])
    return {name: part.view(t.shape) for (name, t), part in zip(like.items(), parts, strict=True)}


def params(snapshot: Snapshot) -> dict[str, Tensor]:
    """The trainable parameters by name (detached: no copy)."""
    return {name: p.detach() for name, p in trainable(snapshot.model).items()}


def gradient(snapshot: Snapshot) -> dict[str, Tensor]:
    """The gradient of the mean loss over the data, by parameter name; zeros where a parameter is unused."""
    model, total = snapshot.model, snapshot.num_examples
    leaves = trainable(model)
    sums = {name: torch.zeros_like(p) for name, p in leaves.items()}
    with preserved(model), torch.enable_grad():
        for batch in snapshot.batches:
            loss = snapshot.batch_loss(batch.forward(model), batch.targets)
            parts = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            for name, part in zip(leaves, parts, strict=True):
                if part is not None:
                    sums[name].add_(part.to_dense() if part.is_sparse else part, alpha=batch.size / total)
    return sums


def loss_at(snapshot: Snapshot) -> Callable[[Mapping[str, Tensor]], float]:
    """A function of parameter values (a dict by name) that gives the mean loss over the data in float64."""
    model = snapshot.model

    def loss(values: Mapping[str, Tensor]) -> float:
        total = 0.0
        with preserved(model), torch.no_grad():
            for batch in snapshot.batches:
                outputs = call_at(model, values, batch.args, batch.kwargs)
                total += float(snapshot.batch_loss(outputs, batch.targets)) * batch.size
        return total / snapshot.num_examples

    return loss


def other_params(snapshot: Snapshot) -> dict[str, Tensor]:
    """The other network's values of the trainable parameters, by name.

    Raises MissingQuantity without `other=`, InvalidInput where it does not fit the model.
    """
    return values_of(snapshot, snapshot.other, "other")


def values_of(snapshot: Snapshot, state: Any, argument: str) -> dict[str, Tensor]:
    """The values of the trainable parameters, by name, in the state given as `argument`."""
    if state is None:
        raise MissingQuantity(f"the snapshot has none; give it {argument}= a state dict or a Snapshot.")
    values = getattr(getattr(state, "model", state), "state_dict", lambda: state)()
    wanted = params(snapshot)
    wrong = [n for n, p in wanted.items() if n not in values or values[n].shape != p.shape]
    if wrong:
        name = wrong[0]
        found = f"has shape {tuple(values[name].shape)}" if name in values else "is missing"
        more = f", and {len(wrong) - 1} more differ" if len(wrong) > 1 else ""
        raise InvalidInput(
            f"{name} {found} in {argument}=; expected shape {tuple(wanted[name].shape)}{more}: give a state of the "
            "same architecture."
        )
    return {name: values[name].detach() for name in wanted}
