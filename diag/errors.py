"""The errors that diag raises at a user's mistake or at the edge of what it can measure.

Each message is one sentence: what was found, what was expected, what to do.
"""


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
