"""What a check of a run fails on: the user's own levels, limits and thresholds, from pyproject.toml or a TOML file.

[tool.diag.check]            # in another file than pyproject.toml: [check]
fail-on = "warning"          # the mildest failure: "alarm" (the default) or "warning"
levels = { label_audit = "warning", class_counts = "ignore" }

[tool.diag.check.limits]     # on any number that the run recorded
"logged.accuracy" = { min = 0.9 }
loss = { max = 2.0, level = "warning" }

[tool.diag.settings.weight_decay]   # settings of checks that judge the record of the steps and nothing else
shrunk = 0.4
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diag.conversion import converted
from diag.errors import InvalidInput
from diag.registry import find

FAIL_ON = ("alarm", "warning")
IGNORE = "ignore"
POLICY_LEVELS = (*FAIL_ON, IGNORE)
PYPROJECT = "pyproject.toml"
TABLES = ("check", "settings")
CHECK_KEYS = ("fail-on", "levels", "limits")


@dataclass(frozen=True)
class Limit:
    """A bound on a recorded number: it is broken below `min`, above `max`, and by a value that is not a number."""

    name: str
    min: float = -math.inf
    max: float = math.inf
    level: str = "alarm"

    def is_kept_by(self, value: float) -> bool:
        """Whether `value` lies within the limit; NaN does not."""
        return self.min <= value <= self.max


@dataclass(frozen=True)
class Policy:
    """The user's choices; `path` is the file that they come from."""

    fail_on: str = "alarm"
    levels: Mapping[str, str] = field(default_factory=dict)
    limits: tuple[Limit, ...] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    path: Path | None = None

    def level(self, instrument: str, level: str) -> str:
        """The level that a finding counts as: the user's, where it is one of something wrong."""
        return self.levels.get(instrument, level) if level in FAIL_ON else level


def read_policy(path: Path | None = None, folder: Path | None = None) -> Policy:
    """The policy in the TOML file `path`, or in the nearest pyproject.toml at or above `folder` that has one.

    Raises InvalidInput, with what would be right, for a file that cannot be read or has what is not known.
    """
    if path is not None:
        return _policy(path, _tables(path, _read(path)))
    start = (folder or Path.cwd()).resolve()
    for file in (f / PYPROJECT for f in (start, *start.parents)):
        tables = _tables(file, _read(file)) if file.is_file() else {}
        if tables:
            return _policy(file, tables)
    return Policy()


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInput(
            f"The configuration {path} cannot be read ({error.strerror}); give another file."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} is not valid TOML ({error}); correct it there.") from None


def _tables(path: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    ours = data.get("tool", {}).get("diag", {})
    tables = ours if ours or path.name == PYPROJECT else data
    _refuse_unknown(path, "table", tables, TABLES)
    return dict(tables)


def _policy(path: Path, tables: Mapping[str, Any]) -> Policy:
    check = tables.get("check", {})
    _refuse_unknown(path, "key in [check]", check, CHECK_KEYS)
    fail_on = _one_of(path, "fail-on", check.get("fail-on", "alarm"), FAIL_ON)
    levels = {find(n).name: _one_of(path, n, v, POLICY_LEVELS) for n, v in check.get("levels", {}).items()}
    limits = tuple(_limits(path, check.get("limits", {})))
    settings = {name: dict(_settings(path, name, table)) for name, table in tables.get("settings", {}).items()}
    return Policy(fail_on, levels, limits, settings, path)


def _limits(path: Path, table: Mapping[str, Any]) -> Iterable[Limit]:
    for name, about in table.items():
        if not isinstance(about, Mapping) or not about.keys() & {"min", "max"}:
            raise InvalidInput(f"{path}: the limit on {name} is {about!r}; expected {{ min = ..., max = ... }}.")
        _refuse_unknown(path, f"key of the limit on {name}", about, ("min", "max", "level"))
        for key in about.keys() & {"min", "max"}:
            if isinstance(about[key], bool) or not isinstance(about[key], (int, float)):
                raise InvalidInput(f"{path}: {key} of the limit on {name} is {about[key]!r}; expected a number.")
        level = _one_of(path, f"the limit on {name}", about.get("level", "alarm"), FAIL_ON)
        yield Limit(name, float(about.get("min", -math.inf)), float(about.get("max", math.inf)), level)


def _settings(path: Path, name: str, table: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    instrument = find(name)
    known = {s.name: s for s in instrument.settings}
    if not instrument.from_history:
        raise InvalidInput(f"{path}: {name} measures during the training, so a check cannot change its settings.")
    for key, value in table.items():
        if key not in known:
            raise InvalidInput(f"{path}: {name} has no setting {key!r}; it has {', '.join(known) or 'none'}.")
        yield key, converted(value, known[key].type, known[key].default, f"{path}: {name}.{key}")


def _one_of(path: Path, what: str, value: Any, known: tuple[str, ...]) -> str:
    if value not in known:
        raise InvalidInput(f"{path}: {what} is {value!r}; expected {', '.join(known)}.")
    return str(value)


def _refuse_unknown(path: Path, what: str, table: Any, known: tuple[str, ...]) -> None:
    if not isinstance(table, Mapping):
        raise InvalidInput(f"{path}: expected a table with {', '.join(known)}, and found {table!r}.")
    for name in table:
        if name not in known:
            raise InvalidInput(f"{path} has an unknown {what}, {name!r}; expected one of {', '.join(known)}.")
