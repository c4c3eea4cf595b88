"""Call a model with other tensors in place of its own, and put its own back exactly.

`torch.func.functional_call` restores in the order in which it swapped. A module that stands under two names is
swapped twice, and the second restoring puts the foreign tensor back: the model has lost its parameter. Here each
place that holds a tensor (one module, one attribute) is swapped once, whatever the number of its names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diag.errors import InvalidInput, Unsupported
from diag.snapshot.state.host import as_the_program
from diag.snapshot.state.python import renew
from diag.snapshot.state.tensors import keeper_of


class Place(NamedTuple):
    """Where one module holds one tensor: its dict of parameters or buffers, and the key in it."""

    held: MutableMapping[str, Tensor | None]
    key: str


def call_at(
    model: nn.Module,
    values: Mapping[str, Tensor],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """What `model(*args, **kwargs)` gives with `values` (by parameter or buffer name) in place of its own tensors.

    A tied tensor is replaced under all of its names, whichever of them is given. A tensor that the call itself
    binds to one of these names is dropped; `values` is not changed. Raises InvalidInput for a name that the model
    does not have, and for two names of one tensor with different values; Unsupported where the model is
    TorchScript.
    """
    renew(model)
    with placed(model, values), as_the_program():
        return model(*args, **(kwargs or {}))


@contextmanager
def placed(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the context the model holds `values`; see `call_at`."""
    if isinstance(model, torch.jit.ScriptModule):
        raise Unsupported(
            "The model is compiled to TorchScript, whose parameters cannot be moved; measure the Python module "
            "that it was made from."
        )
    if keeper := keeper_of(model):
        raise Unsupported(
            f"The model's parameters are put in place at each call by {keeper}; measure a copy of the model that "
            "holds them itself."
        )
    by_tensor = _by_tensor(model, values)
    held = [(place, place.held[place.key]) for place in _places(model)]
    own = [(place, tensor) for place, tensor in held if id(tensor) in by_tensor]
    try:
        for place, tensor in own:
            place.held[place.key] = by_tensor[id(tensor)]
        yield
    finally:
        for place, tensor in reversed(own):
            place.held[place.key] = tensor


def _by_tensor(model: nn.Module, values: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """The value for each of the model's tensors, by the id of that tensor."""
    found: dict[int, Tensor] = {}
    names: dict[int, str] = {}
    for name, value in values.items():
        own = _tensor_named(model, name)
        if own is None:
            raise InvalidInput(
                f"The model has no parameter or buffer {name!r}; give values by the names of named_parameters()."
            )
        known = found.setdefault(id(own), value)
        if not _same(known, value):
            raise InvalidInput(
                f"{names[id(own)]} and {name} are one tensor of the model, and two different values are given for "
                "it; give one."
            )
        names.setdefault(id(own), name)
    return found


def _tensor_named(model: nn.Module, name: str) -> Tensor | None:
    *path, key = name.split(".")
    module: nn.Module | None = model
    for part in path:
        module = module._modules.get(part) if module is not None else None
    if module is None:
        return None
    return next((held[key] for held in _held(module) if key in held), None)


def _places(model: nn.Module) -> Iterator[Place]:
    """Each place once: a module may have several names, and a shallow copy of one shares its dicts."""
    seen: set[int] = set()
    for module in model.modules():
        for held in _held(module):
            if id(held) not in seen:
                seen.add(id(held))
                yield from (Place(held, key) for key in held)


def _held(module: nn.Module) -> tuple[MutableMapping[str, Tensor | None], ...]:
    return module._parameters, module._buffers  # type: ignore[return-value]


def _same(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    alike = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    # With gradients it would matter which of the two is differentiated by.
    return alike and not a.requires_grad and not b.requires_grad and torch.equal(a, b)
