"""Look in on functions of torch while something is being watched, and put them back afterwards.

Two ways. `Body` exchanges the body of a plain function and leaves the function object what it was: code that
imported it earlier is seen too, tables keyed by it still find it, and what refers to it can be pickled.
`Attribute` exchanges an attribute of a module or class: for methods and for functions with a closure.
Either way a call made while torch.compile traces goes straight to the original, so that the graph is that of
unwatched training.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

Around = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Patch(Protocol):
    """Something that can be put in place and taken away again."""

    def apply(self) -> None: ...

    def undo(self) -> None: ...


def _detour(*args: Any, _diag_around: Callable[..., Any], **kwargs: Any) -> Any:
    return _diag_around(*args, **kwargs)


class Body:
    """Calls of the plain function `function` go through `around(original, args, kwargs)`."""

    def __init__(self, function: Any, around: Around) -> None:
        self.function, self._around = function, around
        self._saved: tuple[Any, Any, Any] | None = None

    def apply(self) -> None:
        f = self.function
        if f.__closure__ is not None or self._saved is not None:
            return
        self._saved = (f.__code__, f.__defaults__, f.__kwdefaults__)
        original = types.FunctionType(f.__code__, f.__globals__, f.__name__, f.__defaults__)
        original.__kwdefaults__ = f.__kwdefaults__
        f.__code__, f.__defaults__ = _detour.__code__, None
        f.__kwdefaults__ = {"_diag_around": _detoured(original, self._around)}

    def undo(self) -> None:
        if self._saved is not None and self.function.__code__ is _detour.__code__:
            self.function.__code__, self.function.__defaults__, self.function.__kwdefaults__ = self._saved
        self._saved = None


class Attribute:
    """Calls through `owner.name`, for each of the owners, go through `around(original, args, kwargs)`."""

    def __init__(self, places: Sequence[tuple[Any, str]], around: Around) -> None:
        self.places, self._around = places, around
        self._put: list[tuple[Any, str, Any, Any]] = []

    def apply(self) -> None:
        for owner, name in self.places:
            original = getattr(owner, name, None)
            if original is not None:
                ours = functools.wraps(original)(_detoured(original, self._around))
                setattr(owner, name, ours)
                self._put.append((owner, name, original, ours))

    def undo(self) -> None:
        for owner, name, original, ours in self._put:
            # Whoever patched on top of us keeps their patch; ours then only passes calls on.
            if getattr(owner, name, None) is ours:
                setattr(owner, name, original)
        self._put = []


def _detoured(original: Callable[..., Any], around: Around) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(*args, **kwargs)
        return around(original, args, kwargs)

    return call
