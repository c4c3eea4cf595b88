"""A Lanczos run on disk: written atomically every few products, so that a killed run resumes where it was.

The file holds tensors and numbers only and is read with `weights_only=True`. Resumed on the same machine
with the same operator, a run gives the numbers of the uninterrupted one, bit for bit.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from diag.errors import CheckpointError

RUN_FORMAT = 1


class Stateful(Protocol):
    """A part of a run that can be put on disk and back."""

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on, as plain data and tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""


def save_run(path: Path, identity: Mapping[str, Any], parts: Mapping[str, Stateful]) -> None:
    """Writes the state of each part beside `path` and moves it there, so that a kill leaves the old or the new.

    identity: what the run was asked for, as far as its numbers depend on it, as plain values.
    """
    states = {name: part.state_dict() for name, part in parts.items()}
    state = {"identity": {"format": RUN_FORMAT, **identity}, **states}
    temporary = path.with_name(path.name + ".partial")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def file_of(path: Path, identity: Mapping[str, Any]) -> Path:
    """`path` where it names a file; in a folder (a name without an ending) each run has a file of its own.

    Raises CheckpointError where there can be no folder.
    """
    if path.suffix and not path.is_dir():
        return path
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be made a folder ({error.strerror}); give another.") from None
    name = hashlib.blake2b(repr(sorted(identity.items())).encode(), digest_size=8).hexdigest()
    return path / f"lanczos-{name}.pt"


def load_run(path: Path, identity: Mapping[str, Any], parts: Mapping[str, Stateful], device: torch.device) -> bool:
    """Restore a run in place; False when there is no file. Raises CheckpointError when the file is not one
    of ours or belongs to a run that was asked for something else."""
    if not path.exists():
        return False
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        found = state["identity"]
    except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not a Lanczos checkpoint; delete it or give another file name."
        ) from error
    asked = {"format": RUN_FORMAT, **identity}
    if found != asked:
        different = [name for name in asked if found.get(name) != asked[name]]
        raise CheckpointError(
            f"{path} was written by a run with another {', '.join(different)}; give the same settings or delete "
            "the file."
        )
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return True
