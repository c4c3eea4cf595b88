"""All that is read of what a loss is made of, in one place: what the loop's observer hands on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diag.watching.observe.loop.formula.arithmetic import Arithmetic
from diag.watching.observe.loop.moment import Moment


class Formula:
    """Hands events on to those who read the graph of the loss."""

    def __init__(self, moment: Moment) -> None:
        self._arithmetic = Arithmetic(moment)

    def training_call(self, args: Any, kwargs: Mapping[str, Any], outputs: Any) -> None:
        """The model was called in training."""
        self._arithmetic.training_call(outputs)

    def backward_called(self, roots: Any) -> None:
        """A backward pass begins."""
        self._arithmetic.backward_called(roots)

    def facts(self) -> dict[str, Any]:
        """As fields of the facts of the loop."""
        return {"arithmetic": self._arithmetic.facts()}
