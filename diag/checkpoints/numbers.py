"""Stand-ins through which a checkpoint may hold NumPy numbers (a best accuracy, a step) without NumPy's unpickler.

NumPy's own `dtype` and `scalar` take a crafted state for the layout of memory, so they are not called on what a
file says. These accept plain numbers alone and make Python numbers of them; anything else becomes None.
"""

from __future__ import annotations

import re
from typing import Any

import numpy

PLAIN_DTYPE = re.compile(r"[fiub][1248]")


class Dtype:
    """What a pickle says of a numpy.dtype: its kind and size ("f8") and its byte order."""

    def __init__(self, kind: Any = "", *_: Any) -> None:
        self.kind, self.order = str(kind), "="

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else "="
        self.order = order if order in ("<", ">") else "="


def scalar(dtype: Any = None, data: Any = None, *_: Any) -> bool | int | float | None:
    """The number that `numpy.float64(...)` and its like were pickled as."""
    if not (isinstance(dtype, Dtype) and isinstance(data, bytes) and PLAIN_DTYPE.fullmatch(dtype.kind)):
        return None
    kind = numpy.dtype(dtype.order + dtype.kind)
    return numpy.frombuffer(data, kind)[0].item() if len(data) == kind.itemsize else None


NUMPY: tuple[tuple[Any, str], ...] = (
    (Dtype, "numpy.dtype"),
    (scalar, "numpy._core.multiarray.scalar"),
    (scalar, "numpy.core.multiarray.scalar"),
)
