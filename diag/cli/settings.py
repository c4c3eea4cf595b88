"""`--set instrument.setting=value`: the text becomes a value of the setting's own type."""

from __future__ import annotations

import ast
import types
import typing
from collections.abc import Iterable
from typing import Any

from diag.errors import InvalidInput
from diag.registry import Setting, find

BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def read_settings(texts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The settings by instrument.

    Raises InvalidInput, with what would be right, where a text has another form, names an instrument or setting
    that does not exist, or has a value of another type.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        left, equals, value = text.partition("=")
        name, dot, setting_name = left.strip().partition(".")
        if not (equals and dot):
            raise InvalidInput(f"--set {text} has another form; expected instrument.setting=value.")
        setting = _setting(name, setting_name)
        try:
            found.setdefault(name, {})[setting_name] = convert(value.strip(), setting.type, setting.default)
        except (ValueError, SyntaxError):
            raise InvalidInput(
                f"{left.strip()} takes {describe(setting.type, setting.default)} (its default is "
                f"{setting.default!r}) and not {value.strip()!r}."
            ) from None
    return found


def _setting(instrument: str, name: str) -> Setting:
    known = {s.name: s for s in find(instrument).settings}
    if name not in known:
        raise InvalidInput(f"{instrument} has no setting {name!r}; it has {', '.join(known) or 'none'}.")
    return known[name]


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
