"""The per-example gradients that a user's rule for a layer gives, checked for names and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diag.errors import InvalidInput, first_line, type_of
from diag.gradients.layer_rules import PARAMETER
from diag.gradients.rules.blocks import Block, Dense
from diag.gradients.rules.call import Call, NoClosedForm
from diag.gradients.rules.layout import ExampleLayout


class RuleAnswer:
    """What the rule says of one recorded call of its layer; it is asked once, for all parameters together."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._found: Mapping[str, Tensor] | None = None

    def block(self, place: Any) -> Block:
        """The gradients of the parameter at this place. Raises NoClosedForm where the rule cannot be asked, and
        InvalidInput where it raises or gives something else than gradients."""
        if self._found is None:
            self._found = self._asked()
        name = place[0].removeprefix(PARAMETER)
        expected = (self._call.n, *self._call.use.slots[place].shape)
        found = self._found.get(name)
        if not isinstance(found, Tensor) or tuple(found.shape) != expected:
            what = f"of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type_of(found)
            raise InvalidInput(
                f"The gradient rule of {self._call.use.name} gives {'nothing' if found is None else what} for "
                f"{name}; expected a tensor of shape {expected}, one gradient an example."
            )
        return Dense(found.detach().to(self._call.delta))

    def _asked(self) -> Mapping[str, Tensor]:
        use, call = self._call.use, self._call
        others = [name for name in use.kwargs if not name.startswith(PARAMETER)]
        if call.layout != ExampleLayout(0) or others or use.rule is None:
            raise NoClosedForm("the rule takes examples along the first axis, and positional arguments")
        inputs = tuple(call.at((i,)) for i in range(len(use.args)))
        layer, rule = use.rule
        try:
            found = rule(layer, inputs, call.delta)
        except Exception as error:
            raise InvalidInput(
                f"The gradient rule of {use.name} raised an error ({first_line(error)}); expected a dict of each "
                "parameter's gradients."
            ) from error
        if not isinstance(found, Mapping):
            raise InvalidInput(
                f"The gradient rule of {use.name} returned {type_of(found)}; expected a dict of each "
                "parameter's gradients by its name."
            )
        return found
