"""The source of `diag` as syntax trees, for the tests that read it.

A tree is made when it is first asked for and let go after the test file that asked (see `conftest`): all of them
are a million objects, and every test that comes later would search these whenever it looks for an optimizer.
"""

import ast
import functools
from pathlib import Path


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())
