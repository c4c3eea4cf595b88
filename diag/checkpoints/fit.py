"""Putting a checkpoint's state into a model, or saying in one sentence why it does not fit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from diag.checkpoints.contents import Checkpoint
from diag.checkpoints.hugging_face import read_by_its_class
from diag.checkpoints.stored import StoredTensor, block_at
from diag.checkpoints.unwrap import bare_model
from diag.checkpoints.values import as_own_dtype
from diag.errors import CheckpointError, first_line, named

MOST_PARTS = 4  # of a prefix that is tried
PROBED = 20  # names of the model by which a prefix is tried
# transformers' old names of two parameters, which it still reads.
RENAMED = ((".gamma", ".weight"), (".beta", ".bias"))


def load_into(model: nn.Module, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Copy the checkpoint's state into `model`; return notes on names or dtypes that differed.

    The names may carry a prefix that the model does not have (Lightning's `model.`, a backbone's name) or lack one.
    Tied weights may be there once, BatchNorm's `num_batches_tracked` may be missing, and names that a Hugging Face
    model declares as not its own may be there. Lazy layers take the sizes that the checkpoint has.

    Raises CheckpointError, naming the first difference, where it does not fit; the model is then unchanged.
    """
    model = bare_model(model)
    try:
        return _load_into(model, checkpoint)
    except CheckpointError:
        raise
    except Exception as error:  # a hostile file may raise anything
        raise CheckpointError(
            f"{checkpoint.path} cannot be loaded into {type(model).__name__} ({type(error).__name__}: "
            f"{first_line(error)[:160]}); save the plain tensors of its state_dict() again."
        ) from None


def _load_into(model: nn.Module, checkpoint: Checkpoint) -> tuple[str, ...]:
    expected = _Expected(model)
    fitting = [r for r in _readings(checkpoint.state, expected) if not _differences(r.state, expected)]
    if not fitting:
        read = read_by_its_class(model, checkpoint.state)
        if read is None:
            raise CheckpointError(_mismatch(checkpoint, type(model).__name__, expected))
        return (read[1], *_load(model, read[0], expected.values))
    if len(fitting) > 1 and fitting[0].note:
        raise CheckpointError(
            f"{checkpoint.path} fits {type(model).__name__} in {len(fitting)} ways, by the parts "
            f"{', '.join(r.prefix for r in fitting)}; save the one that is meant."
        )
    state, note = fitting[0].state, fitting[0].note
    strangers = [name for name in state if name not in expected.values]
    notes = [note] if note else []
    if strangers:
        notes.append(f"Entries that the model declares as not its own were left out: {named(strangers)}.")
    own = {name: value for name, value in state.items() if name in expected.values}
    return (*notes, *_load(model, own, expected.values))


class _Expected:
    """What the model's state has, which entries of it may be missing, and which of a checkpoint it ignores."""

    def __init__(self, model: nn.Module) -> None:
        self.values: dict[str, Any] = model.state_dict(keep_vars=True)
        self._unexpected = _patterns(model, "_keys_to_ignore_on_load_unexpected")
        self._missing = _patterns(model, "_keys_to_ignore_on_load_missing")

    def leaves_aside(self, name: str) -> bool:
        """Whether a Hugging Face model declares that this entry of a checkpoint is not its own."""
        return any(pattern.search(name) for pattern in self._unexpected)

    def does_without(self, name: str) -> bool:
        """Whether the entry may be missing: a count, or a buffer that is the same in every model."""
        if name.endswith(("num_batches_tracked", "_extra_state")):
            return True
        declared = any(pattern.search(name) for pattern in self._missing)
        return declared and not isinstance(self.values[name], nn.Parameter)


def _patterns(model: nn.Module, attribute: str) -> list[re.Pattern[str]]:
    found = (getattr(module, attribute, None) for module in model.modules())
    texts = {str(text) for value in found if isinstance(value, list | tuple | set) for text in value}
    return [re.compile(text) for text in sorted(texts)]


class _Reading(NamedTuple):
    """One way to read the checkpoint's names."""

    state: dict[str, Any]
    prefix: str = ""
    note: str = ""


def _readings(state: Mapping[str, Any], expected: _Expected) -> Iterator[_Reading]:
    """The names as they are, without each prefix that they have, and with each prefix that the model has."""
    state = _with_new_names(state, expected)
    yield _Reading(dict(state))
    probed = list(expected.values)[:PROBED]
    for prefix in _prefixes(state):
        if not any(prefix + name in state for name in probed):
            continue
        inside = {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}
        others = len(state) - len(inside)
        left = f", and {others} entries outside it were left out" if others else ""
        yield _Reading(inside, prefix, f"The prefix {prefix!r} was taken off the names{left}.")
    probed = list(state)[:PROBED]
    for prefix in _prefixes(expected.values):
        if any(prefix + name in expected.values for name in probed):
            longer = {prefix + name: v for name, v in state.items()}
            yield _Reading(longer, prefix, f"The prefix {prefix!r} was put before the names.")


