"""The trainable parameters of a model, as a dict and as one flat vector, and what is differentiated by them.

The order is that of `named_parameters()`: a tied tensor counts once, a frozen one not at all.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diag.checkpoints import as_checkpoint, load_into
from diag.distributed.together import Together
from diag.errors import CheckpointError, InvalidInput, MissingQuantity, type_of
from diag.snapshot.call_at import call_at
from diag.snapshot.objective.counting import counted_batches
from diag.snapshot.objective.over_ranks import weight_of
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


def flat_of(tensors: Iterable[Tensor]) -> Tensor:
    """One flat vector of the tensors in their order."""
    return torch.cat([(t.to_dense() if t.layout != torch.strided else t).reshape(-1) for t in tensors])


@dataclass(frozen=True)
class FlatLayout:
    """Where named tensors lie in one flat vector of length `size`: their names, shapes and slices, in order.

    Of trainable parameters the order is that of `named_parameters()`. A layer is a module that owns parameters; its
    parameters are neighbours in the flat vector, so a layer is one slice.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    slices: tuple[slice, ...]

    @classmethod
    def of(cls, shapes: Mapping[str, Sequence[int]]) -> FlatLayout:
        """The layout of tensors of these shapes, by name."""
        ends = [0, *itertools.accumulate(math.prod(shape) for shape in shapes.values())]
        slices = tuple(slice(a, b) for a, b in itertools.pairwise(ends))
        return cls(tuple(shapes), tuple(tuple(shape) for shape in shapes.values()), slices)

    @property
    def size(self) -> int:
        """P, the length of a flat vector."""
        return self.slices[-1].stop if self.slices else 0

    @property
    def columns(self) -> dict[str, slice]:
        """Name -> its slice of a flat vector."""
        return dict(zip(self.names, self.slices, strict=True))

    @property
    def layers(self) -> dict[str, slice]:
        """Layer name -> its slice, in order; see `layer_of`."""
        layers: dict[str, slice] = {}
        last = None
        for name, part in zip(self.names, self.slices, strict=True):
            layer = layer_of(name)
            if layer in layers and layer != last:  # not neighbours: keep the module's own full path
                layer = name.rpartition(".")[0] if name.rpartition(".")[0] not in layers else name
            layers[layer] = slice(layers[layer].start if layer in layers else part.start, part.stop)
            last = layer
        return layers

    def views(self, flat: Tensor) -> list[Tensor]:
        """The pieces of a flat vector (size,), each in its tensor's shape; they share memory."""
        return [flat[part].view(shape) for part, shape in zip(self.slices, self.shapes, strict=True)]

    def named_views(self, flat: Tensor) -> dict[str, Tensor]:
        """The same by name."""
        return dict(zip(self.names, self.views(flat), strict=True))

    def flatten(self, tensors: Iterable[Tensor | None], like: Tensor) -> Tensor:
        """One flat vector of `like`'s dtype and device from a tensor for each name; None counts as zeros."""
        pieces = []
        for tensor, part in zip(tensors, self.slices, strict=True):
            if tensor is None:
                pieces.append(like.new_zeros(part.stop - part.start))
            else:
                pieces.append(flat_of([tensor]).to(like.dtype))
        return torch.cat(pieces)

    def values(self, model: nn.Module) -> list[Tensor]:
        """The current values of a model's parameters of these names, detached; they share memory with it."""
        named = dict(model.named_parameters())
        return [named[name].detach() for name in self.names]


def params(snapshot: Snapshot) -> dict[str, Tensor]:
    """The trainable parameters by name (detached: no copy)."""
    return {name: p.detach() for name, p in trainable(snapshot.model).items()}


def gradient(snapshot: Snapshot) -> dict[str, Tensor]:
    """The gradient of the mean loss over the data, by parameter name; zeros where a parameter is unused."""
    together = snapshot.together
    return _own_gradient(snapshot) if together is None else _gradient_over_ranks(snapshot, together)


def _own_gradient(snapshot: Snapshot) -> dict[str, Tensor]:
    model, total = snapshot.model, snapshot.num_examples
    leaves = trainable(model)
    sums = {name: torch.zeros_like(p) for name, p in leaves.items()}
    with preserved(model), torch.enable_grad():
        for batch in counted_batches(snapshot):
            loss = snapshot.batch_loss(batch.forward(model), batch.targets)
            parts = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            for name, part in zip(leaves, parts, strict=True):
                if part is not None:
                    sums[name].add_(part.to_dense() if part.is_sparse else part, alpha=batch.size / total)
    return sums


def _gradient_over_ranks(snapshot: Snapshot, together: Together) -> dict[str, Tensor]:
    weight = weight_of(snapshot, together)
    leaves = trainable(snapshot.model)
    layout = FlatLayout.of({name: tuple(p.shape) for name, p in leaves.items()})
    like = torch.zeros(layout.size, dtype=torch.float64, device=next(iter(leaves.values())).device)
    flat = together.sum(lambda: weight * layout.flatten(_own_gradient(snapshot).values(), like), like)
    views = layout.named_views(flat)
    return {name: views[name].to(p.dtype) for name, p in leaves.items()}


def loss_at(snapshot: Snapshot) -> Callable[[Mapping[str, Tensor]], float]:
    """A function of parameter values (a dict by name) that gives the mean loss over the data in float64."""
    model = snapshot.model

    def loss(values: Mapping[str, Tensor]) -> float:
        total = 0.0
        with preserved(model), torch.no_grad():
            for batch in counted_batches(snapshot):
                outputs = call_at(model, values, batch.args, batch.kwargs)
                total += float(snapshot.batch_loss(outputs, batch.targets)) * batch.size
        return total / snapshot.num_examples

    together = snapshot.together
    if together is None:
        return loss
    weight = weight_of(snapshot, together)
    one = torch.zeros(1, dtype=torch.float64, device=together.device)
    return lambda values: float(together.sum(lambda: (weight * loss(values)) * torch.ones_like(one), one))


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
    if not isinstance(values, Mapping):
        raise InvalidInput(f"{argument} is {type_of(state)}; expected a state dict, a module or a Snapshot.")
    expected = params(snapshot)
    wrong = _differing(values, expected)
    if wrong and not _differing(named := _as_loaded(snapshot.model, values, argument), expected):
        values, wrong = named, []
    if wrong:
        name = wrong[0]
        found = f"has shape {tuple(values[name].shape)}" if name in values else "is missing"
        more = f", and {len(wrong) - 1} more differ" if len(wrong) > 1 else ""
        raise InvalidInput(
            f"{name} {found} in {argument}=; expected shape {tuple(expected[name].shape)}{more}: give a state of "
            "the same architecture."
        )
    return {name: values[name].detach() for name in expected}


def copy_with(model: nn.Module, state: Any, argument: str) -> nn.Module:
    """A copy of the model with a state: a state dict, a module or a Snapshot. Raises CheckpointError where it does
    not fit."""
    found = copy.deepcopy(model)
    values = getattr(getattr(state, "model", state), "state_dict", lambda: state)()
    load_into(found, as_checkpoint(values, argument))
    return found


def _differing(values: Mapping[str, Any], expected: Mapping[str, Tensor]) -> list[str]:
    return [n for n, p in expected.items() if n not in values or values[n].shape != p.shape]


def _as_loaded(model: nn.Module, state: Any, argument: str) -> Mapping[str, Any]:
    """The state under the names of the model, as a file with a wrapper's prefixes is read; empty where none
    fits."""
    try:
        return dict(copy_with(model, state, argument).named_parameters())
    except CheckpointError:
        return {}
