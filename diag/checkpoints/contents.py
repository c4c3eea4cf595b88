"""Where in a checkpoint the state dict is, and at which step it was saved."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from diag.checkpoints.formats import SAVE_AGAIN, Format, read
from diag.errors import CheckpointError

WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights")
PREFIXES = ("module.", "_orig_mod.")
STEP_KEYS = ("global_step", "step", "iteration", "iter", "iter_num", "epoch")
# A number in a file name after one of these words is the step; else the last number is.
STEP_IN_NAME = re.compile(r"(step|iter(?:ation)?|checkpoint|ckpt|epoch|ep)[=_-]?(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Checkpoint:
    """A state dict and where it comes from.

    state: name -> tensor on the CPU (and a module's `_extra_state`). step: when it was saved, None where nothing
    tells; step_source: what told ("global_step", "epoch", "file name"). notes: what was unwrapped or left out.
    """

    path: Path
    state: Mapping[str, Any]
    format: str
    step: int | None = None
    step_source: str = ""
    notes: tuple[str, ...] = ()


def load_state(path: str | Path, key: str | None = None) -> Checkpoint:
    """Read a checkpoint without running any code from it.

    path: .pt, .pth, .bin, .ckpt or .safetensors, or a folder of Hugging Face or torch.distributed.checkpoint.
    key: which entry holds the state dict (`ema`, say), where the usual names do not tell; dots go deeper.

    Raises CheckpointError where the file is missing, damaged, could run code, or holds no state dict.
    """
    path = Path(path)
    contents, kind = read(path)
    if (
        kind in (Format.TORCH, Format.TORCH_LEGACY)
        and isinstance(contents, Mapping)
        and "pytorch-lightning_version" in contents
    ):
        kind = Format.LIGHTNING
    state, notes = _state_dict(contents, key, path)
    step, source = _step(contents, path)
    clean, more = _without_prefixes(state)
    return Checkpoint(path, clean, kind, step, source, (*notes, *more))


def _state_dict(contents: Any, key: str | None, path: Path) -> tuple[dict[str, Any], list[str]]:
    notes: list[str] = []
    found = _entry(contents, key, path) if key else contents
    if key is None:
        while not _is_state(found):
            inner = next((w for w in WRAPPERS if isinstance(found, Mapping) and _holds_state(found.get(w))), None)
            if inner is None:
                raise CheckpointError(_no_state(contents, path))
            averages = _averages(found)
            notes += [f"It also holds {k}, an average of the weights: key={k!r} loads that." for k in averages]
            found = found[inner]
    elif not _is_state(found):
        raise CheckpointError(f"{key!r} of {path} is no state dict; {_no_state(contents, path)}")
    state = {str(name): v for name, v in found.items() if _belongs(str(name), v)}
    left_out = [str(name) for name, v in found.items() if not _belongs(str(name), v)]
    if left_out:
        notes.append(f"Entries that are no tensors were left out: {', '.join(left_out[:5])}.")
    return state, notes


def _belongs(name: str, value: Any) -> bool:
    return isinstance(value, Tensor) or name.endswith("_extra_state")


def _is_state(value: Any) -> bool:
    """A state dict maps names to tensors; few other entries may be among them."""
    if not isinstance(value, Mapping):
        return False
    tensors = sum(isinstance(v, Tensor) for v in value.values())
    return tensors > 0 and not any(isinstance(v, Mapping) and _is_state(v) for v in value.values())


def _holds_state(value: Any) -> bool:
    return _is_state(value) or (isinstance(value, Mapping) and any(_is_state(value.get(w)) for w in WRAPPERS))


def _averages(contents: Mapping[str, Any]) -> list[str]:
    return [str(k) for k, v in contents.items() if "ema" in str(k).lower() and _holds_state(v)]


def _entry(contents: Any, key: str, path: Path) -> Any:
    if isinstance(contents, Mapping) and key in contents:
        return contents[key]
    for part in key.split("."):
        if not isinstance(contents, Mapping) or part not in contents:
            known = ", ".join(map(str, list(contents)[:10])) if isinstance(contents, Mapping) else "nothing by name"
            raise CheckpointError(f"{path} has no entry {key!r}; there are {known}.")
        contents = contents[part]
    return contents


def _no_state(contents: Any, path: Path) -> str:
    if not isinstance(contents, Mapping):
        return f"{path} holds a {type(contents).__name__}; expected a state dict: {SAVE_AGAIN}."
    states = list(_states(contents))
    if states:
        return f"{path} holds several states ({', '.join(states[:8])}); say which one with key={states[0]!r}."
    keys = ", ".join(map(str, list(contents)[:8])) or "nothing"
    return f"{path} holds no state dict (its entries are {keys}); save one with {SAVE_AGAIN}."


def _states(contents: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for key, value in contents.items():
        if _is_state(value):
            yield f"{above}{key}"
        elif isinstance(value, Mapping):
            yield from _states(value, f"{above}{key}.")


def _without_prefixes(state: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The state under the names of the bare model: without what DDP and torch.compile put in front."""
    notes, clean = [], dict(state)
    while prefix := next((p for p in PREFIXES if clean and all(name.startswith(p) for name in clean)), None):
        clean = {name.removeprefix(prefix): value for name, value in clean.items()}
        notes.append(f"The prefix {prefix!r} was taken off every name.")
    if any("._orig_mod." in name for name in clean):  # a compiled submodule
        clean = {name.replace("._orig_mod.", "."): value for name, value in clean.items()}
        notes.append("'_orig_mod.' was taken out of the names.")
    return clean, notes


def _step(contents: Any, path: Path) -> tuple[int | None, str]:
    for key in STEP_KEYS:
        value = contents.get(key) if isinstance(contents, Mapping) else None
        if isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point():
            value = value.item()
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value, key
    return _step_in_name(path)


def _step_in_name(path: Path) -> tuple[int | None, str]:
    stem = path.name if path.is_dir() else path.stem
    named = {word.lower(): int(digits) for word, digits in STEP_IN_NAME.findall(stem)}
    if named:
        return named.get("step", next(iter(named.values()))), "file name"
    digits = re.findall(r"\d+", stem)
    return (int(digits[-1]), "file name") if digits else (None, "")
