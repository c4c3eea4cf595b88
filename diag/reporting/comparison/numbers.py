"""Every number of the runs beside each other: differences with their standard error, the band of healthy runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from diag.reporting.evidence import Evidence
from diag.reporting.plain import clean, finite, number
from diag.result import Result

FEW_FOR_COLUMNS = 6  # with more runs a row has the range, and not a column a run
FEWEST_HEALTHY = 2
MANY_ROWS = 600


def compared_numbers(
    sides: Sequence[Evidence], keys: Sequence[str], healthy: Sequence[Evidence] = ()
) -> list[dict[str, Any]]:
    """Every scalar of the last results: a value a run, last - first with its error, and their ratio.

    An error is given where both results have a standard error; it is that of independent measurements, so on the
    same examples it is, as a rule, too large.
    """
    found = [dict(_last(side)) for side in sides]
    accepted = [dict(_last(side)) for side in healthy]
    rows = []
    for name in dict.fromkeys(n for side in found for n in side):
        title, about = next(side[name] for side in found if name in side)
        values = [dict(side[name][1].scalars()) if name in side else {} for side in found]
        bands = [dict(side[name][1].scalars()) for side in accepted if name in side]
        units = {f.name: f.metadata["unit"] for f in about.measured_fields()}
        for scalar in dict.fromkeys(s for v in values for s in v):
            if not scalar.endswith("_standard_error"):
                rows.append(_row(title, scalar, units.get(scalar.split("/")[0], ""), values, keys, bands))
    return sorted(rows, key=lambda row: row["is_clear"] is not True)[:MANY_ROWS]  # clear differences first


def _last(side: Evidence) -> Iterable[tuple[str, tuple[str, Result]]]:
    for finding in side.findings:
        yield finding.instrument, (finding.title, finding.series[-1][1])


def _row(
    title: str,
    scalar: str,
    unit: str,
    values: Sequence[Mapping[str, float]],
    keys: Sequence[str],
    bands: Sequence[Mapping[str, float]],
) -> dict[str, Any]:
    each_value = [v.get(scalar) for v in values]
    errors = [v.get(f"{scalar}_standard_error") for v in values]
    first, last = each_value[0], each_value[-1]
    both = first is not None and last is not None
    difference = float(last) - float(first) if first is not None and last is not None else math.nan
    error = math.hypot(*(float(e) for e in (errors[0], errors[-1]) if e is not None))
    known = both and errors[0] is not None and errors[-1] is not None
    band = _band(scalar, unit, bands)
    return {
        "check": clean(title),
        "name": clean(scalar.replace("_", " ").replace("/", ", ")),
        "unit": unit,
        "values": [None if v is None else number(v, unit) for v in each_value],
        "errors": [None if e is None else number(e, unit) for e in errors],
        "differs": len({repr(v) for v in each_value}) > 1,
        "difference": number(difference, unit) if both else None,
        "difference_error": number(error, unit) if known else None,
        "is_clear": bool(abs(difference) > 2 * error) if known else None,
        "ratio": finite(difference / float(first) + 1) if both and first else None,
        "spread": _spread(each_value, keys, unit),
        "band": band,
        "outside": [k for k, v in zip(keys, each_value, strict=True) if band is not None and _is_outside(v, band)],
    }


def _band(scalar: str, unit: str, bands: Sequence[Mapping[str, float]]) -> dict[str, Any] | None:
    """The range of the healthy runs, with how often a further healthy run leaves it by chance."""
    usable = [float(b[scalar]) for b in bands if scalar in b and math.isfinite(float(b[scalar]))]
    if len(usable) < FEWEST_HEALTHY:
        return None
    # Of n + 1 exchangeable runs the new one is the least or the greatest with probability 2 / (n + 1).
    chance = 2 / (len(usable) + 1)
    return {
        "low": number(min(usable), unit),
        "high": number(max(usable), unit),
        "runs": len(usable),
        "chance": number(chance, "share"),
    }


def _is_outside(value: float | None, band: Mapping[str, Any]) -> bool:
    return value is not None and not band["low"]["number"] <= float(value) <= band["high"]["number"]


def _spread(values: Sequence[float | None], keys: Sequence[str], unit: str) -> dict[str, Any] | None:
    """The least, the middle and the greatest of many runs, and whose they are."""
    usable = [(float(v), k) for v, k in zip(values, keys, strict=True) if v is not None and math.isfinite(float(v))]
    if len(values) <= FEW_FOR_COLUMNS or not usable:
        return None
    (low, low_key), (high, high_key) = min(usable), max(usable)
    middle = statistics.median(value for value, _ in usable)
    return {
        "low": number(low, unit),
        "low_of": low_key,
        "middle": number(middle, unit),
        "high": number(high, unit),
        "high_of": high_key,
    }
