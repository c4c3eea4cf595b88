"""Putting a checkpoint's state into a model, or saying in one sentence why it does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diag.checkpoints.contents import Checkpoint
from diag.checkpoints.unwrap import bare_model
from diag.errors import CheckpointError


def load_into(model: nn.Module, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Copy the checkpoint's state into `model`; return notes on names or dtypes that differed.

    The names may carry a prefix that the model has not (Lightning's `model.`, a backbone's name) or lack one.
    Tied weights may be there once, and BatchNorm's `num_batches_tracked` may be missing.

    Raises CheckpointError, naming the first difference, where it does not fit; the model is then unchanged.
    """
    model = bare_model(model)
    wanted = model.state_dict(keep_vars=True)
    fitting = [r for r in _readings(checkpoint.state, wanted) if not _differences(r.state, wanted)]
    if not fitting:
        raise CheckpointError(_mismatch(checkpoint, type(model).__name__, wanted))
    if len(fitting) > 1 and fitting[0].note:
        raise CheckpointError(
            f"{checkpoint.path} fits {type(model).__name__} in {len(fitting)} ways, by the parts "
            f"{', '.join(r.prefix for r in fitting)}; save the one that is meant."
        )
    notes = (fitting[0].note,) if fitting[0].note else ()
    return notes + _load(model, fitting[0].state, wanted)


class _Reading(NamedTuple):
    """One way to read the checkpoint's names."""

    state: dict[str, Any]
    prefix: str = ""
    note: str = ""


def _readings(state: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[_Reading]:
    """The names as they are, without each prefix that they have, and with each prefix that the model has."""
    yield _Reading(dict(state))
    for prefix in _prefixes(state):
        inside = {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}
        others = len(state) - len(inside)
        left = f", and {others} entries outside it were left out" if others else ""
        yield _Reading(inside, prefix, f"The prefix {prefix!r} was taken off the names{left}.")
    for prefix in _prefixes(wanted):
        longer = {prefix + name: v for name, v in state.items()}
        yield _Reading(longer, prefix, f"The prefix {prefix!r} was put before the names.")


def _prefixes(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.split(".")[0] + "." for name in names if "." in name))


def _differences(state: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Every difference, as the sentence's middle part; the model's order first."""
    here = {id(v) for name, v in wanted.items() if name in state}
    found = []
    for name, value in wanted.items():
        given = state.get(name)
        if name not in state:
            tied = id(value) in here
            if not (tied or name.endswith(("num_batches_tracked", "_extra_state"))):
                found.append(f"{name} is missing in the checkpoint")
        elif isinstance(value, Tensor) and isinstance(given, Tensor) and given.shape != value.shape:
            stored, own = tuple(given.shape), tuple(value.shape)
            found.append(f"{name} has shape {stored} in the checkpoint and {own} in the model")
    return found + [f"{name} of the checkpoint is not in the model" for name in state if name not in wanted]


def _mismatch(checkpoint: Checkpoint, model: str, wanted: Mapping[str, Any]) -> str:
    readings = _readings(checkpoint.state, wanted)
    first, *others = min((_differences(reading.state, wanted) for reading in readings), key=len)
    more = f", and {len(others)} more differ" if others else ""
    return f"{checkpoint.path} does not fit {model}: {first}{more}; build the model that was trained."


def _load(model: nn.Module, state: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[str, ...]:
    partial = [name for name, v in state.items() if isinstance(v, Tensor) and type(v) is not Tensor]
    whole = {name: _whole(name, v) if name in partial else v for name, v in state.items()}
    dtypes = {
        (str(v.dtype), str(wanted[n].dtype))
        for n, v in whole.items()
        if isinstance(v, Tensor) and isinstance(wanted[n], Tensor) and v.dtype != wanted[n].dtype
    }
    with torch.no_grad():
        model.load_state_dict(whole, strict=False)
    return tuple(f"Values stored as {given} were read as the model's {own}." for given, own in sorted(dtypes))


def _whole(name: str, value: Any) -> Tensor:
    """A distributed tensor as a plain one, where this file has all of it."""
    if isinstance(value, nn.Parameter):
        return value.detach()
    local = value.to_local() if hasattr(value, "to_local") else None
    if local is None or local.shape != value.shape:
        raise CheckpointError(
            f"{name} is one shard of a distributed tensor; save the whole state with "
            "torch.distributed.checkpoint, or call full_tensor() before saving."
        )
    return local
