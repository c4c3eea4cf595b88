"""A copy of a sharded model that this process holds whole: plain tensors, and no hook that shards or gathers.

Under `fully_shard` (FSDP2) and tensor parallelism a module's parameters are DTensors, and hooks of
torch.distributed move them about. What is measured is a copy without either, made on every rank at once; its values
are those of the sharded model, bit for bit. The model itself is left alone, so that its training is not affected.
"""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diag.distributed.placement import data_apart, is_flat, is_spread, placements_of
from diag.distributed.together import Together
from diag.errors import Unsupported
from diag.snapshot.batch import Batch, tensors_in
from diag.snapshot.preserve import preserved
from diag.snapshot.state.hooks import OF_MODULES, home_of

ROOM = 4  # times the size of the parameters that measuring on a whole copy takes: values, gradient, vector, product
TOO_LARGE = (
    "The parameters are sharded over ranks ({} has placement {}), and a whole copy of them, with what measuring "
    "takes, needs {} GiB on each rank, where {} GiB are free; give more memory, or fewer ranks on a machine."
)
ANOTHER = (
    "The model under tensor parallelism and a whole copy of it give different outputs, as where its code divides "
    "the number of heads by the number of ranks; measure the network without tensor parallelism."
)
OUTPUTS_WITHIN = 1e-3
HOOK_FLAGS = {
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
}


# What torch's contract API (`fully_shard`, `replicate`) keeps in a module under a random name.
STATE_OF_SHARDING = "__composable_api_state_key"


def is_sharded(model: nn.Module) -> bool:
    """Whether some parameter or buffer is a DTensor, or the model is under FSDP1."""
    return bool(sharded_as(model))


def sharded_as(model: nn.Module) -> str:
    """The first parameter that is sharded and how it lies, "" where each is whole."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_spread(tensor) and tensor.device_mesh.size() > 1:  # type: ignore[attr-defined]
            return f"{name} has placement {tensor.placements}"  # type: ignore[attr-defined]
    return "FullyShardedDataParallel (FSDP1) holds flat pieces of them" if is_flat(model) else ""


class Whole(NamedTuple):
    """The copy, and its tensors by the id of the model's own."""

    model: nn.Module
    tensors: dict[int, Any]


def whole_copy(model: nn.Module, together: Together, free: float, first_buffers: bool = False) -> Whole:
    """The copy; every rank makes it at the same time. free: bytes that this rank may take. first_buffers: all ranks
    get the buffers of rank 0, as running means differ between ranks in training.

    Raises Unsupported, on every rank, where the parts cannot be put together or a whole copy does not fit.
    """
    parameters = dict(model.named_parameters())
    for placement in placements_of(model, parameters, together.world).values():
        if placement.why:
            raise Unsupported(placement.why)
    _refuse_too_large(parameters, together.least(free))
    buffers = list(model.buffers())
    tensors = _all_whole([*parameters.values(), *buffers], together, buffers if first_buffers else ())
    return Whole(bare_copy(model, tensors)[0], tensors)


def bare_copy(model: nn.Module, tensors: Mapping[int, Any]) -> tuple[nn.Module, dict[int, Any]]:
    """A copy of the model without torch's hooks that has these tensors, by the id of its own, and the copy's
    modules by the id of the model's."""
    modules = {id(m): _bare(m) for m in model.modules()}
    memo: dict[int, Any] = {**tensors, **modules}
    for module in model.modules():
        vars(modules[id(module)]).update(_copied(module, memo))
    return modules[id(model)], modules


def whole_optimizer(optimizer: Optimizer, tensors: Mapping[int, Any], together: Together) -> Optimizer:
    """A copy of the optimizer that holds the parameters of a whole copy, with its moments whole too."""
    copied = type(optimizer).__new__(type(optimizer))
    vars(copied).update(vars(optimizer))
    held = {p: s for p, s in optimizer.state.items() if id(p) in tensors}
    moments = [v for state in held.values() for v in state.values() if isinstance(v, Tensor)]
    whole = _all_whole(moments, together)
    copied.param_groups = [
        {**group, "params": [tensors.get(id(p), p) for p in group["params"]]} for group in optimizer.param_groups
    ]
    copied.state = defaultdict(dict)
    for parameter, state in held.items():
        copied.state[tensors[id(parameter)]] = {k: whole.get(id(v), v) for k, v in state.items()}
    return copied


