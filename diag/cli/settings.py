"""`--set instrument.setting=value`: the text becomes a value of the setting's own type."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from diag.conversion import convert, describe
from diag.declaration import Setting
from diag.errors import InvalidInput
from diag.registry import find


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
