"""Values of settings: a text from the command line or an object from Python becomes a value of the annotated
type."""

from __future__ import annotations

import ast
import types
import typing
from collections import abc
from collections.abc import Iterable
from typing import Any

from diag.errors import InvalidInput, type_of
from diag.ranges import Within

BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
SAID = (bool, int, float, str, tuple, type(None))  # defaults that are clear to read
COLLECTIONS: dict[Any, str] = {
    abc.Callable: "a function",
    abc.Mapping: "a dict",
    abc.Sequence: "a list",
    abc.Iterable: "a list",
}


def converted(value: Any, type_: Any, default: Any, name: str) -> Any:
    """`value`, given in Python for the setting `name`, as a value of the annotation `type_`.

    Text is read as on the command line, 3.0 is the whole number 3, and NumPy and torch numbers are numbers.
    Raises InvalidInput, in one sentence, for anything else, and for a number outside its range (see `diag.ranges`).
    """
    try:
        return _as_type(value, type_, default)
    except (ValueError, SyntaxError, TypeError, OverflowError):
        said = f" (its default is {default!r})" if isinstance(default, SAID) else ""
        raise InvalidInput(f"{name} takes {describe(type_, default)}{said} and not {_as_text(value)}.") from None


def is_of_diag(type_: Any) -> bool:
    """Whether an annotation is a class of this package, whose objects are made by it alone."""
    return (
        isinstance(type_, type)
        and type_.__module__.startswith("diag.")
        and not getattr(type_, "_is_protocol", False)
    )


def is_a(value: Any, type_: Any) -> bool:
    """Whether an object is of its annotated kind, as far as that can be told without looking into it."""
    origin, arguments = typing.get_origin(type_), typing.get_args(type_)
    if origin in (typing.Union, types.UnionType):
        return any(is_a(value, kind) for kind in arguments)
    if type_ is type(None):
        return value is None
    if origin is tuple and Ellipsis not in arguments:
        return isinstance(value, (tuple, list)) and len(value) == len(arguments)
    if origin in COLLECTIONS:
        items = value if isinstance(value, abc.Sequence) else ()
        return isinstance(value, origin) and all(is_a(item, arguments[0]) for item in items)
    return not is_of_diag(type_) or isinstance(value, type_)


def _as_text(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:
        text = type_of(value)
    return text if len(text) <= 60 else type_of(value)


def _as_type(value: Any, type_: Any, default: Any) -> Any:
    if type_ is Any and default is not None:
        type_ = type(default)
    origin, arguments = typing.get_origin(type_), typing.get_args(type_)
    if isinstance(value, str) and origin in COLLECTIONS:
        return _refuse(value)  # its letters are no list
    if isinstance(value, str) and str not in (type_, *arguments) and type_ is not Any:
        return convert(value, type_, default)
    if origin is typing.Annotated:
        return _in_range(_as_type(value, arguments[0], default), arguments[1:])
    if origin in (typing.Union, types.UnionType):
        return _first(value, arguments)
    if origin is typing.Literal:
        return value if value in arguments else _refuse(str(value))
    if origin in (tuple, list):
        inner = next((a for a in arguments if a is not Ellipsis), Any)
        return origin(_as_type(v, inner, None) for v in value)
    if type_ is type(None):
        return None if value is None else _refuse(str(value))
    if origin in COLLECTIONS:
        return value if isinstance(value, origin) else _refuse(str(value))
    if is_of_diag(type_):
        return value if isinstance(value, type_) else _refuse(type_of(value))
    if type_ in (bool, int, float):
        return _number(value, type_)
    if type_ is str and not isinstance(value, str):
        return _refuse(str(value))
    return value


def _in_range(value: Any, about: Iterable[Any]) -> Any:
    """The value; refuses a number outside a range that is among what is said about it."""
    return value if all(r.holds(value) for r in about if isinstance(r, Within)) else _refuse(str(value))


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
    if origin is typing.Annotated:
        return _in_range(convert(text, arguments[0], default), arguments[1:])
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


def without_range(type_: Any) -> Any:
    """The annotation without what is said about it: Share is float."""
    origin, arguments = typing.get_origin(type_), typing.get_args(type_)
    if origin is typing.Annotated:
        return arguments[0]
    if origin in (typing.Union, types.UnionType):
        return typing.Union[tuple(map(without_range, arguments))]  # noqa: UP007
    return type_


def describe(type_: Any, default: Any = None) -> str:
    """The annotation in words: "a number from 0 to 1", "one of weights, none"."""
    origin, arguments = typing.get_origin(type_), typing.get_args(type_)
    if origin is typing.Annotated:
        return " ".join(
            [describe(arguments[0], default), *(str(r) for r in arguments[1:] if isinstance(r, Within))]
        )
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(a) for a in arguments)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple and Ellipsis not in arguments:
        return f"a tuple of {len(arguments)}"
    if origin in (tuple, list):
        return "values with commas between them"
    if type_ is Any and default is not None:
        return describe(type(default))
    if origin in COLLECTIONS:
        return COLLECTIONS[origin]
    if is_of_diag(type_):
        return f"{'an' if type_.__name__[0] in 'AEIO' else 'a'} {type_.__name__}"
    words = {int: "a whole number", float: "a number", bool: "yes or no", str: "a text", type(None): "none"}
    return words.get(type_, "a Python literal")
