"""Reading the folder of a torch.distributed checkpoint (DCP) in one process, without running code from it.

Its `.metadata` is a raw pickle that torch opens with `pickle.load`. Here a restricted unpickler reads it: it knows
only the names below, and replaces each by a stand-in that holds values and does nothing. The tensors lie in
`*.distcp` files as slices that torch.save wrote; each is read by the weights_only unpickler.
"""

from __future__ import annotations

import collections
import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diag.errors import CheckpointError

METADATA = ".metadata"
# Optimizer states are most of a checkpoint's bytes and are not measured.
LEFT_OUT = ("optim", "optimizer", "optimizers", "optimizer_state_dict", "optimizer_states")


class Inert:
    """Holds what a pickle says of an object, and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.arguments = state


RECORDS = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"),
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in RECORDS:
            return Inert
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        raise CheckpointError(f"names {module}.{name}, which no checkpoint needs and which could run code")


def read_distributed(folder: Path) -> dict[str, Any]:
    """The state that DCP saved, nested as it was, without the optimizer; tensors whole, on the CPU.

    Raises CheckpointError where the metadata is damaged or names what could run code, or a shard is missing.
    """
    metadata = _read_metadata(folder)
    try:
        places = {_key(index): place for index, place in metadata.storage_data.items()}
        paths = metadata.planner_data if isinstance(metadata.planner_data, Mapping) else {}
        state: dict[str, Any] = {}
        for name, about in metadata.state_dict_metadata.items():
            path = tuple(paths.get(name, (name,)))
            if path[0] not in LEFT_OUT:
                _put(state, path, _value(folder, name, about, places))
        return state
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder / METADATA} does not describe the folder ({type(error).__name__}: {error}); save the "
            "checkpoint again with torch.distributed.checkpoint.save."
        ) from None


def _read_metadata(folder: Path) -> Any:
    file = folder / METADATA
    try:
        metadata = _Restricted(io.BytesIO(file.read_bytes())).load()
    except CheckpointError as error:
        raise CheckpointError(
            f"{file} {error}; it is not opened: get the checkpoint from where you trust it, and save the weights "
            'alone with torch.save(model.state_dict(), "weights.pt").'
        ) from None
    except Exception as error:
        raise CheckpointError(
            f"{file} is damaged ({type(error).__name__}: {error}); copy the folder again."
        ) from None
    if not isinstance(metadata, Inert) or not hasattr(metadata, "state_dict_metadata"):
        raise CheckpointError(f"{file} is not the metadata of torch.distributed.checkpoint; give another folder.")
    return metadata


def _key(index: Any) -> tuple[str, tuple[int, ...]]:
    return index.fqn, tuple(getattr(index, "offset", None) or ())


def _value(folder: Path, name: str, about: Any, places: Mapping[tuple[str, tuple[int, ...]], Any]) -> Any:
    if not hasattr(about, "chunks"):
        return _slice(folder, places[name, ()])
    dtype = about.properties.arguments[0] if about.properties.arguments else about.properties.dtype
    starts = {tuple(chunk.offsets): chunk.sizes for chunk in about.chunks}
    covered, size = sum(torch.Size(sizes).numel() for sizes in starts.values()), torch.Size(about.size).numel()
    if covered != size:
        raise ValueError(f"the shards of {name} have {covered} of {size} elements")
    whole = torch.empty(about.size, dtype=dtype)
    for offsets, sizes in starts.items():
        part = whole
        for axis, (start, length) in enumerate(zip(offsets, sizes, strict=True)):
            part = part.narrow(axis, start, length)
        found = _slice(folder, places[name, offsets])
        if not isinstance(found, Tensor) or found.shape != part.shape:
            raise ValueError(f"the shard of {name} at {offsets} has another shape")
        part.copy_(found)
    return whole


def _slice(folder: Path, place: Any) -> Any:
    """One item that torch.save wrote into a part of a shard."""
    if getattr(place, "transform_descriptors", None):
        raise ValueError(f"it is stored with {place.transform_descriptors}, which is not read here")
    file = folder / place.relative_path
    if Path(place.relative_path).name != place.relative_path or not file.is_file():
        raise CheckpointError(f"{folder} lacks the shard {place.relative_path}; copy the whole folder.")
    with open(file, "rb") as shard:
        shard.seek(place.offset)
        data = io.BytesIO(shard.read(place.length))
    try:
        return torch.load(data, map_location="cpu", weights_only=True)
    except Exception as error:
        first = str(error).split("\n")[0].split(". ")[0]
        raise CheckpointError(
            f"{file} holds an item at byte {place.offset} that is damaged or could run code ({first[:160]}); save "
            "the checkpoint again."
        ) from None


def _put(state: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        state = state.setdefault(str(key), {})
    state[str(path[-1])] = value
