"""Put the recorded calls' contributions together, parameter by parameter.

A parameter is handed on as soon as its last call has contributed, so that during a backward pass only the
output gradients of parameters that are not yet complete are held.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diag.gradients.capture import Use
from diag.gradients.methods import by_closed_form, by_replay, by_rule
from diag.gradients.plan import Plan
from diag.gradients.rules import fallback
from diag.gradients.rules.blocks import Block, Dense, Outer
from diag.gradients.rules.by_user import RuleAnswer
from diag.gradients.rules.call import Call, NoClosedForm, single
from diag.gradients.rules.closed_forms import FORMS
from diag.gradients.rules.combination import Placed, combined
from diag.gradients.sources import Source
from diag.linalg.deadline import NEVER, Deadline


class Assembly:
    """Collects blocks; `consume(name, block)` is called once for each parameter that any example moves."""

    def __init__(
        self,
        plan: Plan,
        uses: list[Use],
        n: int,
        parameters: dict[str, nn.Parameter],
        consume: Callable[[str, Block], None],
        deadline: Deadline = NEVER,
    ) -> None:
        self.deadline = deadline
        self.plan, self.uses, self.n, self.parameters, self.consume = plan, uses, n, parameters, consume
        self._parts: dict[str, list[Block]] = {}
        self._held: dict[int, Tensor] = {}
        self._expected: dict[str, int] = {}  # contributions to come, by parameter

    def add(self, index: int, delta: Tensor) -> None:
        """The gradient of the summed losses at the output of call number `index`."""
        if index in self.plan.late:
            self._held[index] = delta
        else:
            self._read(index, delta)

    def finish(self, losses: Tensor | None) -> None:
        """Hand on what is left; `losses` (n,), with their graph, serve the plan's graph parameters."""
        for index, delta in self._held.items():
            self._read(index, delta)
        for name in list(self._parts):  # some of its calls had no way to the loss
            self._hand_on(name)
        for name in sorted(self.plan.graph_parameters):
            assert losses is not None
            self.consume(name, _one_axis(fallback.through_graph(losses, self.parameters[name], self.deadline)))

    def _count(self) -> None:
        for index, places in self.plan.places.items():
            for name in (name for place in places for name in self.uses[index].slots[place].names):
                self._expected[name] = self._expected.get(name, 0) + 1

    def _read(self, index: int, delta: Tensor) -> None:
        if not self._expected:  # only now: the calls may still have been coming in
            self._count()
        self.deadline.check()
        use = self.uses[index]
        self.uses[index] = use.bare()
        call = Call(use, single(delta), self.plan.layouts[index], self.n)
        answer = None if use.rule is None else RuleAnswer(call)
        for place in self.plan.places[index]:
            source = use.slots[place]
            if set(source.names) <= self.plan.graph_parameters:
                continue
            try:
                block = self._block(call, place, answer)
            except NoClosedForm:
                self.plan.graph_parameters |= set(source.names)
                continue
            if source.edge is not None:
                self.plan.late.add(index)
            for name, part in _to_parameters(block, source, self.parameters, self.deadline).items():
                self._parts.setdefault(name, []).append(part)
        for name in (name for place in self.plan.places[index] for name in use.slots[place].names):
            self._expected[name] -= 1
            if self._expected[name] == 0 and name in self._parts:
                self._hand_on(name)

    def _hand_on(self, name: str) -> None:
        parts = self._parts.pop(name)
        if name not in self.plan.graph_parameters:
            self.consume(name, combined(parts))

    def _block(self, call: Call, place: Any, answer: RuleAnswer | None) -> Block:
        """What the layer's own rule answers; the closed form, or else the call replayed for each example."""
        methods, names = self.plan.methods, call.use.slots[place].names
        if answer is not None:
            block = answer.block(place)
            methods.update(dict.fromkeys(names, by_rule(call.use.name)))
            return block
        try:
            block = FORMS[call.use.name](call, place)
            methods.update(dict.fromkeys(names, by_closed_form(call.use.name)))
            return block
        except (KeyError, NoClosedForm):
            block = fallback.replayed_block(call, place, self.deadline)
        try:
            block.dense(slice(0, 1))  # fails here, if at all, where another method can still be chosen
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise NoClosedForm(str(error)) from error
        methods.update(dict.fromkeys(names, by_replay(call.use.name)))
        self.plan.late.add(call.use.index)
        return block


def _to_parameters(
    block: Block, source: Source, parameters: dict[str, nn.Parameter], deadline: Deadline
) -> dict[str, Block]:
    if source.edge is not None:
        return {n: _one_axis(b) for n, b in fallback.pulled_back(block, source, parameters, deadline).items()}
    name = source.names[0]
    if source.positions is None:
        return {name: _one_axis(block)}
    return {name: _one_axis(_placed(block, source.positions(), parameters[name].shape))}


def _placed(block: Block, positions: Tensor, shape: torch.Size) -> Block:
    order = torch.arange(shape.numel(), device=positions.device)
    if positions.numel() == shape.numel() and torch.equal(positions.flatten(), order):
        return _reshaped(block, shape)
    plain = type(block) is Outer and block.groups == 1 and positions.shape == shape[::-1]
    if plain and torch.equal(positions.T.flatten(), order):
        assert isinstance(block, Outer)
        return Outer(block.b, block.a, shape)
    return Placed(block, positions, shape)


def _reshaped(block: Block, shape: torch.Size) -> Block:
    if tuple(shape) == block.shape:
        return block
    if type(block) is Dense:
        return Dense(block.values.reshape(block.n, *shape))
    return Placed(block, torch.arange(shape.numel(), device=block.device), shape)


def _one_axis(block: Block) -> Block:
    """Scalars become vectors of length one, so that every block has a first axis."""
    return block if block.shape else Dense(block.dense(slice(None)).reshape(block.n, 1))
