"""Whether two state dicts are of one network: the first difference, in one sentence, and how many more.

What fits is converted to the network's dtype, and refused where that would lose more than digits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from diag.errors import InvalidInput, counted


def check_states_fit(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    expected: Mapping[str, tuple[int, ...]] | None = None,
    names: tuple[str, str] = ("the first network", "the second"),
) -> None:
    """Raise InvalidInput where the two differ in names or shapes, or from the `expected` shapes.

    The sentence names the first difference in the order of the state dict and counts the others.
    """
    found = list(_differences(a, b, names))
    if not found and expected is not None:
        shapes = {n: _Shape(s) for n, s in expected.items()}
        found = list(_differences(shapes, b, ("the model", names[1])))
    if found:
        more = f" ({counted(len(found) - 1, 'more difference')})" if len(found) > 1 else ""
        raise InvalidInput(
            f"The two checkpoints do not fit: {found[0]}{more}; expected two trained copies of one architecture."
        )


def taken_over(name: str, value: Tensor, like: Tensor) -> Tensor:
    """`value` in the dtype and on the device of `like`.

    Raises InvalidInput where the conversion changes what it is: codes to weights, complex numbers to real ones,
    large numbers to infinity, whole numbers to others.
    """
    if _kind(value) != _kind(like):
        raise InvalidInput(
            f"'{name}' is {_short(value)} in the other network and {_short(like)} in the model; expected one kind "
            "of numbers: give a state of the same format (dequantized, for instance)."
        )
    found = value.detach().to(like.device, like.dtype)
    if value.dtype == like.dtype:
        return found
    here = value.detach().to(like.device)
    if value.is_floating_point() or value.is_complex():
        kept = torch.isfinite(here) == torch.isfinite(found)
    else:
        kept = found.to(here.dtype) == here
    if not bool(kept.all()):
        raise InvalidInput(
            f"'{name}' holds numbers in {_short(value)} that {_short(like)}, the dtype of the model, cannot; give "
            "the model in the wider dtype."
        )
    return found


def check_ties(state: Mapping[str, Tensor], ties: Mapping[str, str]) -> None:
    """Raise InvalidInput where two names of one tensor hold different values. ties: name -> the name it goes by."""
    for name, first in ties.items():
        if name in state and first in state and not torch.equal(state[name], state[first].to(state[name].device)):
            raise InvalidInput(
                f"'{name}' and '{first}' are one tensor in the model and two in the other network, with different "
                "values; expected two trained copies of one architecture."
            )


def _kind(tensor: Tensor) -> str:
    if tensor.is_quantized:
        return "quantized"
    return "floating" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "whole"


def _short(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


class _Shape:
    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], names: tuple[str, str]) -> Iterator[str]:
    left, right = ({n: t for n, t in s.items() if isinstance(t, (Tensor, _Shape))} for s in (a, b))
    for name, value in left.items():
        if name not in right:
            yield f"'{name}' is in {names[0]} and missing in {names[1]}"
        elif tuple(value.shape) != tuple(right[name].shape):
            yield (
                f"'{name}' has shape {tuple(value.shape)} in {names[0]} and {tuple(right[name].shape)} in "
                + names[1]
                + _vocabulary(name, value.shape, right[name].shape)
            )
    for name in right:
        if name not in left:
            yield f"'{name}' is in {names[1]} and missing in {names[0]}"


def _vocabulary(name: str, a: Any, b: Any) -> str:
    """Embeddings that differ only in their rows come from two vocabularies."""
    rows_only = len(a) == len(b) == 2 and a[1] == b[1]
    return ", so the vocabularies differ" if rows_only and _is_embedding(name) else ""


def _is_embedding(name: str) -> bool:
    return any(word in name.lower() for word in ("embed", "wte", "token", "vocab", "lm_head"))
