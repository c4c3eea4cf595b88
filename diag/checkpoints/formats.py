"""What a checkpoint file is, recognised by its first bytes, and how it is read without running code from it.

Pickles are read by torch's `weights_only` unpickler alone. What that cannot open is refused with a sentence that
says what was found and how to save it again.
"""

from __future__ import annotations

import argparse
import enum
import importlib
import json
import pathlib
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from diag.checkpoints.distributed import METADATA, read_distributed
from diag.checkpoints.numbers import NUMPY
from diag.checkpoints.rank_files import of_all_ranks, rank_files
from diag.checkpoints.sizes import check_torch_file
from diag.checkpoints.stand_ins import Refused
from diag.errors import CheckpointError, first_line, named, type_of

GET_AGAIN = "copy it again from where you trust it"
SAVE_AGAIN = 'torch.save(model.state_dict(), "weights.pt")'
# Plain containers that hyper-parameters often hold (making one runs nothing), and stand-ins for NumPy's numbers.
HARMLESS: list[Any] = [argparse.Namespace, pathlib.PosixPath, pathlib.WindowsPath, pathlib.PurePosixPath, *NUMPY]
# A file that torch.save wrote before version 1.6 starts with this number, pickled.
LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
DEEPSPEED = ("zero_to_fp32.py", "*_optim_states.pt", "*/*_optim_states.pt")
WEIGHT_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin")


class Format(enum.StrEnum):
    """What kind of file or folder a checkpoint is."""

    TORCH = "torch file"
    TORCH_LEGACY = "torch file (legacy)"
    LIGHTNING = "Lightning checkpoint"
    SAFETENSORS = "safetensors"
    HUGGING_FACE = "Hugging Face folder"
    DISTRIBUTED = "torch.distributed checkpoint"
    RANK_FILES = "torch files of all ranks"


def read(path: Path, in_parts: bool = False) -> tuple[Any, Format]:
    """What the file or folder holds (dicts, tensors, numbers), and the name of its format.

    in_parts: tensors stay in their files, mapped to memory or `StoredTensor`, until they are needed.
    Raises CheckpointError where it is missing, damaged, of a format that is not read, or could run code.
    """
    if path.is_dir():
        return read_folder(path, in_parts)
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint {path}; give a file or a folder that exists.")
    kind, reader = _kind(path)
    mapped = in_parts and kind is Format.TORCH and path.suffix != ".safetensors"
    return read_torch(path, mapped) if mapped else reader(path), kind


def _kind(path: Path) -> tuple[Format, Callable[[Path], Any]]:
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(b"PK"):
        return _kind_of_zip(path)
    if LEGACY_MAGIC in start[:24]:
        return Format.TORCH_LEGACY, read_torch
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return Format.SAFETENSORS, read_safetensors
    raise CheckpointError(f"{path} is {_stranger(path, start)}.")


def _stranger(path: Path, start: bytes) -> str:
    """What a file that is not read seems to be, and what to do about it."""
    if not start:
        return "empty; save the checkpoint again"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer and not the checkpoint itself; fetch it with `git lfs pull`"
    if start.startswith(b"GGUF"):
        return "a GGUF file of quantised weights; convert it to safetensors first"
    if start.startswith(b"\x89HDF"):
        return f"an HDF5 file (Keras?); load it in its own framework and save the weights with {SAVE_AGAIN}"
    if start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05":
        return (
            "a raw Python pickle, which can run any code when it is opened; if you trust it, open it yourself and "
            f"save the weights with {SAVE_AGAIN}"
        )
    return (
        "no checkpoint that diag knows (it is neither a torch file nor safetensors); save the weights with "
        f"{SAVE_AGAIN}"
    )


def _kind_of_zip(path: Path) -> tuple[Format, Callable[[Path], Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.split("/", 1)[-1] for name in archive.namelist()}
    except zipfile.BadZipFile:
        raise CheckpointError(f"{path} is damaged or was not written to its end; save or copy it again.") from None
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        raise CheckpointError(
            f"{path} is a TorchScript archive, which holds code; if you trust it, save its weights with "
            'torch.save(torch.jit.load(path).state_dict(), "weights.pt").'
        )
    if "data.pkl" not in names:
        what = "a torch.export archive" if {"archive_format", "archive_version"} & names else "a zip archive"
        raise CheckpointError(f"{path} is {what} without a state dict; save the weights with {SAVE_AGAIN}.")
    return Format.TORCH, read_torch


def read_torch(path: Path, mapped: bool = False) -> Any:
    """The contents of a file that torch.save wrote, through the weights_only unpickler; tensors on the CPU.

    mapped: the file is mapped to memory, and of its tensors is read what is used.
    """
    try:
        with open(path, "rb") as file:
            check_torch_file(file)
    except Refused as refused:
        raise CheckpointError(f"{path} {refused}; {GET_AGAIN}.") from None
    # A file of distributed tensors can only be read once their class is known to the unpickler.
    if any(name.startswith("torch.distributed") for name in _unsafe_globals(path)):
        importlib.import_module("torch.distributed.tensor")
    try:
        # Opened here, because torch.load given a path would go by the name's ending.
        with torch.serialization.safe_globals(HARMLESS), open(path, "rb") as file:
            if mapped:  # which torch does for a path alone
                return torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} {_why_refused(path, error)}.") from None


