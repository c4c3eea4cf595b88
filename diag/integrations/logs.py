"""Logs of other tools as a run: trainer_state.json, Lightning's CSV, TensorBoard events, W&B exports, CSV and
JSONL.

What was logged is all there is: the loss at the steps at which it was logged, a learning rate, and the user's other
numbers. The checks of the loss's course judge it; what needs more says that it is missing.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy

from diag.errors import InvalidInput
from diag.run.reading import read_run
from diag.run.run import Run
from diag.run.writer import RunWriter
from diag.snapshot.history import History, empty_history

STEP_NAMES = ("step", "global_step", "_step", "trainer/global_step", "iteration", "iter", "epoch")
LOSS_NAMES = (
    "loss",
    "train_loss",
    "train/loss",
    "training_loss",
    "train_loss_step",
    "loss/train",
    "train_loss_epoch",
)
RATE_NAMES = ("learning_rate", "lr", "train/learning_rate", "train/lr")
LARGEST_LOG = 1 << 28  # bytes of a log
THIN = "The loss was logged at {} of {:,} steps, so what happened between them is not known."

LoggedRow = tuple[int, dict[str, float]]


def run_of_log(path: str | Path) -> Run:
    """The run that the log at `path` records, in memory.

    A file (trainer_state.json; .csv; .jsonl, .ndjson; a TensorBoard events file), or a folder that holds one.
    Raises InvalidInput, in one sentence, where there is no log, or one without steps.
    """
    file = _log_file(Path(path))
    rows = _renumbered(_merged(_read(file)), str(file))
    history = _history(rows)
    metrics: dict[str, list[tuple[int, float]]] = {}
    used = {_column(rows, LOSS_NAMES), _column(rows, RATE_NAMES), *STEP_NAMES}
    for step, values in rows:
        for name, value in values.items():
            if name not in used:
                metrics.setdefault(name, []).append((step, value))
    about = {"name": file.parent.name if file.stem in ("metrics", "trainer_state") else file.stem, "log": str(file)}
    return Run(metadata=about, history=history, metrics=metrics)


def import_log(path: str | Path, run: str | Path) -> Run:
    """As `run_of_log`, written into the folder `run`, so that every command works on it."""
    made = run_of_log(path)
    with RunWriter(run, dict(made.metadata) | {"layers": {}}) as writer:
        if made.history is not None:
            writer.append_steps(made.history)
        for step, values in _by_step(made.metrics):
            writer.append_metrics(step, values)
    return read_run(Path(run))


def _by_step(metrics: Mapping[str, Any]) -> Iterable[tuple[int, dict[str, float]]]:
    rows: dict[int, dict[str, float]] = {}
    for name, course in metrics.items():
        for step, value in course:
            rows.setdefault(step, {})[name] = value
    return sorted(rows.items())


def _log_file(path: Path) -> Path:
    if path.is_file():
        return path
    if path.is_dir():
        for pattern in (
            "trainer_state.json",
            "metrics.csv",
            "*.tfevents.*",
            "events.out.tfevents*",
            "*.jsonl",
            "*.csv",
        ):
            found = sorted([*path.glob(pattern), *path.glob(f"*/{pattern}")])
            if found:
                return found[-1]
        raise InvalidInput(
            f"{path} holds no log; expected trainer_state.json, metrics.csv, TensorBoard events or JSONL."
        )
    raise InvalidInput(f"There is no {path}; give a log file or a folder with one.")


def _read(file: Path) -> Iterable[LoggedRow]:
    if file.stat().st_size > LARGEST_LOG:
        raise InvalidInput(f"{file} is larger than {LARGEST_LOG >> 20} MiB; give a part of the log.")
    if "tfevents" in file.name:
        return _tensorboard(file)
    readers = {".json": _json, ".csv": _csv, ".jsonl": _jsonl, ".ndjson": _jsonl}
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise InvalidInput(
            f"{file} ends in {file.suffix or 'nothing'}; expected .json, .csv, .jsonl or TensorBoard events."
        )
    try:
        return list(reader(file))
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error, RecursionError) as error:
        raise InvalidInput(
            f"{file} cannot be read as {file.suffix[1:]} ({str(error).splitlines()[0][:120]}); give a log that is "
            "whole."
        ) from None


def _json(file: Path) -> Iterable[LoggedRow]:
    """The log_history of transformers' trainer_state.json, or a list of such rows."""
    data = json.loads(file.read_text(encoding="utf-8"))
    rows = data.get("log_history") if isinstance(data, Mapping) else data
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise InvalidInput(f"{file} has no log_history; expected a trainer_state.json or a list of rows.")
    return _rows(rows)


