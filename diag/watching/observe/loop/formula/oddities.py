"""Which of the odd things in the formula of a loss are there, at a few backward passes: the first three, the 10th,
the 30th, the 100th, ... What is there at each look is told; a loop that alternates between losses is left alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

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
    one_kind,
    outputs_cut,
    pairs,
    squared_mean,
    summed,
)
from diag.watching.observe.loop.formula.denoisers import Denoisers
from diag.watching.observe.loop.formula.labels.likelihoods import likelihood, softmax_of_one
from diag.watching.observe.loop.formula.labels.pulls import PULLED_AWAY_SHARE, Pulled, listen
from diag.watching.observe.loop.formula.noise import noise
from diag.watching.observe.loop.formula.parts import Summand
from diag.watching.observe.loop.formula.scales import flows, scales
from diag.watching.observe.loop.modes import is_dense
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
        self._inputs |= {t.untyped_storage().data_ptr() for t in tensors[:OUTPUTS_LOOKED_AT] if is_dense(t)}
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
        nodes = list(nodes_before([root.grad_fn], NODES_OF_DERIVATIVES))  # the nearest first
        for found in {f.kind: f for f in self._odd(root, nodes, parts, zeros, inputs)}.values():
            self._keep(found)
        if parts:
            listen(root, parts, self._pulled)

    def _keep(self, odd: OddFound) -> None:
        """It was seen at the look under way."""
        before = self._found.get(odd.kind)
        first, seen = (before.first, before.seen) if before is not None else (self._moment.step, 0)
        if before is None or before.looked < self._looked:
            self._found[odd.kind] = Oddity(odd.kind, self._looked, seen + 1, first, odd.numbers, odd.of)
        if seen + 1 in LOOKS_THAT_TELL:
            self._moment.news(("odd", odd.kind, seen), "formula")

    def _pulled(self, pull: Pulled | None, of: str) -> None:
        """The backward pass that is looked at has come to the outputs."""
        before = self._found.get(Odd.PULLED_AWAY)
        if pull is not None and pull.share >= PULLED_AWAY_SHARE:
            self._keep(OddFound(Odd.PULLED_AWAY, {"share": pull.share, "label": float(pull.of)}, of))
        elif pull is None and before is not None and before.of == of:  # no gradient is left
            self._keep(OddFound(Odd.PULLED_AWAY, dict(before.numbers), before.of))

    def _odd(
        self, root: Tensor, nodes: list[Any], parts: list[Summand], zeros: int, inputs: set[int]
    ) -> Iterator[OddFound]:
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
        yield from softmax_of_one(root)
        yield from noise(root, inputs)
        yield from self._denoisers.found()
        yield from summed(root, self._rows)
        yield from flat_derivative(nodes)

    def facts(self) -> FormulaFacts:
        """As plain data."""
        return FormulaFacts(self._looked, tuple(self._found.values()))
