"""Examples (>>>) in docstrings as blocks of code on the documentation site: an extension of griffe."""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"(?m)^>>> (?:.*\n?)+?(?=\n|\Z)")


class FencedExamples(griffe.Extension):
    """Puts a fence around each example before the docstring is rendered."""

    def on_object(self, *, obj: Any, **more: Any) -> None:
        if obj.docstring is not None and ">>>" in obj.docstring.value:
            obj.docstring.value = EXAMPLE.sub(lambda m: f"```pycon\n{m[0].rstrip()}\n```\n", obj.docstring.value)
