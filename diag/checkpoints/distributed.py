"""Reading the folder of a torch.distributed checkpoint (DCP) in one process, without running code from it.

Its `.metadata` is a raw pickle that torch opens with `pickle.load`. Here a restricted unpickler reads it: it knows
only the names below, and replaces each by a stand-in that holds values and does nothing. The tensors lie in
`*.distcp` files as slices that torch.save wrote; each is read by the weights_only unpickler.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from diag.checkpoints.scan import scan
from diag.checkpoints.sizes import check_torch_file
from diag.checkpoints.stand_ins import Refused
from diag.checkpoints.stored import Chunk, StoredTensor
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


STAND_INS = {
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
        if (module, name) in STAND_INS:
            return Inert
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        raise CheckpointError(f"names {module}.{name}, which no checkpoint needs and which could run code")


def read_distributed(folder: Path, in_parts: bool = False) -> dict[str, Any]:
    """The state that DCP saved, nested as it was, without the optimizer; tensors on the CPU.

    in_parts: they are `StoredTensor`, and read where they are needed; else whole.

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
                value = _value(folder, name, about, places)
                _put(state, path, value.whole() if isinstance(value, StoredTensor) and not in_parts else value)
        return state
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{folder / METADATA} does not describe the folder ({type(error).__name__}: {error}); save the "
            "checkpoint again with torch.distributed.checkpoint.save."
        ) from None


def _read_metadata(folder: Path) -> Any:
    file = folder / METADATA
    try:
        data = file.read_bytes()
        scan(io.BytesIO(data))
        metadata = _Restricted(io.BytesIO(data)).load()
    except Refused as reason:
        raise CheckpointError(f"{file} {reason}; copy the folder again from where you trust it.") from None
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
    size = _whole_numbers(about.size)
    starts = {_whole_numbers(chunk.offsets): _whole_numbers(chunk.sizes) for chunk in about.chunks}
    _check_cover(name, size, starts, len(about.chunks))
    stored = sum(_length(folder, places[name, offsets]) for offsets in starts)
    if math.prod(size) * dtype.itemsize > stored:
        raise ValueError(f"{name} has {math.prod(size):,} elements, more than its {stored:,} bytes can hold")
    chunks = [_chunk(folder, name, offsets, sizes, places[name, offsets]) for offsets, sizes in starts.items()]
    return StoredTensor(size, dtype, chunks)


def _chunk(folder: Path, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...], place: Any) -> Chunk:
    def read() -> Tensor:
        found = _slice(folder, place)
        if not isinstance(found, Tensor) or found.shape != sizes or found.is_meta:
            raise ValueError(f"the shard of {name} at {offsets} has another shape, or no values")
        return found

    return Chunk(tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True)), read)


def _whole_numbers(values: Any) -> tuple[int, ...]:
    found = tuple(values)
    if not all(type(n) is int and n >= 0 for n in found):
        raise ValueError("a size that is not a whole number")
    return found


def _check_cover(name: str, size: tuple[int, ...], starts: Mapping[tuple[int, ...], Any], count: int) -> None:
    """Raise ValueError unless the chunks, boxes by their first corner, fill the tensor and do not overlap.

    Boxes inside the tensor that have its number of elements together fill it exactly if no two of them overlap.
    """
    covered = sum(math.prod(sizes) for sizes in starts.values())
    if covered != math.prod(size) or count != len(starts):
        raise ValueError(f"the shards of {name} have {covered} of {math.prod(size)} elements")
    low = numpy.array(list(starts), numpy.int64).reshape(count, len(size))
    high = low + numpy.array(list(starts.values()), numpy.int64).reshape(count, len(size))
    filled = (high > low).all(1)
    low, high = low[filled], high[filled]
    if (high > numpy.array(size, numpy.int64)).any():
        raise ValueError(f"a shard of {name} reaches beyond it")
    for i in range(len(low) - 1):
        if ((low[i] < high[i + 1 :]) & (low[i + 1 :] < high[i])).all(1).any():
            raise ValueError(f"shards of {name} overlap, so others are missing")


def _length(folder: Path, place: Any) -> int:
    """How many bytes of an item lie in its shard."""
    file = _shard(folder, place)
    if type(place.offset) is not int or type(place.length) is not int or min(place.offset, place.length) < 0:
        raise ValueError("a place in a shard that is not a whole number")
    return max(0, min(place.length, file.stat().st_size - place.offset))


def _shard(folder: Path, place: Any) -> Path:
    if getattr(place, "transform_descriptors", None):
        raise ValueError(f"it is stored with {place.transform_descriptors}, which is not read here")
    file = folder / str(place.relative_path)
    if Path(place.relative_path).name != place.relative_path or not file.is_file():
        raise CheckpointError(f"{folder} lacks the shard {place.relative_path}; copy the whole folder.")
    return file


def _slice(folder: Path, place: Any) -> Any:
    """One item that torch.save wrote into a part of a shard."""
    file, length = _shard(folder, place), _length(folder, place)
    with open(file, "rb") as shard:
        shard.seek(place.offset)
        data = io.BytesIO(shard.read(length))
    try:
        check_torch_file(data)
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
