"""Networks that are checkpoint files, each loaded into the model of a build function."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from diag.build import Build, built_arguments, refuse_without_build
from diag.checkpoints import load_into, load_state
from diag.conversion import converted
from diag.errors import InvalidInput, type_of
from diag.snapshot.snapshot import Snapshot


class LoadedNetworks(NamedTuple):
    """What files hold: the first one's network as a snapshot, each one's state by name, and how they were read."""

    snapshot: Snapshot
    states: dict[str, dict[str, Tensor]]
    notes: tuple[str, ...]


def loaded_networks(
    paths: Sequence[Any], build: Build, key: str | None, options: Mapping[str, Any] | None, caller: str
) -> LoadedNetworks:
    """The networks that checkpoint files hold, in the model that `build` makes.

    paths: two files or more. build, key, options: as `diag.report` takes them.
    Raises InvalidInput where they are no paths, or fewer than two, or the build function fails, CheckpointError
    where a file cannot be read or does not fit.
    """
    places = [_path(path, caller) for path in paths]
    refuse_fewer_than_two(places)
    arguments = built_arguments(build) | dict(options or {})
    model, states = arguments["model"], dict[str, dict[str, Tensor]]()
    notes: list[str] = []
    for path in places:
        checkpoint = load_state(path, key)
        notes += [f"{path}: {note}" for note in (*checkpoint.notes, *load_into(model, checkpoint))]
        name = path.name if [p.name for p in places].count(path.name) == 1 else str(path)
        name = name if name not in states else f"{name} ({len(states) + 1})"  # one file given twice
        states[name] = {n: t.detach().clone() for n, t in model.state_dict().items()}
    model.load_state_dict(next(iter(states.values())))
    return LoadedNetworks(Snapshot(**arguments), states, tuple(notes))


def _path(path: Any, caller: str) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise InvalidInput(
            f"{caller} was called on {type_of(path)} and build=; expected the paths of checkpoints, or a snapshot "
            "and no build=."
        )
    return Path(path)


def refuse_fewer_than_two(networks: Sized) -> None:
    """Raise InvalidInput where there is nothing to compare."""
    if len(networks) < 2:
        raise InvalidInput(f"There are {len(networks)} networks; expected at least 2 to compare.")


def refuse_file_arguments(caller: str, snapshot: Any, **for_files: Any) -> None:
    """Raise InvalidInput where there is no build function, and what was given needs one."""
    refuse_without_build(caller, [name for name, value in for_files.items() if value is not None])
    several = isinstance(snapshot, Sequence) and not isinstance(snapshot, str)
    files = snapshot if several else [snapshot]
    if files and all(isinstance(path, (str, os.PathLike)) for path in files):
        raise InvalidInput(
            f"{caller} was called on {'paths' if several else 'the path'} of checkpoints; give build=, the "
            "function that gives (model, loss_fn, data)."
        )
    converted(snapshot, Snapshot, inspect.Parameter.empty, f"{caller}.snapshot")
