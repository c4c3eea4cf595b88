"""Are the inputs of evaluation those of training turned over, as by 1 - x, a negative or a sign?

Such inputs have the spread of training's, and their distribution is lopsided to the other side. A distribution that
is symmetric looks the same turned over, so that nothing can be said of it.
"""

from __future__ import annotations

import math

from torch import Tensor

LOPSIDED = 0.2  # skewness; a normal distribution has 0, an exponential one 2
CERTAIN_BY = 6.0  # standard errors of both, from row to row
AS_MUCH, SPREADS_ALIKE = 0.25, 0.1  # differences, over the larger one
ROWS_OF_SKEW = 64  # of a side


def turned_over(own: Tensor, other: Tensor) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Features of training (rows, features, numbers) of which those of evaluation are the reverse, and the skewness
    of the first of them in both; none unless all that vary are."""
    if min(len(own), len(other)) < ROWS_OF_SKEW:
        return (), ()
    found: list[int] = []
    skews: tuple[float, ...] = ()
    for feature in range(own.shape[1]):
        here, there = _skewness(own[:, feature]), _skewness(other[:, feature])
        if here is None or there is None:
            if _varies(own[:, feature]) or _varies(other[:, feature]):
                return (), ()
            continue
        if not _reverse(here, there):
            return (), ()
        skews = skews or (here[0], there[0])
        found.append(feature)
    return tuple(found), skews


def _varies(numbers: Tensor) -> bool:
    return bool(numbers.std() > 0)


def _skewness(numbers: Tensor) -> tuple[float, float, float] | None:
    """Skewness of (rows, numbers), its standard error by how much rows differ, and the standard deviation; None
    where that is zero."""
    numbers = numbers.double()
    spread = float(numbers.std(correction=0))
    if not spread > 0 or not math.isfinite(spread):
        return None
    cubes = ((numbers - numbers.mean()) / spread).pow(3).mean(1)
    return float(cubes.mean()), float(cubes.std()) / len(cubes) ** 0.5, spread


def _reverse(here: tuple[float, float, float], there: tuple[float, float, float]) -> bool:
    (skew, error, spread), (skew_, error_, spread_) = here, there
    certain = min(abs(skew) / max(error, 1e-12), abs(skew_) / max(error_, 1e-12)) > CERTAIN_BY
    lopsided = skew * skew_ < 0 and min(abs(skew), abs(skew_)) > LOPSIDED
    alike = abs(skew + skew_) <= AS_MUCH * max(abs(skew), abs(skew_))
    return certain and lopsided and alike and abs(spread - spread_) <= SPREADS_ALIKE * max(spread, spread_)
