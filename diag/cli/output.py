"""What the commands share: paths as arguments, and `--json`: one document of the published schema, and nothing
else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

PATHS = click.Path(path_type=Path)
JSON = click.option("--json", "as_json", is_flag=True, help="For programs: one JSON document of the schema.")


def print_document(document: Mapping[str, Any]) -> None:
    """Print a document as strict JSON, in ASCII, so that nothing in it steers a terminal."""
    click.echo(json.dumps(document, indent=1, allow_nan=False))