def _unsafe_globals(path: Path) -> list[str]:
    """The classes and functions a torch file names that are not on torch's list of safe ones; runs nothing."""
    try:
        with torch.serialization.safe_globals(HARMLESS):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:  # a legacy file: there is no such list
        return []


def _why_refused(path: Path, error: Exception) -> str:
    unsafe = _unsafe_globals(path) or re.findall(r"GLOBAL (\S+) was not an allowed", str(error))
    unsafe_names = named(unsafe)
    if any(name.startswith("torch.nn.modules.") for name in unsafe):
        return (
            f"is a whole pickled model (it names {unsafe_names}), which runs code when opened; if you trust "
            'it, save its weights with torch.save(torch.load(path, weights_only=False).state_dict(), "weights.pt")'
        )
    if any("Uninitialized" in name for name in unsafe):
        return (
            f"was saved before its lazy layers had seen a batch (it names {unsafe_names}), so they have no "
            "weights in it; run the model on one batch, and save it again"
        )
    if unsafe:
        return (
            f"holds objects of {unsafe_names}, which could run code when they are opened; leave them out and "
            f"save the weights alone with {SAVE_AGAIN}"
        )
    text = str(error)
    refused = re.search(r"Unsupported [^\n.]*", text)
    if refused or "weights_only" in text.lower():
        why = refused[0] if refused else text.splitlines()[0]
        return f"holds a pickle that could run code ({why[:160]}); save the weights with {SAVE_AGAIN}"
    first = text.splitlines()[0][:160] if text else "no reason given"
    return f"cannot be read ({type(error).__name__}: {first}); it may be damaged: save or copy it again"


def read_safetensors(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file, by name, and the numbers among its metadata."""
    import safetensors

    try:
        with safetensors.safe_open(path, "pt") as file:
            texts = file.metadata() or {}
            about = {k: int(v) for k, v in texts.items() if v.isascii() and v.isdecimal() and len(v) < 16}
            return {"state_dict": {name: file.get_tensor(name) for name in file.keys()}} | about  # noqa: SIM118
    except Exception as error:
        raise CheckpointError(
            f"{path} is a damaged safetensors file ({first_line(error)}); save or copy it again."
        ) from None


def read_folder(path: Path, in_parts: bool = False) -> tuple[Any, Format]:
    """The contents of a folder: Hugging Face weights, a torch.distributed checkpoint, or the files of all ranks."""
    if (path / METADATA).exists():
        return read_distributed(path, in_parts), Format.DISTRIBUTED
    if any(any(path.glob(name)) for name in DEEPSPEED):
        raise CheckpointError(
            f"{path} is a DeepSpeed checkpoint in shards; join them with `python zero_to_fp32.py . weights` there "
            "and give the result."
        )
    whole = next((path / name for name in WEIGHT_FILES if (path / name).exists()), None)
    index = next(iter(sorted(path.glob("*.index.json"))), None)
    if whole is None and index is None:
        single = sorted(path.glob("*.safetensors"))
        if not single and (files := rank_files(path)):
            return of_all_ranks(files, [read(file, in_parts)[0] for file in files], in_parts), Format.RANK_FILES
        if len(single) != 1:
            found = named(sorted(p.name for p in path.iterdir()), 5) or "nothing"
            raise CheckpointError(
                f"{path} holds no checkpoint that diag knows (found {found}); expected "
                f"{', '.join(WEIGHT_FILES)}, an index of shards, {METADATA} of torch.distributed.checkpoint, or "
                "rank0.pt, rank1.pt, ... of distributed tensors."
            )
        whole = single[0]
    state = _state_of(whole, in_parts) if whole is not None else _read_shards(path, index, in_parts)  # type: ignore[arg-type]
    return {"state_dict": state, **_trainer_state(path)}, Format.HUGGING_FACE


def _state_of(file: Path, in_parts: bool) -> Mapping[str, Any]:
    contents, _ = read(file, in_parts)
    state = contents.get("state_dict", contents) if isinstance(contents, Mapping) else contents
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{file} holds {type_of(state)} and no weights by name; copy the folder again.")
    return state


def _read_shards(path: Path, index: Path, in_parts: bool) -> dict[str, Any]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except Exception as error:
        raise CheckpointError(
            f"{index} is not an index of shards ({first_line(error)[:160]}); copy it again."
        ) from None
    missing = [name for name in names if name in outside or not (path / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{path} lacks {named(missing, 1)} of the {len(names)} shards that {index.name} "
            "names; copy the whole folder."
        )
    return {name: value for shard in names for name, value in _state_of(path / shard, in_parts).items()}


def _trainer_state(path: Path) -> dict[str, Any]:
    """The step that the Hugging Face trainer wrote beside the weights."""
    try:
        return {"global_step": int(json.loads((path / "trainer_state.json").read_bytes())["global_step"])}
    except Exception:  # the step is optional
        return {}
