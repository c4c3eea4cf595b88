"""The files of a run: their names, the format's version, and run.json.

    run.json        what the run is (metadata), the format's version, the columns of a row of steps.bin, checksums,
                    and the run's seal, a number from which the checksums of its other files start
    steps.bin       one fixed-width little-endian row an optimizer step, with a checksum (`rows`)
    records.jsonl   one line a result, skip, failure, event or cost, numbered and with a checksum (`records`)
    arrays/         the results' larger arrays, named by a hash of their content (`arrays`)
    writer.lock     held (flock) by the process that writes (`folder`)
    previous-run/   the run that was in this folder before, if any

Damage is detected: a reader leaves out what does not fit its checksum and says so. The two files that grow are made
before run.json is, so that one that is missing beside it has been lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diag.encoding import decode, encode, plain_data
from diag.errors import InvalidInput, RunError
from diag.run.rows import check_columns

RUN_FOLDER_FORMAT = "diag-run"
RUN_FOLDER_VERSION = 3
META, STEPS_FILE, RECORDS_FILE, ARRAYS = "run.json", "steps.bin", "records.jsonl", "arrays"
LOCK, PREVIOUS = "writer.lock", "previous-run"
DAMAGED = "damaged"  # the kind of event that reports what does not fit its checksum

LARGEST_NUMBER = 1 << 62  # of a step, a count or a size
STRUCTURE = ("format", "format_version", "seal", "row", "layers")  # without these no row can be read
# The types of what others read in the metadata; an entry of another type is left out and reported.
TYPES: dict[str, type | tuple[type, ...]] = {
    "created": str,
    "model": str,
    "name": str,
    "parameters": int,
    "device": str,
    "dtype": str,
    "seed": int,
    "threads": int,
    "budget": (int, float),
    "every": int,
    "build": str,
    "gradient_norms": str,
    "instruments": list,
    "settings": dict,
    "versions": dict,
    "sessions": list,
    "closed": dict,
    "checkpoints": list,
}
METADATA_CHANGED = (
    "run.json is not as it was written, so what it says of the run (model, settings, versions) may be wrong."
)


def read_metadata(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The contents of run.json, and what is wrong with it, in sentences.

    Raises RunError where there is no run, where the file is not one of ours or of another format's version, or
    where what describes the rows is damaged.
    """
    file = folder / META
    if not file.exists():
        raise RunError(_no_run(folder))
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{file} cannot be read ({_why(error)}); expected the run.json of a diag run.") from None
    if not isinstance(data, dict) or data.get("format") != RUN_FOLDER_FORMAT:
        raise RunError(f"{file} was not written by diag; give another folder.")
    _refuse_other_version(folder, data.get("format_version"))
    check = data.pop("check", None)
    expected = check if isinstance(check, dict) else {}
    try:
        _refuse_structure(data, expected.get("structure"))
        damage = [] if expected.get("all") == checksum(data) else [METADATA_CHANGED]
        clean = _with_floats(data)
    except (KeyError, TypeError, ValueError, RecursionError, OverflowError) as error:
        raise RunError(f"{file} is damaged (its row or layers: {_why(error)}); restore it from a copy.") from None
    misfits = _misfits(clean)
    if misfits and not damage:
        damage.append(f"run.json holds a {misfits[0]} of another kind than expected; it was left out.")
    return {name: value for name, value in clean.items() if name not in misfits}, damage


def _no_run(folder: Path) -> str:
    if (folder / f"{PREVIOUS}.moving" / META).exists():
        return (
            f"{folder} holds a run that was being set aside for a new one when its process was killed; start the "
            f"new run again, and it will lie in {PREVIOUS}."
        )
    hint = "" if folder.exists() else " (there is no such folder)"
    return f"{folder} holds no run{hint}; expected a folder that diag.watch(model, run=...) has written."


def _refuse_other_version(folder: Path, version: Any) -> None:
    if version == RUN_FOLDER_VERSION:
        return
    if isinstance(version, int) and version > RUN_FOLDER_VERSION:
        raise RunError(
            f"{folder} has run format {version} and this diag reads format {RUN_FOLDER_VERSION}; install a "
            f"newer diag."
        )
    raise RunError(
        f"{folder} has run format {str(version)[:20]}, which is older, and this diag reads format "
        f"{RUN_FOLDER_VERSION}; install the diag that wrote it."
    )


def _refuse_structure(data: Mapping[str, Any], expected: Any) -> None:
    layers = data["layers"]
    if not isinstance(layers, dict) or not all(type(n) is int and 0 <= n < LARGEST_NUMBER for n in layers.values()):
        raise ValueError("layers are not numbers of elements by name")
    if type(data["seal"]) is not int or not 0 <= data["seal"] < 1 << 32:
        raise ValueError("no seal")
    if not isinstance(data["row"], list):
        raise ValueError("no list of columns")
    check_columns(data["row"], len(layers))
    if checksum({name: data[name] for name in STRUCTURE}) != expected:
        raise ValueError("their checksum does not fit")


def _misfits(data: Mapping[str, Any]) -> list[str]:
    return [name for name, kind in TYPES.items() if name in data and not _fits(name, data[name], kind)]


def _fits(name: str, value: Any, kind: Any) -> bool:
    if value is None:
        return kind not in (list, dict)
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    if name in ("settings", "versions", "closed"):
        entries = dict if name == "settings" else (str, int)
        return all(isinstance(entry, entries) for entry in value.values()) and _decodes(value)
    if name == "instruments":
        return all(isinstance(entry, str) for entry in value)
    if name in ("sessions", "checkpoints"):
        return all(isinstance(entry, dict) for entry in value)
    return not isinstance(value, int) or abs(value) < 1 << 64


def _decodes(value: Any) -> bool:
    try:
        decode(value)
    except Exception:  # an array of any kind, say
        return False
    return True


def _why(error: BaseException) -> str:
    text = str(error).splitlines()
    return text[0][:200] if text else type(error).__name__


def _with_floats(value: Any) -> Any:
    """What `encode` made of numbers that JSON does not have (infinity), as numbers again."""
    if isinstance(value, dict):
        return decode(value) if "__float__" in value else {k: _with_floats(v) for k, v in value.items()}
    return [_with_floats(v) for v in value] if isinstance(value, list) else value


def jsonable(value: Any) -> Any:
    """Plain data as JSON; what JSON cannot hold becomes its text."""
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (tuple, list, set)):
        return [jsonable(v) for v in value]
    try:
        return encode(plain_data(value))
    except InvalidInput:
        return str(value)


def checksum(data: Any) -> str:
    """A checksum of JSON data, whatever the order of its keys and the blanks in its file."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f"{zlib.crc32(text.encode()):08x}"


def metadata_text(data: Mapping[str, Any]) -> str:
    """The text of run.json for these data, with the checksums that `read_metadata` compares."""
    plain_data = {name: value for name, value in json.loads(json.dumps(data)).items() if name != "check"}
    structure = checksum({name: plain_data[name] for name in STRUCTURE})
    check = {"structure": structure, "all": checksum(plain_data)}
    # A line for each: with indent= Python's own encoder is used, which takes ten times as long for many layers.
    lines = [
        f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}"
        for name, value in (plain_data | {"check": check}).items()
    ]
    return "{\n " + ",\n ".join(lines) + "\n}"


def write_atomically(file: Path, text: str) -> None:
    """Write a small file so that, whenever the process or the machine stops, it is there whole or as it was."""
    partial = file.with_suffix(".partial")
    try:
        with open(partial, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        partial.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
