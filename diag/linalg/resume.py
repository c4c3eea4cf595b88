"""A Lanczos run on disk: written atomically now and then, so that a killed run goes on where it was.

The file holds tensors and numbers only and is read with `weights_only=True`. Resumed on the same machine
with the same operator, a run gives the numbers of the uninterrupted one, bit for bit.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diag.errors import CheckpointError
from diag.linalg.krylov import KrylovSpace

if TYPE_CHECKING:
    from diag.linalg.lanczos import Progress

FORMAT = 1


def save_run(path: Path, space: KrylovSpace, progress: Progress, seed: int) -> None:
    """Writes the whole state beside `path` and moves it there, so that a kill leaves the old or the new."""
    state = {
        "question": question(space, progress, seed),
        "space": space.state_dict(),
        "progress": progress.state_dict(),
    }
    temporary = path.with_name(path.name + ".partial")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_run(path: Path, space: KrylovSpace, progress: Progress, seed: int) -> bool:
    """Restores a run in place; False when there is no file. Raises CheckpointError when the file is not one
    of ours or belongs to another question."""
    if not path.exists():
        return False
    try:
        state = torch.load(path, map_location=space.basis.device, weights_only=True)
        found = state["question"]
    except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not a Lanczos checkpoint; delete it or give another file name."
        ) from error
    asked = question(space, progress, seed)
    if found != asked:
        different = [name for name in asked if found.get(name) != asked[name]]
        raise CheckpointError(
            f"{path} was written by a run with another {', '.join(different)}; give the same settings or delete "
            "the file."
        )
    space.load_state_dict(state["space"])
    progress.load_state_dict(state["progress"])
    return True


def question(space: KrylovSpace, progress: Progress, seed: int) -> dict[str, Any]:
    """What a run was asked, as far as its numbers depend on it."""
    return {
        "format": FORMAT,
        "size": space.operator.size,
        "dtype": str(space.operator.dtype),
        "storage": str(space.storage),
        "capacity": space.capacity,
        "seed": seed,
        "wanted": str(progress.wanted),
    }
