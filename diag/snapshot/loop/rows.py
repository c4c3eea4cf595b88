"""What training's own batches said of each row of the data, as plain arrays (see `facts`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

_Floats = NDArray[numpy.float32]
_Integers = NDArray[numpy.int32]


def _floats(*shape: int) -> _Floats:
    return numpy.zeros(shape, numpy.float32)


def _integers(*shape: int) -> _Integers:
    return numpy.zeros(shape, numpy.int32)


@dataclass(frozen=True)
class Moved:
    """Steps `first` to `last`, whose batches gave nearly all of their `rows` rows another label than before."""

    first: int
    last: int
    rows: int


@dataclass(frozen=True)
class RowFacts:
    """The n rows that were followed; the k-th sight of a row is in column (k - 1) // width.

    counted_in: what the rows' numbers are places in: "data set", "probe set", or "" where a row is named by the
    step and the place in the batch of its first sight. every: one row of so many is followed. margins (n, L): of
    the label, before the step that learns from it, NaN where the row was not met so often; looks (n,); labels,
    answers (n,): the label, and the other class that the network held most likely at the last sight where it was
    not the label (-1: none). inputs: of the places that are counted in, in parts, (m, ...) each; none where they
    are not at hand. number (n,), first_step, first_place (n,). reason: why no rows can be told apart, in
    a clause; empty where they can. several: calls whose rows have two labels at once. changed: sights at which a
    row had another label than at first, of `compared`. moved: stretches of steps at which nearly all had."""

    counted_in: str = ""
    every: int = 1
    width: int = 1
    margins: _Floats = field(default_factory=lambda: _floats(0, 1), repr=False)
    looks: _Integers = field(default_factory=lambda: _integers(0), repr=False)
    labels: _Integers = field(default_factory=lambda: _integers(0), repr=False)
    answers: _Integers = field(default_factory=lambda: _integers(0), repr=False)
    number: _Integers = field(default_factory=lambda: _integers(0), repr=False)
    first_step: _Integers = field(default_factory=lambda: _integers(0), repr=False)
    first_place: _Integers = field(default_factory=lambda: _integers(0), repr=False)
    inputs: tuple[Tensor, ...] = field(default=(), repr=False)
    reason: str = "no loss of training was seen with one target a row"
    several: int = 0
    calls: int = 0
    compared: int = 0
    changed: int = 0
    moved: tuple[Moved, ...] = ()
    steps: int = 0

    @property
    def n(self) -> int:
        """How many rows were met."""
        return len(self.looks)

    def inputs_at(self, places: NDArray[Any]) -> Tensor | None:
        """The inputs at these places, (k, ...); None where they are not at hand."""
        ends = numpy.cumsum([len(part) for part in self.inputs])
        if not len(ends) or not len(places) or places.min() < 0 or places.max() >= ends[-1]:
            return None
        parts = numpy.searchsorted(ends, places, side="right")
        rows = [
            self.inputs[p][int(place - (ends[p] - len(self.inputs[p])))]
            for p, place in zip(parts, places, strict=True)
        ]
        return torch.stack(rows).detach().cpu() if len({r.shape for r in rows}) == 1 else None

    def name(self, row: int) -> str:
        """A row as a reader can find it."""
        if self.counted_in and self.number[row] >= 0:
            return f"{int(self.number[row])}"
        return f"step {int(self.first_step[row]):,} place {int(self.first_place[row])}"