def _all_whole(tensors: Sequence[Tensor], together: Together, of_first: Sequence[Tensor] = ()) -> dict[int, Any]:
    """Each tensor whole, by its id. Room is made on all ranks before anything is sent."""
    found: dict[int, Tensor] = {}
    first = {id(tensor) for tensor in of_first}

    def make_room() -> None:
        for tensor in tensors:
            found[id(tensor)] = together.own_block(tensor, id(tensor) in first)

    together.all_succeed(make_room)
    for tensor in tensors:
        values = together.filled(tensor, found[id(tensor)], id(tensor) in first)
        parameter = isinstance(tensor, nn.Parameter)
        found[id(tensor)] = nn.Parameter(values, tensor.requires_grad) if parameter else values
    return found


def refuse_another_function(model: nn.Module, copied: nn.Module, batch: Batch, together: Together) -> None:
    """Raise Unsupported, on every rank, where the copy of a model under tensor parallelism gives different outputs.

    Its code may rely on the shapes of a rank's part, as where the number of heads was divided by that of ranks.
    """
    if data_apart(model):
        return

    def compare() -> None:
        found = []
        for each in (model, copied):
            with preserved(each), torch.no_grad():
                found.append([_plain(t).double() for t in tensors_in(batch.forward(each)) if t.is_floating_point()])
        for ours, theirs in zip(*found, strict=True):
            size = max(float(theirs.abs().max()), 1e-30) if theirs.numel() else 1.0
            if ours.shape != theirs.shape or float((ours - theirs).abs().max()) > OUTPUTS_WITHIN * size:
                raise Unsupported(ANOTHER)

    together.all_succeed(compare)


def _plain(tensor: Any) -> Tensor:
    return tensor.full_tensor() if is_spread(tensor) else tensor


def fits_whole(model: nn.Module, together: Together, free: float) -> bool:
    """Whether every rank can take a whole copy, with what measuring takes. free: bytes that this one may take."""
    return ROOM * sum(p.numel() * p.element_size() for p in model.parameters()) <= together.least(free)


def _refuse_too_large(parameters: Mapping[str, Tensor], free: float) -> None:
    size = ROOM * sum(p.numel() * p.element_size() for p in parameters.values())
    spread = {n: p for n, p in parameters.items() if is_spread(p)}
    if size > free and spread:
        name, tensor = next(iter(spread.items()))
        numbers = (f"{n / 2**30:.2f}" for n in (size, free))
        raise Unsupported(TOO_LARGE.format(name, tensor.placements, *numbers))  # type: ignore[attr-defined]


def _bare(module: nn.Module) -> nn.Module:
    """An empty module of the class that this one had before it was sharded."""
    kind = type(module)
    while any(base.__name__ == "FSDPModule" for base in kind.__bases__):
        kind = next(base for base in kind.__bases__ if base.__name__ != "FSDPModule")
    return kind.__new__(kind)


def _copied(module: nn.Module, memo: dict[int, Any]) -> dict[str, Any]:
    """The module's attributes for its copy."""
    found = {name: _deep(value, memo) for name, value in _own(module)}
    for kind, flags in HOOK_FLAGS.items():
        gone = [key for key, hook in getattr(module, kind, {}).items() if _shards(hook)]
        for flag, key in itertools.product(flags, gone):
            found.get(flag, {}).pop(key, None)
    return found


def _own(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if name.startswith(STATE_OF_SHARDING):
            continue
        if name in OF_MODULES:  # which may hold what cannot be copied: a group of processes
            yield name, type(value)((key, hook) for key, hook in value.items() if not _shards(hook))
        else:
            yield name, value


def _deep(value: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # groups of processes, locks and files are shared with the model
        return value


def _shards(hook: Any) -> bool:
    """Whether a hook is torch.distributed's own."""
    return home_of(hook).startswith("torch.distributed")
