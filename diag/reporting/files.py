"""The report as an object: its document, its page, and where they were written."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from diag.errors import InvalidInput, as_path
from diag.reporting.page import render, render_notebook

PARTIAL_ENDING = ".partial"
FORGOTTEN = 3600.0  # seconds
FORMATS = ("diag-report", "diag-comparison")


@dataclass(frozen=True)
class Page:
    """A report. It shows itself in a notebook; `html` is the page, `document` what it renders.

    path: where the page was written, None where it was not; the document lies beside it as JSON.
    """

    document: Mapping[str, Any]
    path: Path | None = None

    @cached_property
    def html(self) -> str:
        """The whole page."""
        return render(self.document)

    def save(self, output: str | os.PathLike[str]) -> Page:
        """Write the page to `output` and the document beside it; into a folder, as report.html.

        Raises InvalidInput where the name does not end in .html or nothing can be written there.
        """
        path = as_path(output)
        path = path / "report.html" if path.is_dir() else path
        if path.suffix.lower() not in (".html", ".htm"):
            raise InvalidInput(f"The report's output is {str(path)!r}; expected a name that ends in .html.")
        beside = path.with_suffix(".json")
        if beside.exists() and not _is_document(beside):
            raise InvalidInput(
                f"The report's data would be written over {beside}, which was not written with a report; "
                f"give another output."
            )
        data = json.dumps(self.document, allow_nan=False, indent=1) + "\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_together({path: self.html, beside: data})
        except OSError as error:
            raise InvalidInput(
                f"The report cannot be written to {path} ({error.strerror}); give another output."
            ) from None
        return Page(self.document, path)

    def __fspath__(self) -> str:
        if self.path is None:
            raise InvalidInput("This report was not written to a file; give output=, or call .save(path).")
        return str(self.path)

    def __repr__(self) -> str:
        verdict = self.document.get("verdict", {})
        where = f" at {self.path}" if self.path else ""
        return f"<report{where}: {verdict.get('headline', self.document.get('title', ''))}>"

    def _repr_html_(self) -> str:
        return render_notebook(self.document, str(self.path or ""))


def write(path: Path, text: str) -> None:
    """Write a file at once, so that no reader sees half of it."""
    write_together({path: text})


def write_together(texts: Mapping[Path, str]) -> None:
    """Write files that belong together, the most important first, so that no kill leaves parts of two reports.

    All are written to partial files before the first is moved to its place. Old files that would not fit the new
    first one are removed before that: at any moment the first is whole, and each of the others fits it or is
    absent.
    """
    partial = {path: path.with_name(f".{path.name}.{os.getpid()}{PARTIAL_ENDING}") for path in texts}
    _remove_left_over(texts)
    try:
        for path, text in texts.items():
            partial[path].write_text(text, encoding="utf-8", newline="\n")
        for path in list(texts)[1:]:
            path.unlink(missing_ok=True)
        for path in texts:
            partial[path].replace(path)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


def _remove_left_over(paths: Iterable[Path]) -> None:
    """Remove partial files of killed writers; one of the last hour may be a living writer's."""
    for path in paths:
        for left in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL_ENDING}"):
            with contextlib.suppress(OSError):
                if left.stat().st_mtime < time.time() - FORGOTTEN:
                    left.unlink()


def _is_document(path: Path) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("format") in FORMATS
    except (OSError, ValueError, AttributeError):
        return False
