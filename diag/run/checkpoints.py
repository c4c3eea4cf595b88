"""A run made from checkpoints of one network: each is loaded into the user's model, measured, and becomes a step.

What takes at most one look at the data is measured on every checkpoint, first of all; what is expensive (curvature,
per-example gradients) on the first, the last and the one of the lowest loss, unless more is asked for.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn

import diag
from diag.build import Build, build_name, built_arguments, called_safely
from diag.checkpoints import Checkpoint, load_into, load_state
from diag.checkpoints.unwrap import bare_model
from diag.errors import CheckpointError, InvalidInput, first_line
from diag.registry import Instrument, Kind, find, instruments
from diag.result import Result
from diag.run.entries import Event, Record
from diag.run.files import META
from diag.run.over_ranks import AllRanks, OneProcess
from diag.run.run import Run
from diag.snapshot.sharded.whole import is_sharded
from diag.snapshot.snapshot import Snapshot

Progress = Callable[[int, int, str], None]


def from_checkpoints(
    paths: Iterable[str | os.PathLike[str]],
    build: Build,
    *,
    names: Sequence[str] = (),
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    options: Mapping[str, Any] | None = None,
    key: str | None = None,
    every: bool = False,
    ranks: bool = False,
    progress: Progress = lambda done, total, text: None,
) -> Run:
    """A run in memory with one step a checkpoint; its events say how the checkpoints were read.

    paths: checkpoint files or folders, in any order if they tell their steps. build: the function that gives
    `(model, loss_fn, data)`, or its name (module:function, file.py:function); its model is loaded with each
    checkpoint. names: the instruments, each then measured on every checkpoint; by default all that can judge a
    network by itself, the expensive ones on the first, the last and the best checkpoint. every: these,
    too, on every checkpoint. settings: an instrument's name -> its settings. options: arguments of `Snapshot` in
    place of the build function's. key: the entry of the files that holds the state dict. ranks: every rank of
    torch.distributed makes this call; they share the data (see `over_ranks`), and rank 0's run has the results.
    progress: called with (measurements made, measurements in all, what comes next).

    Each checkpoint has the one before it as its `previous`.
    Raises CheckpointError where one cannot be read or does not fit, InvalidInput where the build function fails.
    """
    files = checkpoint_files(paths)
    arguments = built_arguments(build) | dict(options or {})
    model = arguments.pop("model")
    _refuse_device(arguments.get("device"))
    chosen = [find(n) for n in names] or [i for i in instruments().values() if _is_of_a_moment(i)]
    read = partial(load_state, key=key, in_parts=ranks and is_sharded(bare_model(model)))
    places, events = by_step_order(files, read)
    arguments |= _read_once(model, arguments)
    by = AllRanks(model, arguments) if ranks else OneProcess(model, arguments)
    measuring = _Measuring(model, by, arguments.get("previous"), places, read, settings or {}, progress)
    cheap = chosen if names or every or len(places) <= 3 else [i for i in chosen if _takes_one_look(i)]
    expensive = [i for i in chosen if i not in cheap]
    measuring.total = len(places) * len(cheap) + 3 * len(expensive)
    measuring.measure(range(len(places)), cheap, losses=bool(expensive))
    if expensive:
        some = measuring.first_last_best()
        measuring.total -= (3 - len(some)) * len(expensive)
        measuring.measure(some, expensive)
        events.append(_told(some, places, expensive))
    progress(measuring.total, measuring.total, "")
    about = _metadata(model, places, build_name(build), arguments, settings)
    return Run(metadata=about, records=measuring.records, events=[*events, *measuring.events])


class _Place(NamedTuple):
    """A checkpoint, before its state is read again to be measured."""

    step: int
    path: Path
    format: str


class _Measuring:
    """Loads one checkpoint after the other into the model, and measures; holds two states at most."""

    def __init__(
        self,
        model: nn.Module,
        by: OneProcess,
        previous: Any,
        places: Sequence[_Place],
        read: Callable[[Path], Checkpoint],
        settings: Mapping[str, Mapping[str, Any]],
        progress: Progress,
    ) -> None:
        self._model, self._by, self._previous, self._places, self._read = model, by, previous, places, read
        self._settings, self._progress = settings, progress
        self.total = 0
        self.records: list[Record] = []
        self.events: list[Event] = []
        self._losses: dict[int, float] = {}
        self._loaded = -1  # which checkpoint is in the model

    def measure(self, which: Iterable[int], chosen: Sequence[Instrument], losses: bool = False) -> None:
        """Measure these checkpoints with these instruments; `losses`: note the mean loss of each as well."""
        for i in which:
            step, path, _ = self._places[i]
            previous = self._previous if i == 0 else self._state(i - 1) if self._by.takes_previous else None
            self._load(i)
            self._by.begin(previous)
            for instrument in chosen:
                self._progress(len(self.records), self.total, f"{path.name}: {instrument.title}")
                outcome = self._by.measure(instrument, self._settings.get(instrument.name, {}))
                if outcome is None:
                    continue
                seconds = outcome.provenance.seconds if isinstance(outcome, Result) else None
                self.records.append(Record(step, instrument.name, outcome, seconds))
            if losses:
                self._losses[i] = self._by.loss()

    def first_last_best(self) -> list[int]:
        """The first and the last checkpoint and, where a loss is known, the one of the lowest."""
        known = {i: loss for i, loss in self._losses.items() if math.isfinite(loss)}
        return sorted({0, len(self._places) - 1, *([min(known, key=known.__getitem__)] if known else [])})

    def _state(self, i: int) -> dict[str, Tensor]:
        self._load(i)
        return {name: value.clone() for name, value in self._model.state_dict().items()}

    def _load(self, i: int) -> None:
        if self._loaded == i:
            return
        self._by.load(lambda: self._load_own(*self._places[i]))
        self._loaded = i

    def _load_own(self, step: int, path: Path, _: str) -> None:
        checkpoint = self._read(path)
        notes = (*checkpoint.notes, *load_into(self._model, checkpoint))
        events = [Event(step, "checkpoint", f"{path}: {note}") for note in notes]
        self.events += [event for event in events if event not in self.events]  # it may be loaded twice


def _is_of_a_moment(instrument: Instrument) -> bool:
    """Whether it can judge a network by itself, without the steps and the loop that led there."""
    asks = {need.quantity.name for need in instrument.needs}
    return instrument.of_a_snapshot and not asks & {"history", "loop"} and instrument.kind is not Kind.DESCRIPTION


def _takes_one_look(instrument: Instrument) -> bool:
    return instrument.kind is Kind.CHECK or (
        instrument.passes is None and all(cost.one_look for cost in instrument.costs)
    )


def _told(some: Sequence[int], places: Sequence[_Place], expensive: Sequence[Instrument]) -> Event:
    steps = ", ".join(f"{places[i].step:,}" for i in some)
    text = (
        f"{', '.join(i.name for i in expensive)} take long and were measured on the first, the last and the best "
        f"checkpoint (steps {steps}); name one, or give every=True (--every), to measure it on all {len(places)}."
    )
    return Event(places[some[-1]].step, "info", text)


def _read_once(model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The data as batches, so that every checkpoint is measured on the same examples."""
    if arguments.get("data") is None:
        return {}
    alone = {**arguments, "ranks": False}
    return {"data": called_safely(lambda: Snapshot(model, **alone).batches, "Reading the data")}


