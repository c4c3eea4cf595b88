"""The user's build function: found by its name, called, and its result as the arguments of a `Snapshot`.

`build` is a function, or names one as `module:function` or `file.py:function`. It returns `(model, loss_fn, data)`,
a dict of a Snapshot's arguments, or a Snapshot. What it raises becomes one sentence that says where.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from diag.errors import DiagError, InvalidInput, first_line, named, type_of
from diag.snapshot.snapshot import Snapshot

FORM = "expected module:function or file.py:function"
RETURNS = "expected (model, loss_fn, data), a dict of diag.Snapshot's arguments, or a diag.Snapshot"
Build = str | Callable[[], Any]


def built_arguments(build: Build) -> dict[str, Any]:
    """What the build function returns, as the arguments of a Snapshot; `model` is always among them.

    Raises InvalidInput where there is no such function, it raises, or it returns something else.
    """
    name = build_name(build)
    built = called_safely(load_build(build) if isinstance(build, str) else build, f"The build function {name}")
    if isinstance(built, Snapshot):
        return built.arguments | {"history": None, "carry": None}  # of its run, which the checkpoints are not
    if isinstance(built, (tuple, list)) and len(built) == 3:
        built = dict(zip(("model", "loss_fn", "data"), built, strict=True))
    if not isinstance(built, Mapping) or not isinstance(built.get("model"), nn.Module):
        made = built.get("model") if isinstance(built, Mapping) else built
        where = " as its model" if isinstance(built, Mapping) else ""
        raise InvalidInput(f"The build function {name} returned {type(made).__name__}{where}; {RETURNS}.")
    known = inspect.signature(Snapshot).parameters
    unknown = [str(n) for n in built if n not in known]
    if unknown:
        raise InvalidInput(
            f"The build function {name} returned {unknown[0]!r}; expected one of {', '.join(known)}."
        )
    return dict(built)


def refuse_without_build(caller: str, arguments: Sequence[str]) -> None:
    """Raise InvalidInput where there is no build function, and arguments were given that need one."""
    if arguments:
        raise InvalidInput(
            f"{caller} takes {named(arguments, 2)} for checkpoints only; give build=, or leave it out."
        )


def build_name(build: Build) -> str:
    """The build function as its user wrote it, or as module:function."""
    if isinstance(build, str):
        return build
    if not callable(build):
        raise InvalidInput(f"build is {type_of(build)}; expected a function, or its name: {FORM[9:]}.")
    module, name = (getattr(build, attribute, "") for attribute in ("__module__", "__qualname__"))
    return f"{module}:{name}" if module and name else repr(build)


def load_build(target: str) -> Callable[[], Any]:
    """The function that `target` names.

    Raises InvalidInput where the module or the function is not there or importing the module fails.
    """
    place, colon, name = target.rpartition(":")
    if not (colon and place and name):
        raise InvalidInput(f"The build {target} names no function; {FORM}.")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    function: Callable[[], Any] | None = getattr(module, name, None)
    if not callable(function):
        known = [
            n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__
        ]
        raise InvalidInput(f"{place} has no function {name!r}; it has {', '.join(known) or 'none'}.")
    return function


def _import_file(file: Path) -> Any:
    if not file.is_file():
        raise InvalidInput(f"There is no file {file}; {FORM}.")
    name = file.stem if file.stem not in sys.modules else f"build_{file.stem}"  # so that no other module is hidden
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles of its classes look there
    _with_path(file.parent)
    called_safely(lambda: spec.loader.exec_module(module), f"Importing {file}")  # type: ignore[union-attr]
    return module


def _import_module(name: str) -> Any:
    _with_path(Path.cwd())
    try:
        missing = importlib.util.find_spec(name) is None
    except (ImportError, ValueError):
        missing = True
    if missing:
        raise InvalidInput(f"There is no module {name!r} here; {FORM}, seen from the current folder.")
    return called_safely(lambda: importlib.import_module(name), f"Importing {name}")


def _with_path(folder: Path) -> None:
    if str(folder.resolve()) not in sys.path:
        sys.path.insert(0, str(folder.resolve()))


def called_safely(call: Callable[[], Any], what: str) -> Any:
    """Call the user's code; what it raises becomes an InvalidInput of one sentence that says where."""
    try:
        return call()
    except DiagError:
        raise
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
        at = f" at {os.path.relpath(frames[-1].filename)}, line {frames[-1].lineno}" if len(frames) > 1 else ""
        raise InvalidInput(f"{what} raised {type(error).__name__}{at}: {first_line(error)}.") from error
