"""`--build module:function`: the user's model, loss and data, and a run measured from checkpoints of that model."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import platform
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

import diag
from diag.checkpoints import Checkpoint, load_into, load_state
from diag.errors import CheckpointError, DiagError, InvalidInput
from diag.registry import attempt, find, instruments
from diag.result import Result
from diag.run.run import Record, Run
from diag.snapshot.snapshot import Snapshot

FORM = "expected module:function or file.py:function"
RETURNS = "expected (model, loss_fn, data), a dict of diag.Snapshot's arguments, or a diag.Snapshot"
Progress = Callable[[int, int, str], None]


def load_build(target: str) -> Callable[[], Any]:
    """The function that `target` names.

    Raises InvalidInput where the module or the function is not there or importing the module fails.
    """
    place, colon, name = target.rpartition(":")
    if not (colon and place and name):
        raise InvalidInput(f"--build {target} names no function; {FORM}.")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    function = getattr(module, name, None)
    if not callable(function):
        known = [
            n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__
        ]
        raise InvalidInput(f"{place} has no function {name!r}; it has {', '.join(known) or 'none'}.")
    return function


def _import_file(file: Path) -> Any:
    if not file.is_file():
        raise InvalidInput(f"There is no file {file}; {FORM}.")
    name = file.stem if file.stem not in sys.modules else f"build_{file.stem}"  # not in the way of another module
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles of its classes look there
    _with_path(file.parent)
    _guard(lambda: spec.loader.exec_module(module), f"Importing {file}")  # type: ignore[union-attr]
    return module


def _import_module(name: str) -> Any:
    _with_path(Path.cwd())
    try:
        missing = importlib.util.find_spec(name) is None
    except (ImportError, ValueError):
        missing = True
    if missing:
        raise InvalidInput(f"There is no module {name!r} here; {FORM}, seen from the current folder.")
    return _guard(lambda: importlib.import_module(name), f"Importing {name}")


def _with_path(folder: Path) -> None:
    if str(folder.resolve()) not in sys.path:
        sys.path.insert(0, str(folder.resolve()))


def _guard(call: Callable[[], Any], what: str) -> Any:
    """Call the user's code; what it raises becomes one sentence that says where."""
    try:
        return call()
    except DiagError:
        raise
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
        at = f" at {os.path.relpath(frames[-1].filename)}, line {frames[-1].lineno}" if len(frames) > 1 else ""
        text = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        raise InvalidInput(f"{what} raised {type(error).__name__}{at}: {text}") from error


def built_arguments(target: str) -> dict[str, Any]:
    """What the build function returns, as the arguments of a Snapshot."""
    built = _guard(load_build(target), f"The build function {target}")
    if isinstance(built, Snapshot):
        kept = ("model", "loss_fn", "optimizer", "other", "seed", "device", "micro_batch", "max_examples")
        data = {"data": built._data, "held_out": built._held_out, "unpack": built._unpack}
        return {name: getattr(built, name) for name in kept} | data
    if isinstance(built, (tuple, list)) and len(built) == 3:
        built = dict(zip(("model", "loss_fn", "data"), built, strict=True))
    if not isinstance(built, Mapping) or not isinstance(built.get("model"), nn.Module):
        made = built.get("model") if isinstance(built, Mapping) else built
        where = " as its model" if isinstance(built, Mapping) else ""
        raise InvalidInput(f"The build function {target} returned {type(made).__name__}{where}; {RETURNS}.")
    known = inspect.signature(Snapshot).parameters
    unknown = [str(name) for name in built if name not in known]
    if unknown:
        raise InvalidInput(f"The build function {target} returned {unknown[0]!r}; known are {', '.join(known)}.")
    return dict(built)


