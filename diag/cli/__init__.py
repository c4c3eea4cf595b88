"""The command `diag`: demo, report, compare, check, show, list.

`main` is the door: a user's mistake becomes one sentence on stderr and exit status 2. The commands import what
they need when they run, so that `diag --help` does not wait for torch.
"""

from __future__ import annotations

from diag.cli.commands import main

__all__ = ["main"]
