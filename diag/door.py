"""The door of the package: what a public function is called with is converted and checked before it begins.

`at_the_door` does that by the function's signature: a number has its type and its range (see `diag.ranges`), a
function can be called, a list is one; and a call that does not fit gets one sentence that says what was given and
what the function takes.
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from diag.conversion import converted, is_of_diag
from diag.errors import InvalidInput, did_you_mean, named, type_of

Called = TypeVar("Called", bound=Callable[..., Any])
Made = TypeVar("Made")
CHECKED = {int, float, bool, collections.abc.Callable, collections.abc.Mapping, collections.abc.Sequence}


class WrongCall(InvalidInput, TypeError):
    """Arguments that a function does not take, or that it cannot do without."""


def at_the_door(function: Called, *, name: str = "", hint: str = "", convert: bool = True) -> Called:
    """The function, called only on what its signature takes.

    name: what its caller calls it, where that is not its own name. hint: what else the caller may have meant.
    convert: whether values are converted and checked, too.
    """
    called = name or function.__name__

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if convert:
            args, kwargs = _checked(function, called, args, kwargs)
        try:
            return function(*args, **kwargs)
        except TypeError:
            refuse_wrong_call(function, called, args, kwargs, hint)
            raise

    return typing.cast(Called, checked)


def names_at_the_door(function: Called) -> Called:
    """The same for a function that checks its values itself."""
    return at_the_door(function, convert=False)


def class_at_the_door(*, hint: str = "", convert: bool = True) -> Callable[[type[Made]], type[Made]]:
    """Decorate a class that its users make objects of."""

    def decorated(cls: type[Made]) -> type[Made]:
        made = at_the_door(cls.__init__, name=cls.__name__, hint=hint, convert=convert)
        cls.__init__ = made  # type: ignore[method-assign]
        return cls

    return decorated


def brought_to(value: Any, type_: Any, otherwise: str) -> Any:
    """A value as one of the annotation `type_`, as settings are (see `diag.conversion`): '3' and 3.0 are 3.

    Raises InvalidInput with the sentence `otherwise` where it is none.
    """
    try:
        return converted(value, type_, None, "")
    except InvalidInput:
        raise InvalidInput(otherwise) from None


def refuse_wrong_call(
    function: Callable[..., Any], name: str, args: Sequence[Any], kwargs: Mapping[str, Any], hint: str = ""
) -> None:
    """Raise WrongCall where the function cannot be called on these."""
    signature = inspect.signature(function)
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        raise WrongCall(_complaint(signature, name, args, kwargs, hint)) from None


def _complaint(
    signature: inspect.Signature, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], hint: str
) -> str:
    taken = {n: p for n, p in signature.parameters.items() if n != "self"}
    args = args[1:] if "self" in signature.parameters else args
    placed = [n for n, p in taken.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    any_name = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    strange = None if any_name else next((n for n in kwargs if n not in taken), None)
    twice = next((n for n in placed[: len(args)] if n in kwargs), None)
    if strange is not None:
        found = f"has no argument {strange!r}" + (f"; {near}" if (near := did_you_mean(strange, taken, 1)) else "")
    elif len(args) > len(placed):
        found = f"was called on {named([type_of(a) for a in args], len(args))} by position"
    elif twice is not None:
        found = f"was given {twice} by position and by name"
    else:
        lacking = [
            n for n, p in taken.items() if p.default is p.empty and n not in kwargs and n not in placed[: len(args)]
        ]
        found = f"was called without {named([n for n in lacking if taken[n].kind is not taken[n].VAR_KEYWORD], 9)}"
    several = [f"*{n}" for n, p in taken.items() if p.kind is p.VAR_POSITIONAL]
    by_name = [f"{n}=" for n, p in taken.items() if p.kind is p.KEYWORD_ONLY]
    form = f"{name}({', '.join([*placed, *several, *by_name])})"
    return f"{name} {found}{' ' if found.endswith('?') else '; '}expected {form}{'; ' if hint else ''}{hint}."


def _checked(
    function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments, each that has a kind that is checked converted to it."""
    kinds = _kinds(function)
    changed = [
        converted(value, *kinds[place], f"{name}.{place}") if place in kinds else value
        for place, value in zip(_placed(function), args, strict=False)
    ]
    rest = {k: converted(v, *kinds[k], f"{name}.{k}") if k in kinds else v for k, v in kwargs.items()}
    return (*changed, *args[len(changed) :]), rest


@functools.cache
def _placed(function: Callable[..., Any]) -> tuple[str, ...]:
    found = inspect.signature(function).parameters.values()
    return tuple(p.name for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


@functools.cache
def _kinds(function: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """(type, default) of each argument of a kind that is checked."""
    hints = typing.get_type_hints(function, include_extras=True)
    found = inspect.signature(function).parameters
    return {n: (hints[n], p.default) for n, p in found.items() if _is_checked(hints.get(n))}


def _is_checked(type_: Any) -> bool:
    origin, inner = typing.get_origin(type_), typing.get_args(type_)
    if origin in (typing.Union, types.UnionType):
        # A function that may be left out is checked where it is called, which can say what on.
        several = [t for t in inner if t is not type(None)]
        return all(_is_checked(t) and typing.get_origin(t) is not collections.abc.Callable for t in several)
    return (
        type_ in CHECKED or is_of_diag(type_) or origin in CHECKED or origin in (typing.Annotated, typing.Literal)
    )