def _csv(file: Path) -> Iterable[LoggedRow]:
    with open(file, newline="", encoding="utf-8-sig") as opened:
        yield from _rows(csv.DictReader(opened))


def _jsonl(file: Path) -> Iterable[LoggedRow]:
    with open(file, encoding="utf-8") as lines:
        # A log that is still written may end in half a line.
        yield from _rows(row for line in lines if line.strip() and isinstance(row := _parsed(line), Mapping))


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _tensorboard(file: Path) -> Iterable[LoggedRow]:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        raise InvalidInput(f"{file} needs the package tensorboard to be read: pip install diag[sinks].") from None
    events = EventAccumulator(str(file), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            yield int(event.step), {name: float(event.value)}


def _rows(rows: Iterable[Mapping[str, Any]]) -> Iterable[LoggedRow]:
    """(step, numbers) of each row that has a step."""
    for row in rows:
        numbers = {str(k).strip(): v for k, value in row.items() if (v := _number(value)) is not None}
        lower = {name.lower(): name for name in numbers}
        step = next((numbers[lower[name]] for name in STEP_NAMES if name in lower), None)
        if step is not None and math.isfinite(step) and step >= 0:
            yield int(step), {name: v for name, v in numbers.items() if name.lower() not in STEP_NAMES}


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or value is None or value == "":
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _merged(rows: Iterable[LoggedRow]) -> list[LoggedRow]:
    """One row a step, in step order; of a number that was logged twice at a step the last counts."""
    merged: dict[int, dict[str, float]] = {}
    for step, values in rows:
        merged.setdefault(step, {}).update(values)
    return sorted(merged.items())


def _renumbered(rows: list[LoggedRow], source: str) -> list[LoggedRow]:
    """Steps count from 1; a log that begins with 0 counts from there."""
    if not any(values for _, values in rows):
        raise InvalidInput(f"{source} has no row with a step ({', '.join(STEP_NAMES[:4])}) and a number.")
    first = rows[0][0]
    return [(step + 1, values) for step, values in rows] if first == 0 else rows


def _column(rows: list[LoggedRow], names: tuple[str, ...]) -> str | None:
    """The first of these names that a row has, whatever its case; for the loss also a name that ends in it."""
    known = {name.lower(): name for _, values in rows for name in values}
    return next((known[name] for name in names if name in known), None)


def _history(rows: list[LoggedRow]) -> History | None:
    loss, rate = _column(rows, LOSS_NAMES), _column(rows, RATE_NAMES)
    logged = [(step, values) for step, values in rows if loss in values]
    if not logged:
        return None
    made = empty_history({}, len(logged))
    losses = numpy.array([values[loss] for _, values in logged])  # type: ignore[index]
    rates = numpy.array([values.get(rate, math.nan) if rate else math.nan for _, values in logged])
    last = rows[-1][0]
    thin = (THIN.format(len(logged), last),) if len(logged) < last else ()
    return dataclasses.replace(
        made,
        steps=numpy.array([step for step, _ in logged]),
        loss=losses,
        loss_finite=numpy.isfinite(losses),
        learning_rate=rates,
        total_steps=last,
        notes=thin,
    )
