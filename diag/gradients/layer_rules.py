"""Rules that users give for the per-example gradients of their own layers.

    @diag.gradient_rule(Scale)
    def scale_rule(layer, inputs, output_gradient):
        return {"weight": output_gradient * inputs[0]}

A layer without one is read call by call, and where its kernel cannot be seen (a custom autograd function) it is
differentiated one example at a time, which costs n backward passes. A rule is tried on a few examples before it is
used: one that disagrees with autograd is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor, nn

from diag.door import at_the_door
from diag.errors import InvalidInput, type_of

RULE = "diag_gradient_rule"  # the attribute of a layer's class that holds its rule
PARAMETER = "parameter "  # before the name of a layer's parameter, among the arguments of its recorded call
Rule = Callable[[Any, tuple[Any, ...], Tensor], Mapping[str, Tensor]]
AnyRule = TypeVar("AnyRule", bound=Rule)


class LayerRule(NamedTuple):
    """A rule and the `forward` that it was written for: a subclass with another one needs another rule."""

    function: Rule
    forward: Any


@at_the_door
def gradient_rule(layer_type: type[nn.Module]) -> Callable[[AnyRule], AnyRule]:
    """Decorate the rule for the per-example gradients of all layers of this class.

    The rule is called as `rule(layer, inputs, output_gradient)`: `inputs` are the positional arguments of the
    layer's `forward`, `output_gradient` is the gradient of the examples' summed loss at its output; tensors have
    no graph, and examples along the first axis. It returns each trainable parameter's gradients (n, *shape of the
    parameter) by the parameter's name in the layer. It is kept on the class; a later one replaces it, and a
    subclass that keeps `forward` inherits it.

    Used where the layer is called with positional arguments and returns one tensor. Raises InvalidInput where
    `layer_type` is not a class of modules, and when gradients are asked for where the rule gives something else
    than autograd does.
    """
    if not (isinstance(layer_type, type) and issubclass(layer_type, nn.Module)):
        raise InvalidInput(
            f"gradient_rule was given {type_of(layer_type)}; expected a class of layers: "
            "@diag.gradient_rule(MyLayer)."
        )

    def keep(function: AnyRule) -> AnyRule:
        if not callable(function):
            raise InvalidInput(f"The gradient rule is {type_of(function)}; expected rule(layer, inputs, gradient).")
        setattr(layer_type, RULE, LayerRule(function, layer_type.forward))
        return function

    return keep


def rule_of(layer: nn.Module) -> Rule | None:
    """The rule that was given for this layer's class, where the layer's `forward` is the one it was written for."""
    found: LayerRule | None = getattr(type(layer), RULE, None)
    if found is None or "forward" in vars(layer) or type(layer).forward is not found.forward:
        return None
    return found.function


class LayerFollower(Protocol):
    """An observer of the calls of layers with rules."""

    def layer_begins(self, args: Any, kwargs: Any) -> None:
        """A layer with a rule is about to be called."""

    def layer_ends(self, layer: nn.Module, rule: Rule, args: Any, kwargs: Any, output: Any) -> None:
        """It has returned `output`, or raised."""


def followed(model: nn.Module, recorder: LayerFollower) -> list[Any]:
    """Tell `recorder` of each call of a layer with a rule; gives the hooks to remove."""
    hooks: list[Any] = []
    for layer in model.modules():
        if (rule := rule_of(layer)) is None:
            continue
        before, after = partial(_before, recorder), partial(_after, recorder, rule)
        hooks.append(layer.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
        hooks.append(layer.register_forward_hook(after, with_kwargs=True, always_call=True))
    return hooks


def _before(recorder: LayerFollower, layer: nn.Module, args: Any, kwargs: Any) -> None:
    recorder.layer_begins(args, kwargs)


def _after(recorder: LayerFollower, rule: Rule, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    recorder.layer_ends(layer, rule, args, kwargs, output)
