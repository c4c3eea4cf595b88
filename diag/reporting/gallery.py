"""The index of a folder of reports: each report's title, verdict and counts, and the command that makes it.

python -m diag.reporting.gallery reports
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diag.errors import InvalidInput
from diag.reporting.files import write
from diag.reporting.page import render


def gallery(folder: str | Path = "reports") -> Path:
    """Write `folder`/index.html from the documents that lie beside the reports there; its path.

    Raises InvalidInput where the folder holds no report.
    """
    folder = Path(folder)
    entries = list(_entries(folder))
    if not entries:
        raise InvalidInput(f"{folder} holds no report; make one with diag report RUN -o {folder}/NAME.html.")
    made = {"format": "diag-gallery", "title": "Reports", "entries": entries}
    write(folder / "index.html", render(made))
    return folder / "index.html"


def _entries(folder: Path) -> Iterable[dict[str, Any]]:
    for page in sorted(folder.rglob("*.html")):
        made = _document(page.with_suffix(".json"))
        if made is None:
            continue
        comparison = made["format"] == "diag-comparison"
        yield {
            "href": page.relative_to(folder).as_posix(),
            "title": made["title"],
            "kind": "comparison" if comparison else "report",
            "verdict": made["verdict"],
            "counts": {} if comparison else made["counts"],
            "facts": [] if comparison else made["facts"],
            "command": made["command"],
        }


def _document(file: Path) -> dict[str, Any] | None:
    try:
        made = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = isinstance(made, dict) and made.get("format") in ("diag-report", "diag-comparison")
    return made if known else None


if __name__ == "__main__":
    try:
        print(gallery(*sys.argv[1:2]))
    except InvalidInput as error:
        sys.exit(str(error))