def run_of_checkpoints(
    paths: Sequence[Path],
    build: str,
    *,
    names: Sequence[str] = (),
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    options: Mapping[str, Any] | None = None,
    key: str | None = None,
    progress: Progress = lambda done, total, text: None,
) -> tuple[Run, list[str]]:
    """A run in memory with one step a checkpoint, and notes on how the checkpoints were read.

    names: the instruments, by default all that need more than the steps of a watched run. options: arguments of
    `Snapshot` in place of the build function's. Each checkpoint has the one before it as its `previous`.
    """
    arguments = built_arguments(build) | dict(options or {})
    model = arguments.pop("model")
    _refuse_device(arguments.get("device"))
    chosen = [find(n) for n in names] or [i for i in instruments().values() if not i.from_history]
    steps, notes = _in_order([load_state(path, key) for path in paths])
    records: list[Record] = []
    previous, total = None, len(steps) * len(chosen)
    data = _read_once(model, arguments)
    for step, checkpoint in steps:
        notes += [f"{checkpoint.path}: {note}" for note in (*checkpoint.notes, *load_into(model, checkpoint))]
        snapshot = Snapshot(model, **arguments | data | {"previous": previous})
        for instrument in chosen:
            progress(len(records), total, f"{checkpoint.path.name}: {instrument.title}")
            outcome = attempt(snapshot, instrument, **(settings or {}).get(instrument.name, {}))
            seconds = outcome.provenance.seconds if isinstance(outcome, Result) else None
            records.append(Record(step, instrument.name, outcome, seconds))
        previous = {name: value.clone() for name, value in model.state_dict().items()}
    progress(total, total, "")
    return Run(metadata=_metadata(model, steps, build, arguments, settings), records=records), notes


def _read_once(model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The data as batches, so that every checkpoint is measured on the same examples."""
    if arguments.get("data") is None:
        return {}
    return {"data": _guard(lambda: Snapshot(model, **arguments).batches, "Reading the data")}


def _refuse_device(device: str | None) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInput(
            f"The device {device!r} cannot be used ({str(error).splitlines()[0]}); give another."
        ) from None


def _in_order(checkpoints: Sequence[Checkpoint]) -> tuple[list[tuple[int, Checkpoint]], list[str]]:
    """The checkpoints by step; in the order given where their steps are unknown, mixed or equal."""
    steps = [c.step for c in checkpoints]
    sources = {c.step_source for c in checkpoints}
    if None not in steps and len(set(steps)) == len(steps) and len(sources) == 1:
        return sorted(((int(c.step or 0), c) for c in checkpoints), key=lambda pair: pair[0]), []
    why = "do not all tell their step" if None in steps else "tell equal steps, or steps of different kinds"
    return list(enumerate(checkpoints)), [
        f"The checkpoints {why}, so they are numbered in the order given, from 0."
    ]


def _metadata(
    model: nn.Module, steps: Any, build: str, arguments: Mapping[str, Any], settings: Any
) -> dict[str, Any]:
    layers = {name: p.numel() for name, p in model.named_parameters()}
    return {
        "name": f"{len(steps)} checkpoints" if len(steps) > 1 else steps[0][1].path.name,
        "model": type(model).__name__,
        "parameters": sum(layers.values()),
        "layers": layers,
        "device": str(arguments.get("device") or next((p.device for p in model.parameters()), "cpu")),
        "threads": torch.get_num_threads(),
        "seed": arguments.get("seed", 0),
        "build": build,
        "checkpoints": [{"step": s, "path": str(c.path), "format": c.format} for s, c in steps],
        "settings": dict(settings or {}),
        "versions": {
            "diag": diag.__version__,
            "torch": str(torch.__version__),
            "numpy": numpy.__version__,
            "python": platform.python_version(),
        },
    }


def check_checkpoints(paths: Sequence[Path]) -> None:
    """Raise CheckpointError where a path is a run and not a checkpoint."""
    for path in paths:
        if (path / "run.json").is_file():
            raise CheckpointError(
                f"{path} is a run and not a checkpoint; leave --build out, and give one run alone."
            )
