"""Plain data: what a result holds, made immutable, compared, and as strict JSON and back."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from typing import Any

from diag.errors import InvalidInput, type_of


def _refuse_change(self: Any, *args: Any, **kwargs: Any) -> Any:
    raise TypeError("A result is immutable: copy the mapping with dict(...) before you change it.")


class ReadOnly(dict[str, Any]):
    """A mapping in a frozen result."""

    __setitem__ = __delitem__ = update = pop = popitem = clear = setdefault = __ior__ = _refuse_change

    def __reduce__(self) -> Any:
        return ReadOnly, (dict(self),)


def plain_data(value: Any) -> Any:
    """`value` as immutable plain data: tensors and lists of numbers as NumPy arrays or tuples."""
    if value is None or type(value) in (float, int, bool, str):
        return value
    import numpy
    import torch

    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.float().numpy() if value.dtype is torch.bfloat16 else value.numpy()
    if isinstance(value, numpy.ndarray):
        if value.ndim == 0:
            return value.item()
        value = value.copy()
        value.setflags(write=False)
        return value
    if isinstance(value, numpy.generic):
        return value.item()
    if isinstance(value, Mapping):
        return ReadOnly({str(k): plain_data(v) for k, v in value.items()})
    if isinstance(value, (tuple, list)):
        return tuple(plain_data(v) for v in value)
    return value


def encode(value: Any, save_array: Callable[[Any], str] | None = None) -> Any:
    """Plain data as strict JSON: arrays carry dtype and shape, and non-finite numbers are named."""
    import numpy

    if isinstance(value, numpy.ndarray):
        if save_array is not None and value.size > 64:
            return {"__array__": save_array(value)}
        flat = value.ravel().tolist()
        data = flat if value.dtype.kind != "f" or numpy.isfinite(value).all() else [encode(x) for x in flat]
        return {"__array__": data, "dtype": str(value.dtype), "shape": list(value.shape)}
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": repr(value)}
    if isinstance(value, Mapping):
        return {k: encode(v, save_array) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [encode(v, save_array) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value.value if isinstance(value, enum.Enum) else value
    raise InvalidInput(
        f"A result holds {type_of(value)}; expected numbers, strings, tuples, dicts or arrays: mark "
        "the field measured(..., record=False) if it must not be recorded."
    )


def decode(value: Any, load_array: Callable[[str], Any] | None = None) -> Any:
    """The inverse of `encode`; lists come back as tuples."""
    import numpy

    if isinstance(value, Mapping):
        if "__float__" in value:
            return float(value["__float__"])
        if "__array__" in value:
            if isinstance(value["__array__"], str):
                if load_array is None:
                    raise InvalidInput("The data names an array in another file; load it through its run.")
                return load_array(value["__array__"])
            flat, dtype = [decode(x) for x in value["__array__"]], numpy.dtype(value["dtype"])
            if dtype.kind not in "biufcSU":
                raise InvalidInput(f"An array of dtype {dtype} cannot be read; expected numbers or texts.")
            # A text's dtype says how long it may be; that is left to the texts.
            array = numpy.array(flat, dtype=None if dtype.kind in "SU" and flat else dtype)
            return plain_data(array.reshape(value["shape"]))
        return {k: decode(v, load_array) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(decode(v, load_array) for v in value)
    return value


def equal(a: Any, b: Any) -> bool:
    """Equality of plain data in which NaN equals NaN and arrays compare by dtype, shape and content."""
    import numpy

    if isinstance(a, numpy.ndarray) or isinstance(b, numpy.ndarray):
        same_kind = isinstance(a, numpy.ndarray) and isinstance(b, numpy.ndarray) and a.dtype == b.dtype
        return same_kind and numpy.array_equal(a, b, equal_nan=a.dtype.kind in "fc")
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b):
        return True
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)
