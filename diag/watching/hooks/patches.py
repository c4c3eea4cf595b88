"""Intercept functions of torch while something is being watched, and put them back afterwards.

Two ways. `Body` exchanges the body of a plain function and leaves the function object what it was: code that
imported it earlier is seen too, tables keyed by it still find it, and what refers to it can be pickled.
`Attribute` exchanges an attribute of a module or class: for methods and for functions with a closure.
Either way a call made while torch.compile traces goes straight to the original, so that the graph is that of
unwatched training.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from diag.watching.guard import safely, tell


class Changed(NamedTuple):
    """What a `before` may give: other arguments for the original, and its token."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    token: Any = None


@dataclass(frozen=True)
class Look:
    """What is done around each call of the original, which is made once whatever they do.

    before(args, kwargs) gives a token, or `Changed`. after(token, args, kwargs, value): the original has returned.
    over(token): it has returned or raised. broke(error): one of these has failed; a call is then not looked at.
    """

    before: Callable[[tuple[Any, ...], dict[str, Any]], Any] | None = None
    after: Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None] | None = None
    over: Callable[[Any], None] | None = None
    broke: Callable[[Exception], None] | None = None


class Patch(Protocol):
    """Something that can be put in place and taken away again."""

    def apply(self) -> None:
        """Put our own in its place."""

    def undo(self) -> None:
        """Put back what was there."""


def _detour(*args: Any, _diag_around: Callable[..., Any], **kwargs: Any) -> Any:
    return _diag_around(*args, **kwargs)


class Body:
    """Calls of the plain function `function` are looked at."""

    def __init__(self, function: Any, look: Look) -> None:
        self.function, self._look = function, look
        self._saved: tuple[Any, Any, Any] | None = None

    def apply(self) -> None:
        """Exchange the code of the function."""
        f = self.function
        if f.__closure__ is not None or self._saved is not None:
            return
        self._saved = (f.__code__, f.__defaults__, f.__kwdefaults__)
        original = plain_copy(f)
        f.__code__, f.__defaults__ = _detour.__code__, None
        f.__kwdefaults__ = {"_diag_around": _detoured(original, self._look)}

    def undo(self) -> None:
        """Give the function its own code again."""
        if self._saved is not None and self.function.__code__ is _detour.__code__:
            self.function.__code__, self.function.__defaults__, self.function.__kwdefaults__ = self._saved
        self._saved = None


class Attribute:
    """Calls through `owner.name`, for each of the owners, are looked at."""

    def __init__(self, places: Sequence[tuple[Any, str]], look: Look) -> None:
        self.places, self._look = places, look
        self._put: list[tuple[Any, str, Any, Any]] = []

    def apply(self) -> None:
        """Set our wrapper in each place."""
        for owner, name in self.places:
            original = getattr(owner, name, None)
            if original is not None:
                ours = functools.wraps(original)(_detoured(original, self._look))
                setattr(owner, name, ours)
                self._put.append((owner, name, original, ours))

    def undo(self) -> None:
        """Set back what was in each place, where ours still stands."""
        for owner, name, original, ours in self._put:
            # A patch on top of ours stays; ours then only passes calls on.
            if getattr(owner, name, None) is ours:
                setattr(owner, name, original)
        self._put = []


def _detoured(original: Callable[..., Any], look: Look) -> Callable[..., Any]:
    before, after, over, broke = look.before, look.after, look.over, look.broke

    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(*args, **kwargs)
        token = None  # says that `before` failed
        if before is not None:
            try:  # as `safely`, which is a call more for each of some six at every step
                token = before(args, kwargs)
                token = True if token is None else token
            except Exception as error:
                tell(broke, error)
        if type(token) is Changed:
            args, kwargs, token = token
        try:
            value = original(*args, **kwargs)
        finally:
            if over is not None and token is not None:
                safely(over, token, broke=broke)
        if after is not None and (token is not None or before is None):
            try:
                after(token, args, kwargs, value)
            except Exception as error:
                tell(broke, error)
        return value

    return call


def plain_copy(function: Any) -> Any:
    """The same plain function as another object, which keeps its body."""
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def read_twice(items: Iterator[Any]) -> tuple[list[Any], Iterator[Any]]:
    """What an iterator gives, and an iterator that gives the same and raises where it raised."""
    found: list[Any] = []
    try:
        found.extend(items)
    except Exception as error:
        return [], _again(found, error)
    return found, iter(found)


def _again(items: list[Any], error: Exception) -> Iterator[Any]:
    yield from items
    raise error
