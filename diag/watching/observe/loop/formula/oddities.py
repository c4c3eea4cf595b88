"""Which of the odd things in the formula of a loss are there, at a few backward passes: the first three, the 10th,
the 30th, the 100th, ... What is there at each look is told; a loop that alternates between losses is left alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from diag.snapshot.autograd_graph import nodes_before
from diag.snapshot.batch import tensors_in
from diag.snapshot.loop.arithmetic import FormulaFacts, Odd, Oddity
from diag.watching.observe.loop.data.targets import OF_NUMBERS
from diag.watching.observe.loop.formula.answers import diluted, met_by_zero
from diag.watching.observe.loop.formula.chains import OddFound
from diag.watching.observe.loop.formula.compared import (
    beyond,
    flat_derivative,
    likelihood,
    one_kind,
    outputs_cut,
    pairs,
    squared_mean,
    summed,
)
from diag.watching.observe.loop.formula.denoisers import Denoisers
from diag.watching.observe.loop.formula.noise import noise
from diag.watching.observe.loop.formula.parts import Summand
from diag.watching.observe.loop.formula.scales import flows, scales
from diag.watching.observe.loop.moment import Moment, due

NODES_NEAR, OUTPUTS_LOOKED_AT = 192, 16
NODES_OF_DERIVATIVES = 512
LOOKS_THAT_TELL = (3, 4)


class Oddities:
    """Looks at backward passes from one number."""

    def __init__(self, moment: Moment) -> None:
        self._moment = moment
        self._passes = self._looked = self._rows = 0
        self._looking = True  # the next pass is to be read
        self._cut: list[int] = []  # of the outputs since: nothing of them is kept, which would keep their graphs
        self._inputs: set[int] = set()  # where the tensors that the model was given lie
        self._found: dict[Odd, Oddity] = {}
        self._denoisers = Denoisers()

    def training_call(self, args: Any, kwargs: Mapping[str, Any], outputs: Any) -> None:
        """The model was called in training."""
        if not self._looking:
            return
        tensors = tensors_in((args, dict(kwargs)))
        self._rows = next((len(t) for t in tensors if t.ndim), 0)
        self._inputs |= {
            t.untyped_storage().data_ptr() for t in tensors[:OUTPUTS_LOOKED_AT] if t.layout is torch.strided
        }
        self._denoisers.training_call(tensors)
        tensors = [outputs] if isinstance(outputs, Tensor) else tensors_in(outputs)
        found = [outputs_cut(t.grad_fn) for t in tensors if t.grad_fn is not None]
        self._cut = (self._cut + found)[-OUTPUTS_LOOKED_AT:]

    def loss_called(self, name: str, prediction: Any, target: Any) -> None:
        """A loss function of torch, or what amounts to one, is called on these."""
        if self._looking and name in OF_NUMBERS:
            self._denoisers.loss_called(prediction, target)

    def begins(self) -> bool:
        """A backward pass begins; whether it is to be read."""
        self._passes += 1
        looking, self._looking = self._looking, due(self._passes + 1)
        if not looking:
            self._cut, self._inputs = [], set()
            self._denoisers.forget()
        return looking

    def read(self, root: Tensor, parts: list[Summand]) -> None:
        """Look at the loss of a pass that is to be read."""
        zeros, self._cut = next(filter(None, self._cut), 0), []
        inputs, self._inputs = self._inputs, set()
        self._looked += 1
        for kind, (_, numbers, of) in {f.kind: f for f in self._odd(root, parts, zeros, inputs)}.items():
            before = self._found.get(kind)
            first, seen = (before.first, before.seen) if before is not None else (self._moment.step, 0)
            self._found[kind] = Oddity(kind, self._looked, seen + 1, first, numbers, of)
            if seen + 1 in LOOKS_THAT_TELL:
                self._moment.news(("odd", kind, seen), "formula")

    def _odd(self, root: Tensor, parts: list[Summand], zeros: int, inputs: set[int]) -> Iterator[OddFound]:
        nodes = list(nodes_before([root.grad_fn], NODES_OF_DERIVATIVES))  # the nearest first
        near = nodes[:NODES_NEAR]
        if parts:
            yield from scales(parts)
            yield from flows(parts)
            yield from squared_mean(parts)
            yield from likelihood(parts)
            yield from one_kind(near, parts)
            yield from met_by_zero(parts)
        yield from diluted(near)
        yield from pairs(near)
        yield from beyond(near)
        if zeros:
            yield OddFound(Odd.OUTPUTS_CUT, {"outputs": float(zeros)})
        yield from noise(root, inputs)
        yield from self._denoisers.found()
        yield from summed(root, self._rows)
        yield from flat_derivative(nodes)

    def facts(self) -> FormulaFacts:
        """As plain data."""
        return FormulaFacts(self._looked, tuple(self._found.values()))
