"""The command group: turns diag's errors into one sentence and status 2, and finds the commands of other
modules."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from typing import Any

import click

from diag.cli.ranks import leave
from diag.cli.text import visible

# Modules that bring commands of their own, in a list named COMMANDS, where they are installed.
OTHER_PARTS = tuple(f"diag.cli.{part}" for part in ("check", "compare", "connect", "imports", "live", "preflight"))


class Mistake(click.ClickException):
    """A user's mistake: one sentence, exit status 2."""

    exit_code = 2

    def format_message(self) -> str:
        """The sentence, with what to do at its end."""
        return visible(self.message)


class Door(click.Group):
    """A group whose commands may raise DiagError."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command that the arguments name; one of several ranks ends here."""
        try:
            return super().main(*args, **options)
        except SystemExit as end:
            leave(end.code if isinstance(end.code, int) else int(end.code is not None))
            raise

    def invoke(self, context: click.Context) -> Any:
        """Run the command; errors of diag's own become one sentence."""
        with contextlib.suppress(AttributeError):  # a terminal that lacks a character shows a question mark
            sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
        try:
            return super().invoke(context)
        except Exception as error:
            # By name, so that asking for help does not import the rest of diag.
            errors = sys.modules.get("diag.errors")
            if errors is not None and isinstance(error, errors.DiagError):
                raise Mistake(str(error)) from None
            raise

    def list_commands(self, context: click.Context) -> list[str]:
        """The names of all commands."""
        return [*super().list_commands(context), *_others()]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """The command of this name, or None."""
        return super().get_command(context, name) or _others().get(name)


def _others() -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for module in OTHER_PARTS:
        if importlib.util.find_spec(module) is not None:
            found |= {str(c.name): c for c in getattr(importlib.import_module(module), "COMMANDS", ())}
    return found
