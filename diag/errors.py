"""The errors that diag raises at a user's mistake or at the edge of what it can measure.

Each message is one sentence: what was found, what was expected, what to do. The words that such sentences share are
made here too, so that every room names a few of many, counts, and says what kind a value is in the same way.
"""

from __future__ import annotations

import difflib
import enum
import os
from collections.abc import Iterable, Sequence
from pathlib import Path


class DiagError(Exception):
    """Base class: every error that diag raises on purpose."""


class InvalidInput(DiagError, ValueError):
    """A value that was given does not fit: wrong shape, type, range, or not finite."""


class MissingQuantity(DiagError, LookupError):
    """The snapshot cannot give a quantity that an instrument needs; the text says how to give it."""


class MissingData(DiagError, LookupError):
    """A data set is not on this machine; the text says how to get it."""


class Unsupported(DiagError):
    """The model, loss or file has a construct for which no right number can be computed."""


class Stopped(DiagError):
    """A measurement took longer, or more memory, than it was given; the text says how much of each."""


class RunError(DiagError):
    """A run folder cannot be opened, written or resumed."""


class CheckpointError(DiagError):
    """A checkpoint cannot be loaded safely or does not fit the model."""


def text_of(error: BaseException) -> str:
    """An error's text, also where the error cannot give it: the text is the code's that raised, not ours."""
    try:
        return str(error)
    except Exception:
        return f"{type(error).__name__}, whose text is unavailable"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 160 characters and no full stop, to quote it in a sentence."""
    return (text_of(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")[:160]


def named(names: Sequence[object], most: int = 3) -> str:
    """The first of some names, and how many more there are.

    >>> named(["a", "b"]), named(range(7)), named([])
    ('a and b', '0, 1, 2 and 4 more', '')
    """
    first_names, more = [str(name) for name in names[:most]], len(names) - most
    last = [f"{more:,} more"] if more > 0 else first_names[-1:]
    first = first_names if more > 0 else first_names[:-1]
    return " and ".join([", ".join(first), *last] if first else last)


def layer_called(name: str) -> str:
    """A layer's name as it stands in a sentence: a number alone is said to be a layer.

    >>> layer_called("encoder.0"), layer_called("2")
    ('encoder.0', 'layer 2')
    """
    return f"layer {name}" if name.replace(".", "").isdecimal() else name


def layers_called(names: Sequence[str], most: int = 3) -> str:
    """The first of some layers' names, as they stand in a sentence, and how many more there are."""
    return named([layer_called(name) for name in names], most)


def counted(number: int, thing: str) -> str:
    """A number and its noun.

    >>> counted(1, "step"), counted(2000, "step")
    ('1 step', '2,000 steps')
    """
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def of_the_steps(times: int, looked: int, steps: int) -> str:
    """How many steps something was seen at. Not every step is looked at, so it says of how many.

    >>> of_the_steps(2, 5, 5), of_the_steps(2, 5, 90), of_the_steps(5, 5, 90), of_the_steps(1, 1, 1)
    ('2 of 5 steps', '2 of the 5 steps that were looked at', 'all 5 steps that were looked at', 'the only step')
    """
    looked = max(looked, times)
    if looked >= steps:
        each = "the only step" if steps == 1 else f"all {counted(steps, 'step')}"
        return each if times >= steps else f"{times:,} of {counted(steps, 'step')}"
    if times == looked:
        return f"all {counted(times, 'step')} that were looked at" if times > 1 else "the step that was looked at"
    return f"{times:,} of the {counted(looked, 'step')} that were looked at"


def type_of(value: object) -> str:
    """What a value is, to say that something else was expected.

    >>> type_of(3), type_of("a"), type_of(None), type_of(dict)
    ('an int', 'a str', 'None', 'the class dict')
    """
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeioAEIO' else 'a'} {name}"


def as_path(value: str | os.PathLike[str]) -> Path:
    """A path; raises InvalidInput for what is none."""
    if not isinstance(value, (str, os.PathLike)):
        raise InvalidInput(f"The path is {type_of(value)}; expected the name of a file or folder.")
    if not os.fspath(value):
        raise InvalidInput("The path is an empty text; expected the name of a file or folder.")
    return Path(value)


def one_of(kind: type[enum.Enum], value: object) -> str:
    """That `value` is none of an enum's, in one sentence."""
    return f"{value!r} is no {kind.__name__}; expected one of {', '.join(repr(k.value) for k in kind)}."


def did_you_mean(name: str, known: Iterable[str], most: int = 2) -> str:
    """A question with the nearest of the known names; empty where none is near.

    >>> did_you_mean("lables", ["labels", "logits"]), did_you_mean("x", ["labels"])
    ('did you mean labels?', '')
    """
    near = difflib.get_close_matches(name, known, n=most)
    return f"did you mean {' or '.join(near)}?" if near else ""
