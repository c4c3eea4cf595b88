"""Where in a checkpoint the state dict is, and at which step it was saved."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from diag.checkpoints.formats import SAVE_AGAIN, Format, read
from diag.checkpoints.states import StateDicts
from diag.errors import CheckpointError, first_line, named, type_of

PREFIXES = ("module.", "_orig_mod.", "_forward_module.")
INSIDE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
STEP_KEYS = ("global_step", "step", "iteration", "iter", "iter_num", "epoch")
# A number in a file name after one of these words is the step; else the last number is.
STEP_IN_NAME = re.compile(r"(step|iter(?:ation)?|checkpoint|ckpt|epoch|ep)[=_-]?(\d+)", re.IGNORECASE)


LAST_STEP = 1 << 53


@dataclass(frozen=True)
class Checkpoint:
    """A state dict and where it comes from.

    state: name -> tensor on the CPU (and a module's `_extra_state`). step: when it was saved, None where that is
    not known; step_source: where it stands ("global_step", "epoch", "file name"). notes: what was unwrapped or left
    out.
    """

    path: Path
    state: Mapping[str, Any]
    format: str
    step: int | None = None
    step_source: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SavedFile:
    """A checkpoint with what else its file holds.

    optimizers: what `optimizer.state_dict()` gave, by where it stands in the file. shapes: of every tensor outside
    them.
    """

    checkpoint: Checkpoint
    optimizers: Mapping[str, Any]
    shapes: frozenset[tuple[int, ...]]


def load_state(path: str | Path, key: str | None = None, in_parts: bool = False) -> Checkpoint:
    """Read a checkpoint without running any code from it.

    path: .pt, .pth, .bin, .ckpt or .safetensors, or a folder of Hugging Face or torch.distributed.checkpoint.
    key: which entry holds the state dict (`ema`, say), where it has none of the usual names; dots go deeper.
    in_parts: values stay in the file until they are needed, for a model that is sharded over processes.

    Raises CheckpointError where the file is missing, damaged, could run code, or holds no state dict.
    """
    return load_saved(path, key, in_parts).checkpoint


def load_saved(path: str | Path, key: str | None = None, in_parts: bool = False) -> SavedFile:
    """The same with the states of optimizers that lie in the file. Raises CheckpointError as `load_state` does."""
    path = Path(path)
    try:
        return _load(path, key, in_parts)
    except CheckpointError:
        raise
    except Exception as error:  # a hostile file may raise anything
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {first_line(error)[:160]}); save or copy it again."
        ) from None


def as_checkpoint(state: Mapping[str, Any], name: str) -> Checkpoint:
    """A state dict that is in memory, under the names of the bare model, as `load_state` gives that of a file."""
    found, notes = _state_dict(state, StateDicts(state, Path(name)), None, Path(name))
    clean, more = _without_wrappers(found)
    return Checkpoint(Path(name), clean, "in memory", notes=(*notes, *more))


def _load(path: Path, key: str | None, in_parts: bool) -> SavedFile:
    contents, kind = read(path, in_parts)
    if (
        kind in (Format.TORCH, Format.TORCH_LEGACY)
        and isinstance(contents, Mapping)
        and "pytorch-lightning_version" in contents
    ):
        kind = Format.LIGHTNING
    states = StateDicts(contents, path)
    state, notes = _state_dict(contents, states, key, path)
    step, source = _step(contents, path)
    clean, more = _without_wrappers(state)
    checkpoint = Checkpoint(path, clean, kind, step, source, (*notes, *more))
    return SavedFile(checkpoint, states.optimizers(), states.shapes())


def _state_dict(contents: Any, states: StateDicts, key: str | None, path: Path) -> tuple[dict[str, Any], list[str]]:
    notes: list[str] = []
    found = _entry(contents, key, path) if key else contents
    if key is None:
        while not states.is_one(found):
            inner = states.wrapper(found)
            if inner is None:
                raise CheckpointError(_no_state(contents, states, path))
            averages = [str(k) for k, v in found.items() if "ema" in str(k).lower() and states.holds_one(v)]
            notes += [f"It also holds {k}, an average of the weights: key={k!r} loads that." for k in averages]
            found = found[inner]
    elif not states.is_one(found):
        raise CheckpointError(f"{key!r} of {path} is not a state dict; {_no_state(contents, states, path)}")
    state = {str(name): v for name, v in found.items() if _belongs(str(name), v)}
    left_out = [str(name) for name, v in found.items() if not _belongs(str(name), v)]
    if left_out:
        notes.append(f"Entries that are not tensors were left out: {named(left_out, 5)}.")
    return state, notes


def _belongs(name: str, value: Any) -> bool:
    return isinstance(value, Tensor) or name.endswith("_extra_state")


def _entry(contents: Any, key: str, path: Path) -> Any:
    if isinstance(contents, Mapping) and key in contents:
        return contents[key]
    for part in key.split("."):
        if not isinstance(contents, Mapping) or part not in contents:
            known = _names(contents) if isinstance(contents, Mapping) else "nothing by name"
            raise CheckpointError(f"{path} has no entry {key!r}; there are {known}.")
        contents = contents[part]
    return contents


def _no_state(contents: Any, states: StateDicts, path: Path) -> str:
    if not isinstance(contents, Mapping):
        return f"{path} holds {type_of(contents)}; expected a state dict: {SAVE_AGAIN}."
    found, optimizers = states.names()
    if found:
        return f"{path} holds several states ({named(found, 8)}); say which one with key={found[0]!r}."
    if optimizers:
        return (
            f"{path} holds the state of an optimizer and no weights of a model; give the file that has them, or "
            f"save one with {SAVE_AGAIN}."
        )
    return f"{path} holds no state dict (its entries are {_names(contents)}); save one with {SAVE_AGAIN}."


def _names(contents: Mapping[Any, Any]) -> str:
    return named([str(key)[:80] for key in contents], 8) or "nothing"


def _without_wrappers(state: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The state under the names of the bare model: without the parts that wrappers add to the names."""
    notes, clean = [], dict(state)
    while prefix := next((p for p in PREFIXES if clean and all(name.startswith(p) for name in clean)), None):
        clean = {name.removeprefix(prefix): value for name, value in clean.items()}
        notes.append(f"The prefix {prefix!r} was taken off every name.")
    for part in INSIDE:  # a compiled or wrapped submodule
        if any(f".{part}" in name or name.startswith(part) for name in clean):
            shorter = {name.removeprefix(part).replace(f".{part}", "."): value for name, value in clean.items()}
            if len(shorter) == len(clean):
                clean = shorter
                notes.append(f"{part!r} was taken out of the names.")
    return clean, notes


def _step(contents: Any, path: Path) -> tuple[int | None, str]:
    for key in STEP_KEYS:
        value = contents.get(key) if isinstance(contents, Mapping) else None
        if isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point():
            value = value.item()
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LAST_STEP:
            return value, key
    return _step_in_name(path)


def _step_in_name(path: Path) -> tuple[int | None, str]:
    stem = path.name if path.is_dir() else path.stem
    named = {word.lower(): int(digits) for word, digits in STEP_IN_NAME.findall(stem) if len(digits) < 16}
    if named:
        return named.get("step", next(iter(named.values()))), "file name"
    digits = [d for d in re.findall(r"\d+", stem) if len(d) < 16]
    return (int(digits[-1]), "file name") if digits else (None, "")
