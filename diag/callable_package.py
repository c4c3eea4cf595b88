"""Let a package be called like the function that it is named after.

`diag.watch` is a package and `diag.watch(model)` a call. Importing `diag.watch` binds the package to that name,
so a function of the same name would be there or not depending on what was imported before. A package that can
be called is the same object in every order of imports.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def make_callable(package: str, function: Callable[..., Any]) -> None:
    """Calling the imported package `package` calls `function`, with its signature and docstring."""
    module = sys.modules[package]
    module.__class__ = type("CallablePackage", (ModuleType,), {"__call__": staticmethod(function)})
    module.__doc__ = function.__doc__
    module.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
