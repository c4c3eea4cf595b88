"""The larger arrays of a run's results: files of their own, named by a hash of what they hold.

An array that repeats is stored once, and one that was changed, cut or exchanged no longer fits its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from diag.errors import RunError

ENDING = ".npy"


def save_array(folder: Path, array: NDArray[Any]) -> str:
    """Write `array` into `folder`, which is made where it is missing; return the name of its file."""
    buffer = io.BytesIO()
    numpy.save(buffer, array, allow_pickle=False)
    data = buffer.getvalue()
    name = _hash(data) + ENDING
    target = folder / name
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}.partial")
        folder.mkdir(exist_ok=True)
        try:
            partial.write_bytes(data)
            partial.replace(target)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
    return name


def read_array(folder: Path, name: str) -> NDArray[Any]:
    """The array that a record names, read-only.

    Raises RunError where its file is missing, is not what was written, or lies elsewhere.
    """
    try:
        if Path(name).name != name:
            raise ValueError("not a plain file name")
        data = (folder / name).read_bytes()
        if _hash(data) + ENDING != name:
            raise ValueError("it is not as it was written: its hash does not fit its name")
        return _parsed(data)
    except Exception as error:  # a hostile header may raise anything
        raise RunError(
            f"The array {name[:60]!r} of {folder.parent} cannot be read ({error}); restore it from a copy."
        ) from None


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=12).hexdigest()


def _parsed(data: bytes) -> NDArray[Any]:
    """The array in these bytes of an .npy file; nothing is made that is larger than they are."""
    file = io.BytesIO(data)
    version = numpy.lib.format.read_magic(file)
    read = numpy.lib.format.read_array_header_1_0 if version == (1, 0) else numpy.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not read")
    flat = numpy.frombuffer(data, dtype, offset=file.tell())
    return flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)
