"""A comparison for programs: the page's document without its curves and its words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COMPARE_FORMAT, COMPARE_VERSION = "diag-compare", 1


def compared_document(made: Mapping[str, Any], output: str | None = None) -> dict[str, Any]:
    """The document of `diag compare --json` from the page's (`diag.reporting.comparison.compare.comparison`)."""
    return {
        "format": COMPARE_FORMAT,
        "format_version": COMPARE_VERSION,
        "title": made["title"],
        "output": output,
        "runs": [
            {
                "key": side["name"],
                "name": side["title"],
                "level": side["verdict"]["level"],
                "headline": side["verdict"]["headline"],
                "sentence": side["verdict"]["sentence"],
                "last_step": side["last_step"],
            }
            for side in made["sides"]
        ],
        "headline": made["verdict"]["headline"],
        "healthy": list(made["healthy"]),
        "checks": [
            {
                "instrument": check["instrument"],
                "name": check["name"],
                "levels": [cell and cell["level"] for cell in check["cells"]],
                "sentences": [cell and cell["sentence"] for cell in check["cells"]],
                "change": check["change"],
            }
            for check in made["checks"]
        ],
        "scalars": [_scalar(row) for row in made["scalars"]],
    }


def _scalar(row: Mapping[str, Any]) -> dict[str, Any]:
    band = row["band"]
    return {
        "check": row["check"],
        "name": row["name"],
        "unit": row["unit"],
        "values": [_number(v) for v in row["values"]],
        "errors": [_number(v) for v in row["errors"]],
        "difference": _number(row["difference"]),
        "difference_error": _number(row["difference_error"]),
        "ratio": row["ratio"],
        "band": band and {"low": _number(band["low"]), "high": _number(band["high"]), "runs": band["runs"]},
        "outside": list(row["outside"]),
    }


def _number(value: Mapping[str, Any] | None) -> Any:
    return None if value is None else value["number"]
