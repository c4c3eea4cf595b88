"""Values of settings: a text from the command line or an object from Python becomes a value of the annotated
type."""

from __future__ import annotations

import ast
import types
import typing
from collections.abc import Iterable
from typing import Any

from diag.errors import InvalidInput, type_of

BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def converted(value: Any, type_: Any, default: Any, name: str) -> Any:
    """`value`, given in Python for the setting `name`, as a value of the annotation `type_`.

    Text is read as on the command line, 3.0 is the whole number 3, and NumPy and torch numbers are numbers.
    Raises InvalidInput, in one sentence, for anything else.
    """
    try:
        return _as_type(value, type_, default)
    except (ValueError, SyntaxError, TypeError, OverflowError):
        raise InvalidInput(
            f"{name} takes {describe(type_, default)} (its default is {default!r}) and not {_shown(value)}."
        ) from None


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:
        text = type_of(value)
    return text if len(text) <= 60 else type_of(value)


def _as_type(value: Any, type_: Any, default: Any) -> Any:
    if type_ is Any and default is not None:
        type_ = type(default)
    origin, arguments = typing.get_origin(type_), typing.get_args(type_)
    if isinstance(value, str) and str not in (type_, *arguments) and type_ is not Any:
        return convert(value, type_, default)
    if origin in (typing.Union, types.UnionType):
        return _first(value, arguments)
    if origin is typing.Literal:
        return value if value in arguments else _refuse(str(value))
    if origin in (tuple, list):
        inner = next((a for a in arguments if a is not Ellipsis), Any)
        return origin(_as_type(v, inner, None) for v in value)
    if type_ is type(None):
        return None if value is None else _refuse(str(value))
    if type_ in (bool, int, float):
        return _number(value, type_)
    if type_ is str and not isinstance(value, str):
        return _refuse(str(value))
    return value


def _first(value: Any, types_: Iterable[Any]) -> Any:
    kinds = sorted(types_, key=lambda t: type(value) is not t)  # its own type before one that it can be made into
    for kind in kinds:
        try:
            return _as_type(value, kind, None)
        except (ValueError, SyntaxError, TypeError):
            continue
    return _refuse(str(value))


def _number(value: Any, type_: type) -> Any:
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        value = value.item()
    if type_ is bool:
        return value if isinstance(value, bool) else _refuse(str(value))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return _refuse(str(value))
    if type_ is int:
        return int(value) if int(value) == value else _refuse(str(value))
    return float(value)


def convert(text: str, type_: Any, default: Any = None) -> Any:
    """`text` as a value of the annotation `type_`. Raises ValueError or SyntaxError where it is none."""
    origin, arguments = typing.get_origin(type_), typing.get_args(type_)
    if origin in (typing.Union, types.UnionType):
        return _first_that_fits(text, arguments)
    if origin is typing.Literal:
        return {str(a): a for a in arguments}[text] if text in map(str, arguments) else _refuse(text)
    if origin in (tuple, list):
        inner = next((a for a in arguments if a is not Ellipsis), Any)
        parts = [p.strip() for p in text.strip("()[] ").split(",") if p.strip()]
        return origin(convert(p, inner) for p in parts)
    if type_ is type(None):
        return None if text.lower() in ("none", "null", "") else _refuse(text)
    if type_ is bool:
        return BOOLS[text.lower()] if text.lower() in BOOLS else _refuse(text)
    if type_ in (int, float, str):
        return type_(text)
    if type_ is Any and default is not None:
        return convert(text, type(default))
    return ast.literal_eval(text)


def _first_that_fits(text: str, types_: Iterable[Any]) -> Any:
    # A string takes any text, so it is tried last.
    for type_ in sorted(types_, key=lambda t: t is str):
        try:
            return convert(text, type_)
        except (ValueError, SyntaxError):
            continue
    return _refuse(text)


def _refuse(text: str) -> Any:
    raise ValueError(text)


def describe(type_: Any, default: Any = None) -> str:
    """The annotation in words: "a number", "one of weights, none"."""
    origin, arguments = typing.get_origin(type_), typing.get_args(type_)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(a) for a in arguments)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (tuple, list):
        return "values with commas between them"
    if type_ is Any and default is not None:
        return describe(type(default))
    words = {int: "a whole number", float: "a number", bool: "yes or no", str: "a text", type(None): "none"}
    return words.get(type_, "a Python literal")
