"""A run made from checkpoint files alone: arithmetic facts of each, with no model and no data."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import diag
from diag.checkpoints import SavedFile, load_saved, load_state
from diag.errors import as_path
from diag.registry import Instrument, attempt, instruments
from diag.result import Result
from diag.run.checkpoints import by_step_order, checkpoint_files
from diag.run.entries import Event, Record
from diag.run.run import Run
from diag.snapshot.external.saved import Saved


def from_state_files(
    paths: Iterable[str | os.PathLike[str]],
    *,
    key: str | None = None,
    before: str | os.PathLike[str] | None = None,
) -> Run:
    """A run in memory with one step a checkpoint, in which the files are looked at by themselves.

    paths: checkpoint files or folders, in any order if they tell their steps; each is compared with the one
    before, the first with the one at `before`. key: the entry that holds the state dict. Two states are in memory
    at a time.

    Raises CheckpointError where a file cannot be read or holds no state dict, InvalidInput where none is given.
    """
    files = checkpoint_files([as_path(path) for path in paths])
    places, events = by_step_order(files, partial(load_state, key=key))
    known = [i for i in instruments().values() if any(n.name == "saved" for n in i.needs)]
    records: list[Record] = []
    previous = None if before is None else load_saved(Path(before), key)
    for place in places:
        loaded = load_saved(place.path, key)
        records += _looked_at(place.step, loaded, previous, known)
        events += [Event(place.step, "checkpoint", f"{place.path}: {note}") for note in loaded.checkpoint.notes]
        previous = loaded
    assert previous is not None
    about = _metadata(previous) | {
        "name": f"{len(places)} checkpoints" if len(places) > 1 else places[0].path.name,
        "checkpoints": [{"step": p.step, "path": str(p.path), "format": p.format} for p in places],
    }
    return Run(metadata=about, records=records, events=events)


def _looked_at(step: int, loaded: SavedFile, previous: SavedFile | None, known: list[Instrument]) -> list[Record]:
    saved = Saved(
        name=_name(loaded.checkpoint.path),
        state=loaded.checkpoint.state,
        shapes=loaded.shapes,
        optimizers=loaded.optimizers,
        previous=None if previous is None else previous.checkpoint.state,
        previous_name="" if previous is None else _name(previous.checkpoint.path),
    )
    made = [(i.name, attempt(None, i, saved=saved)) for i in known]
    return [Record(step, name, o, o.provenance.seconds if isinstance(o, Result) else None) for name, o in made]


def _name(path: Path) -> str:
    return path.resolve().name


def _metadata(last: SavedFile) -> dict[str, Any]:
    state = Saved("", last.checkpoint.state).weights()
    return {
        "model": str(last.checkpoint.format),
        "parameters": sum(w.numel() for w in state.values()),
        "layers": {},
        "versions": {"diag": diag.__version__, "torch": str(torch.__version__)},
    }
