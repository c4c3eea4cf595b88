"""Values of actions (Q-learning) among the parts of a loss: which output of each row is compared with a number, the
one of an action that an index gives or the largest, and what that number is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diag.snapshot.autograd_graph import PASSING_ON, first_arguments, kind_of, nodes_before, parents_of, signed
from diag.snapshot.loop.arithmetic import ActionFacts, ActionLook
from diag.watching.observe.loop.formula.parts import Summand, given_shape
from diag.watching.observe.loop.formula.reader import Reader
from diag.watching.observe.loop.formula.rewards.next_values import (
    MODEL,
    NEXT_ROWS_COMPARED,
    NextValues,
    discount_in,
    settled_in,
    values_of_next,
)
from diag.watching.observe.loop.formula.rewards.rollout import Rollout
from diag.watching.observe.loop.moment import Moment

COMPARING = ("MseLoss", "SmoothL1Loss", "HuberLoss", "L1Loss")
OF_THE_LARGEST, OF_AN_INDEX = ("Max", "Amax"), ("Gather", "Index")
NODES_OF_NUMBER = 32  # of what a value is compared with, that are searched


@dataclass(frozen=True)
class Picked:
    """What takes one of each row's outputs where a part of a loss compares that with a number. node: the operation,
    kind: its name; shape: of the outputs; other: the node of the number, None where it has no graph."""

    part: Summand
    node: Any
    kind: str
    shape: tuple[int, ...]
    other: Any


class Actions(Reader[ActionLook]):
    """Reads which values a loss compares with numbers."""

    NAME, EVERY = "actions", 8

    def __init__(self, moment: Moment, rollout: Rollout, following: NextValues) -> None:
        super().__init__(moment)
        self._rollout, self._next = rollout, following

    def _look(self, parts: list[Summand]) -> ActionLook | None:
        picked = next((found for p in parts if (found := picked_in(p)) is not None), None)
        if picked is None:
            return None
        self._next.follow()
        call = self._rollout.call_behind(picked.node.next_functions[0][0])
        index = index_of(picked)
        rows, actions = picked.shape
        one = index is not None and bool((index == index[0]).all())
        return ActionLook(
            step=self._moment.step,
            largest=picked.kind in OF_THE_LARGEST and picked.other is None,
            acted=self._rollout.acted,
            rows=rows,
            actions=actions,
            picked=int(index[0]) if index is not None and one else -1,
            through=self._through(picked.other, call),
            **self._made_of(picked, call),
        )

    def _through(self, other: Any, call: int) -> bool:
        """Whether what a value is compared with is one of each row's outputs of another call of the model."""
        if other is None or call < 0:
            return False
        calls = self._rollout.others_than(call)
        nodes = list(nodes_before([other], NODES_OF_NUMBER, lambda node: node._sequence_nr() in calls))
        picks = any(_takes_one(node) for node in nodes)
        return picks and any(node._sequence_nr() in calls for node in nodes)

    def _made_of(self, picked: Picked, call: int) -> dict[str, Any]:
        """What the numbers are made of, as fields of a look."""
        others = [(MODEL, t) for t in self._rollout.others_than(call).values() if tuple(t.shape) == picked.shape]
        targets = targets_of(picked, self._rollout.output_behind(picked.node.next_functions[0][0]))
        following = values_of_next([*self._next.of(picked.shape), *others]) if targets is not None else []
        if targets is None or not following:
            return {}
        numbers = targets.double()[:NEXT_ROWS_COMPARED].numpy()
        discounts = ((discount_in(numbers, values), number) for number, values in following)
        discount, copy = next((d for d in discounts if not math.isnan(d[0])), (math.nan, MODEL))
        settled, at = settled_in(numbers, following[0][1])
        return {"discount": discount, "copy": copy, "settled": settled, "settled_at": at}

    def facts(self) -> ActionFacts:
        """As plain data."""
        return ActionFacts(tuple(self.looks))


def picked_in(p: Summand) -> Picked | None:
    """What takes one of each row's outputs, where a part compares that with a number or another such output."""
    sides = _compared(p)
    for node, other in ((a, b) for a in sides for b in (sides if len(sides) == 2 else [None]) if a is not b):
        for before in first_arguments(node, 8):
            if _takes_one(before):
                shape = given_shape(*before.next_functions[0])
                return None if shape is None else Picked(p, before, kind_of(before), shape, other)
            if kind_of(before) not in PASSING_ON and not _takes_all(before):
                break
    return None


def _takes_all(node: Any) -> bool:
    """Whether a selection takes the one column that there is."""
    shape = given_shape(*node.next_functions[0]) if kind_of(node) == "Select" else None
    return shape is not None and len(shape) == 2 and shape[1] == 1 and signed(node._saved_dim) % 2 == 1


def _takes_one(node: Any) -> bool:
    """Whether an operation takes one number of each row of a matrix."""
    kind = kind_of(node)
    if kind not in OF_THE_LARGEST and kind not in OF_AN_INDEX:
        return False
    shape = given_shape(*node.next_functions[0])
    of_rows = shape is not None and len(shape) == 2 and shape[1] > 1
    return of_rows and (kind in OF_AN_INDEX or _over_columns(node))


def _over_columns(node: Any) -> bool:
    axis = getattr(node, "_saved_dim", None)
    axes = axis if isinstance(axis, (tuple, list)) else [] if axis is None else [axis]
    return [signed(a) % 2 for a in axes] == [1]


def _compared(p: Summand) -> list[Any]:
    """The nodes of what is compared: one with something that has no graph, or two."""
    node = p.node
    if p.kind in COMPARING:
        return parents_of(node)
    if not p.is_square or not isinstance(getattr(node, "_saved_self", None), Tensor):
        return []
    before = parents_of(node)[0]
    return parents_of(before) if kind_of(before) in ("Sub", "Rsub") else []


def index_of(picked: Picked) -> Tensor | None:
    """The index (rows,) by which one output of each row is taken; None where it is another one, or on a device."""
    if picked.kind not in OF_AN_INDEX:
        return None
    saved: Any = picked.node._saved_index if picked.kind == "Gather" else picked.node._saved_indices
    index: Any = saved if picked.kind == "Gather" else saved[-1] if len(saved) == 2 else None
    usual = isinstance(index, Tensor) and index.is_cpu and index.numel() == picked.shape[0]
    return index.reshape(-1) if usual else None


def targets_of(picked: Picked, outputs: Tensor | None) -> Tensor | None:
    """The numbers (rows,) that the values are compared with; None where the graph does not have them. outputs:
    those that the values are taken of."""
    index, node = index_of(picked), picked.part.node
    if picked.other is not None or index is None or not index.numel():
        return None
    if picked.part.kind in COMPARING:
        found = node._saved_target if node.next_functions[0][0] is not None else node._saved_self
    else:
        before = parents_of(node)[0]
        values = None if outputs is None else outputs.gather(1, index[:, None]).reshape(-1)
        positive = kind_of(before) == "Sub" and before.next_functions[0][0] is not None
        difference = node._saved_self.detach().reshape(-1)
        same = values is not None and values.shape == difference.shape
        found = (values - difference if positive else values + difference) if values is not None and same else None
    usual = isinstance(found, Tensor) and found.is_cpu and found.numel() == picked.shape[0]
    return torch.as_tensor(found).detach().reshape(-1) if usual else None
