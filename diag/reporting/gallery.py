"""The index of a folder of reports: what each shows at a glance, and for a reproduced paper its claim, what was
expected, what was measured and whether it held.

python -m diag.reporting.gallery reports
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diag.errors import InvalidInput
from diag.reporting.files import write
from diag.reporting.page import render
from diag.result import Level

CARD_NUMBERS = "measured.json"  # beside the reports of a reproduced paper: the claim and the numbers
HOLDS = "yes"


def gallery(folder: str | Path = "reports") -> Path:
    """Write `folder`/index.html from the documents that lie beside the reports there; its path.

    Reports in a folder with a measured.json are arms of one card. What found most stands first.
    Raises InvalidInput where the folder holds no report.
    """
    folder = Path(folder)
    reports = list(_reports(folder))
    if not reports:
        raise InvalidInput(f"{folder} holds no report; make one with diag report RUN -o {folder}/NAME.html.")
    entries = sorted(_entries(folder, reports), key=lambda entry: entry["order"])
    for number, entry in enumerate(entries):
        entry["picture"] = with_own_ids(entry["picture"], f"entry-{number}-")
    made = {"format": "diag-gallery", "title": "Reports", "entries": entries}
    write(folder / "index.html", render(made))
    return folder / "index.html"


def _reports(folder: Path) -> Iterable[tuple[Path, dict[str, Any]]]:
    for page in sorted(folder.rglob("*.html")):
        made = _json(page.with_suffix(".json"))
        if isinstance(made, dict) and made.get("format") in ("diag-report", "diag-comparison"):
            yield page, made


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _entries(folder: Path, reports: Sequence[tuple[Path, dict[str, Any]]]) -> Iterable[dict[str, Any]]:
    arms: dict[Path, list[tuple[Path, dict[str, Any]]]] = {}
    for page, made in reports:
        if (page.parent / CARD_NUMBERS).is_file():
            arms.setdefault(page.parent, []).append((page, made))
        else:
            yield _single(folder, page, made)
    for place, found in arms.items():
        measured = _json(place / CARD_NUMBERS)
        yield _card(folder, place, measured if isinstance(measured, dict) else {}, found)


def _single(folder: Path, page: Path, made: Mapping[str, Any]) -> dict[str, Any]:
    comparison = made["format"] == "diag-comparison"
    return {
        "kind": "comparison" if comparison else "report",
        "order": (_severity(made), 0, str(page)),
        "href": page.relative_to(folder).as_posix(),
        "title": made["title"],
        "verdict": made["verdict"],
        "counts": {} if comparison else made["counts"],
        "command": made["command"],
        "picture": picture(made),
    }


def _card(
    folder: Path, place: Path, measured: Mapping[str, Any], found: Sequence[tuple[Path, dict[str, Any]]]
) -> dict[str, Any]:
    worst = min(range(len(found)), key=lambda i: (_severity(found[i][1]), not found[i][1].get("drawings"), i))
    rows = [row for row in measured.get("expectations", ()) if isinstance(row, dict)]
    return {
        "kind": "paper",
        "order": (_severity(found[worst][1]), 1, str(place)),
        "href": found[worst][0].relative_to(folder).as_posix(),
        "title": str(measured.get("title") or place.name),
        "claim": str(measured.get("claim") or ""),
        "source": str(measured.get("source") or ""),
        "rows": rows,
        "held": sum(row.get("holds") == HOLDS for row in rows),
        "arms": [{"href": p.relative_to(folder).as_posix(), "name": p.stem} for p, _ in found],
        "command": f"scripts/reproduce {measured.get('name') or place.name}",
        "picture": picture(found[worst][1]),
    }


def _severity(made: Mapping[str, Any]) -> int:
    severities = {str(level): level.severity for level in Level}
    return severities.get(made["verdict"].get("level", ""), len(Level))


def picture(made: Mapping[str, Any]) -> str:
    """The first drawing of what the report says first; empty where it has none."""
    drawings = made.get("drawings") or {}
    first = made["verdict"].get("audit", "")
    audits = sorted(made.get("audits", ()), key=lambda audit: audit["id"] != first)
    names = [chart.get("key", "") for audit in audits for chart in audit.get("charts") or ()]
    chosen = [drawings[name] for name in (*names, *drawings) if str(drawings.get(name, "")).startswith("<svg")]
    return chosen[0] if chosen else ""


def with_own_ids(svg: str, prefix: str) -> str:
    """The drawing with ids that no other drawing on the page has."""
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", svg)


if __name__ == "__main__":
    try:
        print(gallery(*sys.argv[1:2]))
    except InvalidInput as error:
        sys.exit(str(error))
