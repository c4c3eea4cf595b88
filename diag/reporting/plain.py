"""Numbers, texts and series as strict JSON: what the report's document is made of."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from diag.display import format_number

DIGITS = 4


def clean(text: Any) -> str:
    """A text that every page and JSON file can hold: no lone surrogates and no control characters."""
    readable = str(text).encode("utf-8", "replace").decode()
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ufffe\uffff]", "\N{REPLACEMENT CHARACTER}", readable)


def finite(value: Any) -> float | int | None:
    """`value`, or None where JSON has no such number (NaN, infinities) or it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return int(value) if isinstance(value, bool) else None
    return value if math.isfinite(value) else None


def number(value: Any, unit: str = "") -> dict[str, Any]:
    """A number with its unit, and as people read it; a share is read as a percentage."""
    if unit == "share" and isinstance(value, (int, float)) and not isinstance(value, bool):
        as_text = {"text": format_number(100.0 * value), "unit": "%" if math.isfinite(value) else ""}
    else:
        as_text = {"text": format_number(value), "unit": unit}
    return {"number": finite(value), **as_text}


def rounded(values: Any, digits: int = DIGITS) -> list[float | None]:
    """A series with `digits` significant digits; None for what is not finite."""
    return [float(f"{v:.{digits}g}") if math.isfinite(v) else None for v in values]


def as_text(value: Any) -> str:
    """Any plain value as a short text: settings, metadata."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return str(value) if abs(value) >= 10**15 else format_number(value)
    if isinstance(value, float):
        return format_number(value, 6)
    if isinstance(value, Mapping):
        return ", ".join(f"{clean(k)}: {as_text(v)}" for k, v in value.items()) or "–"
    if isinstance(value, (list, tuple)):
        listed = ", ".join(as_text(v) for v in value[:20])
        return listed + (f", ... ({len(value)} in all)" if len(value) > 20 else "") or "–"
    return clean(value)


def count_in_words(count: int, singular: str, plural: str = "") -> str:
    """ "one alarm", "3 alarms": a count in words as people write it."""
    words = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
    return f"{words.get(count, f'{count:,}')} {singular if count == 1 else plural or singular + 's'}"


def listed(parts: list[str]) -> str:
    """Parts in a row, as people write them.

    >>> listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])
    ('a', 'a and b', 'a, b and c')
    """
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))
