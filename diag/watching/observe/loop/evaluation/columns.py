"""The columns of the inputs in evaluation beside those of training: some rows of each are kept, on the host."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diag.snapshot.batch import tensors_in
from diag.snapshot.loop.evaluated import ColumnFacts
from diag.watching.observe.loop.evaluation.arrangement import Arrangement
from diag.watching.observe.loop.evaluation.column_order import columns_moved
from diag.watching.observe.loop.evaluation.turned import turned_over
from diag.watching.observe.loop.modes import is_dense
from diag.watching.observe.loop.moment import Moment, due

ROWS_OF_COLUMNS, FEATURES_KEPT, ROWS_OF_CALL = 512, 256, 128
CALLS_EVALUATED = 6
FEWEST_ROWS_APART = 48
SPREADS_APART, SHIFTS_APART = 4.0, 2.0
NUMBERS_OF_CHANNEL = 256  # of an example's channel or sequence that are read
STANDS_SELDOM = 0.5  # of training's rows that may have the number at which a column stands


class FeatureColumns:
    """Follows the first floating tensor of calls in training and in evaluation mode."""

    def __init__(self, moment: Moment) -> None:
        self._moment = moment
        self._calls = self._evaluated_calls = 0
        self._training: list[Tensor] = []
        self._evaluated: list[Tensor] = []
        self._facts: ColumnFacts | None = ColumnFacts()
        self._arrangement = Arrangement()

    def training_call(self, args: Any, kwargs: Mapping[str, Any]) -> None:
        """The model was called in training."""
        self._calls += 1
        full = sum(map(len, self._training)) >= ROWS_OF_COLUMNS
        if (not full or due(self._calls)) and (rows := rows_by_feature(args, kwargs)) is not None:
            if full:
                self._training.pop(0)
            self._training.append(rows)
            self._arrangement.add(_first(args, kwargs), evaluated=False)
            self._facts = None

    def evaluated(self, args: Any, kwargs: Mapping[str, Any], training: bool) -> None:
        """The model was called without gradients; training: not to evaluate it."""
        if training or not self._training or self._evaluated_calls >= CALLS_EVALUATED:
            return
        rows = rows_by_feature(args, kwargs)
        if rows is not None and rows.shape[1:] == self._training[0].shape[1:]:
            self._evaluated_calls += 1
            self._evaluated.append(rows)
            self._arrangement.add(_first(args, kwargs), evaluated=True)
            self._facts = None
            self._moment.news(("columns", self._evaluated_calls), "columns")

    def facts(self) -> ColumnFacts:
        """As plain data."""
        if self._facts is None:
            alike = [t for t in self._training if t.shape[1:] == self._training[-1].shape[1:]]
            if self._evaluated:
                apart = columns_apart(torch.cat(alike), torch.cat(self._evaluated))
                self._facts = replace(apart, arrangement=self._arrangement.facts())
        return self._facts or ColumnFacts()


def rows_by_feature(args: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first floating tensor of a call as (rows, features, numbers), a part of it where it is large; None where
    it has no features."""
    t = _first(args, kwargs)
    if t is None or not t.is_cpu or t.ndim not in (2, 3, 4) or not t.numel():
        return None
    t = t.unsqueeze(2) if t.ndim == 2 else t.transpose(1, 2) if t.ndim == 3 else t.flatten(2)
    t = t[:, :FEATURES_KEPT, :: max(1, math.ceil(t.shape[2] / NUMBERS_OF_CHANNEL))]
    return t.float().clone() if t.ndim == 3 and bool(t.isfinite().all()) else None


def _first(args: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first rows of the first floating tensor of a call, as they are; None where it is sparse or the like."""
    t = next((t for t in tensors_in((args, dict(kwargs))) if t.is_floating_point()), None)
    if t is None or not is_dense(t):
        return None
    return t.detach()[:ROWS_OF_CALL] if t.ndim else t


def columns_apart(training: Tensor, evaluated: Tensor) -> ColumnFacts:
    """Both (rows, features, numbers): which features differ."""
    if training.shape[1] != evaluated.shape[1] or min(len(training), len(evaluated)) < FEWEST_ROWS_APART:
        return ColumnFacts(len(training), len(evaluated))
    own, other = (t.double().transpose(1, 2).flatten(0, 1) for t in (training, evaluated))
    mean, mean_, spread, spread_ = own.mean(0), other.mean(0), own.std(0), other.std(0)
    smallest = 1e-6 * (spread.median() + mean.abs().median())
    vary = (spread > smallest) & (spread_ > smallest)
    ratio = torch.maximum(spread / spread_, spread_ / spread)
    shift = (mean - mean_).abs() / torch.maximum(spread, spread_)
    apart = vary & ((ratio > SPREADS_APART) | (shift > SHIFTS_APART))
    found = apart.nonzero().flatten().tolist()
    one = found[0] if found else -1
    table = training.shape[2] == 1
    turned, skews = turned_over(training, evaluated)
    standing, number = _standing(own, other) if table else ((), math.nan)
    return ColumnFacts(
        len(training),
        len(evaluated),
        int(vary.sum()),
        len(found),
        one,
        tuple(float(t[one]) for t in (mean, spread, mean_, spread_)) if found else (),
        standing,
        number,
        columns_moved(own, other) if table else (),
        turned,
        skews,
    )


def _standing(own: Tensor, other: Tensor) -> tuple[tuple[int, ...], float]:
    stands = (other == other[:1]).all(0) & (own.std(0) > 0)
    seldom = (own == other[:1]).double().mean(0) <= STANDS_SELDOM
    found = (stands & seldom).nonzero().flatten().tolist()
    return tuple(found), float(other[0, found[0]]) if found else math.nan
