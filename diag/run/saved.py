"""`diag.load`: a run's folder, or a result that was saved by itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from diag.door import at_the_door
from diag.errors import RunError, as_path
from diag.registry import instruments
from diag.result import RESULT_FORMAT, Result
from diag.run.files import META
from diag.run.reading import read_run

LARGEST_RESULT = 1 << 30  # bytes


@at_the_door
def load(path: str | os.PathLike[str]) -> Any:
    """The `Run` in the folder `path` (or the folder's run.json), or the `Result` that `result.save(path)` wrote.

    Raises RunError where there is neither, or one that cannot be read.
    """
    file = as_path(path)
    return load_result(file) if file.is_file() and file.name != META else read_run(file)


def load_result(file: Path) -> Result:
    """The result in the JSON file that `Result.save` wrote."""
    if file.stat().st_size > LARGEST_RESULT:
        raise RunError(f"{file} is larger than any result; expected a file that result.save wrote.")
    try:
        data = json.loads(file.read_text())
        name = str(data["instrument"]) if data["format"] == RESULT_FORMAT else ""
        if name in instruments():
            return instruments()[name].result.from_dict(data["result"])
    except Exception as error:
        raise RunError(
            f"{file} holds neither a run nor a result ({type(error).__name__}); expected a run's folder, or a file "
            "that result.save wrote."
        ) from None
    raise RunError(
        f"{file} holds a result of {name!r}, which is not installed here; expected one that `diag list` shows."
    )
