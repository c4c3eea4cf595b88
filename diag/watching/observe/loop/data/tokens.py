"""The whole numbers that a model is called with: are they all one, and are the bags that they are put in empty?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diag.snapshot.batch import tensors_in
from diag.snapshot.loop.inputs import TokenFacts
from diag.watching.observe.loop.modes import is_dense
from diag.watching.observe.loop.moment import Moment, due

CALLS_READ, NUMBERS_READ = 6, 1 << 14  # calls of which the numbers are read, then ever fewer; numbers of a call
FEWEST_BAGS = 4
CALLS_TOLD = (3, 6)


class Tokens:
    """Follows the calls of training whose inputs are whole numbers alone."""

    def __init__(self, moment: Moment) -> None:
        self._moment = moment
        self._seen = self._calls = self._numbers = 0
        self._distinct: set[int] = set()
        self._bag_calls = self._bags = self._empty = 0

    def training_call(self, args: Any, kwargs: Mapping[str, Any]) -> None:
        """The model was called in training."""
        self._seen += 1
        inputs = tensors_in((args, dict(kwargs)))
        if not (self._seen <= CALLS_READ or due(self._seen)) or not inputs or not all(map(_is_whole, inputs)):
            return
        if _are_bags(inputs):
            tokens, offsets = inputs
            self._bag_calls, self._bags = self._bag_calls + 1, self._bags + len(offsets)
            self._empty += bool((offsets == 0).all())
            inputs = [tokens]
        self._calls += 1
        for t in inputs:
            numbers = t.detach().reshape(-1)[:NUMBERS_READ]
            self._numbers += numbers.numel()
            if len(self._distinct) < 2:
                self._distinct |= set(numbers.unique()[:2].tolist())
        if self._calls in CALLS_TOLD:
            self._moment.news(("tokens", self._calls), "tokens")

    def facts(self) -> TokenFacts:
        """As plain data."""
        return TokenFacts(
            calls=self._calls,
            numbers=self._numbers,
            distinct=len(self._distinct),
            one=min(self._distinct, default=0),
            bag_calls=self._bag_calls,
            bags=self._bags,
            empty_calls=self._empty,
        )


def _is_whole(t: Tensor) -> bool:
    read = t.is_cpu and is_dense(t) and t.numel() > 0
    return read and t.dtype in (torch.int64, torch.int32)


def _are_bags(inputs: list[Tensor]) -> bool:
    """Whether these are one row of tokens and the places in it where bags begin, as of an `EmbeddingBag`."""
    if len(inputs) != 2 or inputs[0].ndim != 1 or inputs[1].ndim != 1:
        return False
    tokens, offsets = inputs
    rising = bool((offsets.diff() >= 0).all()) and int(offsets[0]) == 0
    return FEWEST_BAGS <= len(offsets) <= len(tokens) and rising and int(offsets[-1]) < len(tokens)
