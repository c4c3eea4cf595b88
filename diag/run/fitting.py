"""Whether rows, and the layers of a model, fit the run that they are written to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from diag.errors import RunError
from diag.run.rows import CRC
from diag.snapshot.history import History


def table_of(
    rows: History, dtype: numpy.dtype[Any], layers: Mapping[str, int], last_step: int, path: Path
) -> NDArray[Any]:
    """The rows in the form of the file. Raises RunError where they do not continue after `last_step`, or are of
    other layers."""
    refuse_other_layers(layers, dict(zip(rows.layers, rows.sizes, strict=True)), path)
    if rows.steps[0] <= last_step or (numpy.diff(rows.steps) <= 0).any():
        raise RunError(
            f"Steps {rows.steps[0]} to {rows.steps[-1]} do not continue {path}, whose last step is {last_step}; "
            "append increasing steps after it."
        )
    table = numpy.zeros(len(rows), dtype)
    for name in dtype.names or ():
        if name != CRC:
            table[name] = getattr(rows, name)
    return table


def refuse_other_layers(known: Mapping[str, int], new_layers: Mapping[str, int], path: Path) -> None:
    """Raise RunError, naming the first difference, where a run has other layers than what is to be written."""
    if list(known.items()) == list(new_layers.items()):
        return
    for name in [*known, *new_layers]:
        if known.get(name) != new_layers.get(name):
            has, gets = (f"{d[name]:,} elements" if name in d else "no such layer" for d in (known, new_layers))
            raise RunError(
                f"The model does not fit the run {path}: for {name} the run has {has} and the model {gets}; "
                "give the same model, or another run folder."
            )
    raise RunError(f"The model has the layers of the run {path} in another order; give the same model.")
