"""A folder in which every process of a training has saved its part: one torch file a rank, of distributed tensors.

It is what `torch.save(model.state_dict(), f"rank{rank}.pt")` leaves of a model under `fully_shard` or tensor
parallelism. Each file says of its tensors how they lie, so that they are put together without a process group.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diag.checkpoints.states import DEEPEST
from diag.checkpoints.stored import Chunk, StoredBlock, StoredTensor, block_at
from diag.errors import CheckpointError, named

ENDINGS = (".pt", ".pth", ".bin", ".ckpt")
RANK = re.compile(r"rank[^a-z0-9]?(\d{1,6})", re.IGNORECASE)
NOT_SPREAD = (
    "{} has the files of {} ranks, and no tensor in them says how it lies over the ranks, so that each file may "
    "hold all weights or a part of them; give one file that holds all."
)


def rank_files(folder: Path) -> list[Path]:
    """The files of the ranks in their order; empty where the folder's torch files are not named rank0, rank1, ...

    Other numbers may stand in their names, as a step does.
    """
    files = [file for file in folder.iterdir() if file.suffix in ENDINGS and file.is_file()]
    ranks = {int(numbers[-1]): file for file in files if (numbers := RANK.findall(file.stem))}
    every = len(ranks) == len(files) > 1 and set(ranks) == set(range(len(ranks)))
    return [ranks[k] for k in range(len(ranks))] if every else []


def of_all_ranks(files: Sequence[Path], contents: Sequence[Any], in_parts: bool) -> Any:
    """The contents of rank 0's file, with its distributed tensors put together from all files.

    in_parts: `StoredTensor`, and put together where they are needed. What is no distributed tensor is rank 0's.
    Raises CheckpointError where the files do not fit together, or none of their tensors is distributed.
    """
    spread: list[str] = []

    def at(path: tuple[Any, ...], rank: int) -> Any:
        found = contents[rank]
        for key in path:
            found = found[key] if isinstance(found, Mapping) and key in found else None
        return found

    def walk(value: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(value, Mapping) and len(path) < DEEPEST:
            return {key: walk(inner, (*path, key)) for key, inner in value.items()}
        if not _is_spread(value):
            return value
        spread.append(name := ".".join(map(str, path)))
        stored = _put_together(name, files, [at(path, rank) for rank in range(len(files))])
        return stored if in_parts else stored.whole()

    found = walk(contents[0], ())
    if not spread:
        raise CheckpointError(NOT_SPREAD.format(files[0].parent, len(files)))
    return found


def _is_spread(value: Any) -> bool:
    return isinstance(value, Tensor) and hasattr(value, "to_local") and hasattr(value, "placements")


def _put_together(name: str, files: Sequence[Path], parts: Sequence[Any]) -> StoredTensor:
    first = parts[0]
    mesh = first.device_mesh.mesh
    chunks: dict[tuple[int, ...], Chunk] = {}
    for rank, (file, part) in enumerate(zip(files, parts, strict=True)):
        if not _is_spread(part) or (part.shape, part.placements) != (first.shape, first.placements):
            raise CheckpointError(
                f"{file} does not have {name} as {files[0]} has it; give a folder that holds the files of one "
                "checkpoint alone."
            )
        places = (mesh == rank).nonzero().tolist()
        block = block_at(first.shape, mesh.shape, places[0], first.placements) if places else None
        local = part.to_local()
        if block is None or tuple(local.shape) != tuple(s.stop - s.start for s in block):
            raise CheckpointError(
                f"{name} lies in {file} in a way that is not read here ({part.placements} on ranks "
                f"{named([str(r) for r in mesh.flatten().tolist()], 8)}); save it with "
                "torch.distributed.checkpoint."
            )
        if local.numel():  # an empty block begins where another one does
            chunks.setdefault(tuple(s.start for s in block), Chunk(block, _giving(local)))
    _refuse_missing(name, first, files, [chunk.block for chunk in chunks.values()])
    return StoredTensor(first.shape, first.dtype, list(chunks.values()))


def _giving(local: Tensor) -> Callable[[], Tensor]:
    return lambda: local


def _refuse_missing(name: str, first: Any, files: Sequence[Path], blocks: Sequence[StoredBlock]) -> None:
    """Blocks are those of different places of the mesh, so they do not overlap."""
    covered = sum(torch.Size([s.stop - s.start for s in block]).numel() for block in blocks)
    if covered != first.numel():
        ranks = first.device_mesh.mesh.numel()
        raise CheckpointError(
            f"{files[0].parent} has the files of {len(files)} ranks, and {name} was split over {ranks}; copy the "
            "files of all ranks."
        )
