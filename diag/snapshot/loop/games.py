"""The two networks of a game, one of which judges what the other generates, as a part of a loop's facts (see
`facts`): read from the graphs of the backward passes of both and from the gradient at the judge's outputs.

Steps are counted from 1 as in the record of the run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GameLook:
    """A round of a game. The judge's own backward passes ask for a larger output on some rows ("up") and a smaller
    one on others ("down").

    alike: which of the two groups has the means and deviations of the generated rows, "" where that is not clear;
    asked_for: in which direction the generator moves the judge's output on its rows, "" where these differ.
    generated, others: root mean square of the generated rows and of those of the group that is not alike, NaN
    where not known. slope: the mean size of the loss's derivative by the judge's output on a generated row, times
    the rows. bounded: the function that made the generated rows ("tanh", "sigmoid", "" for none); outside: the
    share of the numbers of the other group that lie beyond what it can give. one_row: the generated rows are all
    the same, but for rounding, and those of another group are not. one_answer: the direction that the judge's own
    backward passes ask for on all rows, where these came in several calls of it, of which one had the generated
    rows and another one did not; "" where that is not so, or not clear."""

    step: int
    alike: str
    asked_for: str
    generated: float
    others: float
    slope: float
    bounded: str
    outside: float
    one_row: bool = False
    one_answer: str = ""


@dataclass(frozen=True)
class GameFacts:
    """The looks at a game, the first and the last of them; judge and generator: the parameters of the model that
    each of the two has."""

    looks: tuple[GameLook, ...] = ()
    judge: tuple[str, ...] = ()
    generator: tuple[str, ...] = ()