def _with_new_names(state: Mapping[str, Any], expected: _Expected) -> Mapping[str, Any]:
    """The state with `gamma` and `beta` under their present names, where the model has none of the old."""
    for old, new in RENAMED:
        if any(name.endswith(old) for name in state) and not any(name.endswith(old) for name in expected.values):
            state = {name[: -len(old)] + new if name.endswith(old) else name: v for name, v in state.items()}
    return state


def _prefixes(names: Iterable[str]) -> list[str]:
    parts = (name.split(".")[:-1][:MOST_PARTS] for name in names)
    return list(dict.fromkeys(".".join(p[: i + 1]) + "." for p in parts for i in range(len(p))))


def _differences(state: Mapping[str, Any], expected: _Expected) -> list[str]:
    """Every difference, as the sentence's middle part; the model's order first."""
    here = {id(v) for name, v in expected.values.items() if name in state}
    found = []
    for name, value in expected.values.items():
        stored_value = state.get(name)
        if name not in state:
            if id(value) not in here and not expected.does_without(name):
                found.append(f"{name} is missing in the checkpoint")
        elif not is_lazy(value) and isinstance(value, Tensor) and isinstance(stored_value, Tensor):
            if stored_value.is_nested:
                found.append(f"{name} is a nested tensor in the checkpoint")
            elif stored_value.shape != value.shape:
                stored, own = tuple(stored_value.shape), tuple(value.shape)
                found.append(f"{name} has shape {stored} in the checkpoint and {own} in the model")
    strangers = (n for n in state if n not in expected.values and not expected.leaves_aside(n))
    return found + [f"{name} of the checkpoint is not in the model" for name in strangers]


def _mismatch(checkpoint: Checkpoint, model: str, expected: _Expected) -> str:
    readings = [(r.state, _differences(r.state, expected)) for r in _readings(checkpoint.state, expected)]
    # The reading that was most likely meant: of the most names in common, and of these the fewest differences.
    _, (first, *others) = min(readings, key=lambda r: (-len(r[0].keys() & expected.values.keys()), len(r[1])))
    more = f", and {len(others)} more differ" if others else ""
    return f"{checkpoint.path} does not fit {model}: {first}{more}; build the model that was trained."


def _load(model: nn.Module, state: Mapping[str, Any], expected: Mapping[str, Any]) -> tuple[str, ...]:
    whole, changed = dict(state), set()
    for name, value in state.items():
        own = expected[name]
        if isinstance(value, Tensor) and isinstance(own, Tensor):
            stored = value.dtype
            whole[name] = own_share(name, value, own)
            if not is_lazy(own) and stored != own.dtype:
                changed.add((str(stored), str(own.dtype)))
    with torch.no_grad():
        model.load_state_dict(whole, strict=False)
    _settle_lazy(model)
    return tuple(f"Values stored as {stored} were read as the model's {own}." for stored, own in sorted(changed))


def own_share(name: str, value: Tensor, own: Tensor) -> Tensor:
    """The value as the model's own tensor lies: where that is spread over processes, this one's part of it.

    Of a `StoredTensor` value that part alone is read.
    """
    if not hasattr(own, "device_mesh"):
        return as_own_dtype(name, value, None if is_lazy(own) else own)
    from torch.distributed.tensor import DTensor, distribute_tensor

    mesh, placements = own.device_mesh, own.placements  # type: ignore[attr-defined]
    place = mesh.get_coordinate()
    block = None if place is None else block_at(own.shape, mesh.mesh.shape, place, placements)
    if not isinstance(value, StoredTensor) or block is None:
        return distribute_tensor(as_own_dtype(name, value, own), mesh, placements, src_data_rank=None)
    part = as_own_dtype(name, value.part(block), own).to(own.device)
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=own.shape, stride=own.stride())


def _settle_lazy(model: nn.Module) -> None:
    """Lazy layers that have their sizes now become the layers that they stand for, as after a first batch."""
    for module in model.modules():
        becomes = getattr(module, "cls_to_become", None)
        if becomes is None or not isinstance(module, LazyModuleMixin) or module.has_uninitialized_params():
            continue
        for hook in ("_initialize_hook", "_load_hook"):
            if (handle := vars(module).pop(hook, None)) is not None:
                handle.remove()
        module.__class__ = becomes
        _tell_sizes(module)


def _tell_sizes(module: nn.Module) -> None:
    """The number of inputs, which a lazy layer learns from a batch, from the weight."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return
    for name, axis in (("in_features", 1), ("num_features", 0)):
        if vars(module).get(name) == 0:
            setattr(module, name, weight.shape[axis])
    if vars(module).get("in_channels") == 0:
        transposed = bool(getattr(module, "transposed", False))
        groups = int(getattr(module, "groups", 1))
        module.in_channels = weight.shape[0] if transposed else weight.shape[1] * groups  # type: ignore[assignment]
