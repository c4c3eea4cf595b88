"""Text for the terminal: what a file holds may be shown, and must not control the terminal.

A run or a checkpoint of somebody else can hold escape sequences in its names and sentences, which would clear the
screen, change its title, hide text or turn its direction. They are shown as what they are: `\\x1b[2J`.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import click

# Control characters but for tab and line feed, marks that turn the direction of the text, and halves of characters.
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with every character that steers a terminal written out."""
    return STEERING.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


def echo(text: str, err: bool = False) -> None:
    """Print a line."""
    click.echo(visible(text), err=err)


def command_line() -> str:
    """The command as it was called, to be shown in a page; "" where diag was called from Python."""
    return shlex.join(["diag", *sys.argv[1:]]) if Path(sys.argv[0]).name in ("diag", "__main__.py") else ""