def _refuse_device(device: str | None) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInput(f"The device {device!r} cannot be used ({first_line(error)}); give another.") from None


def checkpoint_files(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The paths, none of which is a run. Raises InvalidInput for none, CheckpointError for a run."""
    files = [Path(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
    if not files:
        raise InvalidInput("No checkpoint was given; give at least one path.")
    for path in files:
        if (path / META).is_file():
            raise CheckpointError(f"{path} is a run and not a checkpoint; leave build out, and give one run alone.")
    return files


def by_step_order(paths: Sequence[Path], read: Callable[[Path], Checkpoint]) -> tuple[list[_Place], list[Event]]:
    """The checkpoints by step; in the order given where their steps are unknown, mixed or equal.

    read: what gives a checkpoint. Each is read to its end, so that one that is damaged is refused before the first
    is measured; for a model that is sharded over ranks, only what the files say that they hold.
    """
    found = []
    for path in paths:
        checkpoint = read(path)
        found.append((checkpoint.step, checkpoint.step_source, path, checkpoint.format))
    steps = [step for step, *_ in found]
    if None not in steps and len(set(steps)) == len(steps) and len({source for _, source, *_ in found}) == 1:
        places = [_Place(int(step or 0), path, kind) for step, _, path, kind in found]
        return sorted(places, key=lambda place: place.step), []
    why = "do not all tell their step" if None in steps else "tell equal steps, or steps of different kinds"
    text = f"The checkpoints {why}, so they are numbered in the order given, from 0."
    numbered = [_Place(i, path, kind) for i, (_, _, path, kind) in enumerate(found)]
    return numbered, [Event(0, "checkpoint", text)]


def _metadata(
    model: nn.Module, places: Sequence[_Place], build: str, arguments: Mapping[str, Any], settings: Any
) -> dict[str, Any]:
    layers = {name: p.numel() for name, p in model.named_parameters()}
    return {
        "name": f"{len(places)} checkpoints" if len(places) > 1 else places[0].path.name,
        "model": type(model).__name__,
        "parameters": sum(layers.values()),
        "layers": layers,
        "device": str(arguments.get("device") or next((p.device for p in model.parameters()), "cpu")),
        "threads": torch.get_num_threads(),
        "seed": arguments.get("seed", 0),
        "build": build,
        "checkpoints": [{"step": p.step, "path": str(p.path), "format": p.format} for p in places],
        "settings": dict(settings or {}),
        "versions": {
            "diag": diag.__version__,
            "torch": str(torch.__version__),
            "numpy": numpy.__version__,
            "python": platform.python_version(),
        },
    }
