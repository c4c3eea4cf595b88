"""Values of actions (Q-learning) among the parts of a loss: which output of each row is compared with a number, the
one of an action that an index gives or the largest."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diag.snapshot.autograd_graph import PASSING_ON, first_arguments, kind_of, parents_of, signed
from diag.snapshot.loop.arithmetic import ActionFacts, ActionLook
from diag.watching.observe.loop.formula.parts import Summand, given_shape
from diag.watching.observe.loop.formula.reader import Reader
from diag.watching.observe.loop.formula.rollout import Rollout
from diag.watching.observe.loop.moment import Moment

COMPARING = ("MseLoss", "SmoothL1Loss", "HuberLoss", "L1Loss")
OF_THE_LARGEST, OF_AN_INDEX = ("Max", "Amax"), ("Gather", "Index")


class Actions(Reader[ActionLook]):
    """Reads which values a loss compares with numbers."""

    NAME, EVERY = "actions", 8

    def __init__(self, moment: Moment, rollout: Rollout) -> None:
        super().__init__(moment)
        self._rollout = rollout

    def _look(self, parts: list[Summand]) -> ActionLook | None:
        picked = next((kind for p in parts if (kind := picked_by(p))), "")
        if not picked:
            return None
        return ActionLook(self._moment.step, picked in OF_THE_LARGEST, self._rollout.acted)

    def facts(self) -> ActionFacts:
        """As plain data."""
        return ActionFacts(tuple(self.looks))


def picked_by(p: Summand) -> str:
    """The operation that takes one of each row's outputs, where a part compares that with a number; "" else."""
    node = _compared(p)
    for before in first_arguments(node, 8):
        kind = kind_of(before)
        if kind in OF_THE_LARGEST or kind in OF_AN_INDEX:
            shape = given_shape(*before.next_functions[0])
            of_rows = shape is not None and len(shape) == 2 and shape[1] > 1
            return kind if of_rows and (kind in OF_AN_INDEX or _over_columns(before)) else ""
        if kind not in PASSING_ON:
            break
    return ""


def _over_columns(node: Any) -> bool:
    axis = getattr(node, "_saved_dim", None)
    axes = axis if isinstance(axis, (tuple, list)) else [] if axis is None else [axis]
    return [signed(a) % 2 for a in axes] == [1]


def _compared(p: Summand) -> Any:
    """The node of what is compared with something that has no graph."""
    node = p.node
    if p.kind in COMPARING:
        return parents_of(node)[0] if len(parents_of(node)) == 1 else None
    if not p.is_square or not isinstance(getattr(node, "_saved_self", None), Tensor):
        return None
    before = parents_of(node)[0]
    alone = kind_of(before) in ("Sub", "Rsub") and len(parents_of(before)) == 1
    return parents_of(before)[0] if alone else None
