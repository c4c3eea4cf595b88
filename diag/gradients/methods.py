"""By which method a parameter's per-example gradients are computed."""

from __future__ import annotations

import enum
from typing import Self


class How(enum.Enum):
    """The kinds of methods, the fastest first."""

    NUMBERS = enum.auto()  # by the user, as numbers
    NOT_MOVED = enum.auto()  # no example moves the parameter
    CLOSED_FORM = enum.auto()
    RULE = enum.auto()  # that the layer's user gave
    REPLAYED = enum.auto()  # the call, for each example
    WHOLE_GRAPH = enum.auto()  # back from each example's loss


class Method(str):
    """A method: what it is in words, and its kind beside it."""

    how: How

    def __new__(cls, text: str, how: How) -> Self:
        made = super().__new__(cls, text)
        made.how = how
        return made

    @property
    def one_by_one(self) -> bool:
        """Whether it takes the examples one at a time."""
        return self.how in (How.REPLAYED, How.WHOLE_GRAPH)


GIVEN_AS_NUMBERS = Method("given", How.NUMBERS)
NOT_MOVED = Method("no example moves it", How.NOT_MOVED)
WHOLE_GRAPH = Method("through the whole graph, one example at a time", How.WHOLE_GRAPH)


def by_closed_form(call: str) -> Method:
    """By the closed form of this call."""
    return Method(call, How.CLOSED_FORM)


def by_rule(layer: str) -> Method:
    """By the rule that was given for this class of layers."""
    return Method(f"the rule of {layer}", How.RULE)


def by_replay(call: str) -> Method:
    """By replaying this call for each example."""
    return Method(f"{call}, replayed for each example", How.REPLAYED)
