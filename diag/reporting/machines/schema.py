"""The published JSON schema of every document that `--json` prints."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any


def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12), version 1; docs/diag.schema.json is the same file."""
    return json.loads(resources.files(__package__).joinpath("schema.json").read_text(encoding="utf-8"))
