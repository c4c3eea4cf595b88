"""A run as one table: the scalars of each step, of every measurement, and of what the user logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy

from diag.result import Result, pandas_installed
from diag.snapshot.history import History, by_rows


def frame_of(
    history: History | None,
    series: Mapping[str, Sequence[tuple[int, Result]]],
    logged: Mapping[str, Sequence[tuple[int, float]]],
) -> Any:
    """The pandas DataFrame that `Run.to_frame` describes. series: by instrument."""
    pandas = pandas_installed()
    columns: dict[str, Any] = {}
    if history is not None:
        columns = {name: pandas.Series(values, history.steps) for name, values in _totals(history).items()}
    for name, course in series.items():
        for step, result in course:
            for scalar, value in result.scalars().items():
                columns.setdefault(f"{name}.{scalar}", {})[step] = float(value)
    columns |= {f"logged.{name}": dict(course) for name, course in logged.items()}
    columns = {name: pandas.Series(values, dtype=float) for name, values in columns.items()}
    return pandas.DataFrame(columns).sort_index().rename_axis("step")


def _totals(history: History) -> dict[str, Any]:
    """The scalars of each step: the loss and the norms of the whole network."""
    line = {"loss": history.loss, "learning_rate": history.learning_rate}
    for name in ("gradient_norm", "parameter_norm", "update_norm", "distance"):
        line[name] = by_rows(history, partial(_norm_of_all, name))
    return line


def _norm_of_all(name: str, history: History) -> Any:
    return numpy.sqrt(numpy.square(getattr(history, name), dtype=float).sum(1))
