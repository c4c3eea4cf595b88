"""Standard errors from few values, widened so that an interval of two of them covers the truth in 95 of 100 cases.

With k values the standard error is uncertain itself: the mean lies within t of them in 95 of 100 cases, t being the
97.5 % point of Student's distribution with k - 1 degrees of freedom (Student 1908): 2.26 for ten, 2.78 for five.
What is returned here is t / 2 of them, so that "two standard errors" is right for any number of values.
The points are computed here: importing scipy.stats takes longer than many a training step is looked at.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from statistics import NormalDist

from torch import Tensor

COVERED = 0.95
STANDARD_ERRORS = 2.0  # so many of those returned here on either side make an interval with that coverage
SUMMED_UP = 200  # degrees of freedom up to which the distribution is summed up


def covering(standard_error: float, values: int, of: int = 1) -> float:
    """A standard error from so many independent `values`, widened so that twice it covers the truth in 95 of 100
    cases.

    of: how many such intervals must hold at once, where one of them is chosen by looking (Bonferroni). NaN for
    fewer than two values.
    """
    return standard_error * factor(values, of) if values > 1 else math.nan


def error_of_mean(values: Tensor) -> float:
    """The same for the mean of these values (n,), in float64; NaN for one."""
    n = len(values)
    return covering(float(values.double().std()) / math.sqrt(n), n) if n > 1 else math.nan


def covering_skewed(samples: Sequence[float]) -> float:
    """The same for the mean of these samples, whose distribution may be skewed, as those of squares are.

    Johnson (1978, J. Am. Stat. Assoc. 73, 536): with skewness g of k samples of standard deviation s the upper end
    of the interval lies g s (1 + 2 t^2) / (6 k) further out; half of that is added here.
    """
    k = len(samples)
    if k < 2:
        return math.nan
    mean = sum(samples) / k
    second, third = (sum((x - mean) ** power for x in samples) / k for power in (2, 3))
    if not second > 0:
        return 0.0
    deviation, skewness = math.sqrt(second * k / (k - 1)), third / second**1.5
    t = 2 * factor(k)
    return covering(deviation / math.sqrt(k), k) + abs(skewness) * deviation * (1 + 2 * t * t) / (6 * k) / 2


@functools.cache
def factor(values: int, of: int = 1) -> float:
    """Half the two-sided point of Student's distribution with values - 1 degrees of freedom."""
    tail = (1 - COVERED) / (2 * of)
    start = -NormalDist().inv_cdf(tail)
    return (_expanded(start, values - 1) if values > SUMMED_UP else _searched(tail, values - 1, start)) / 2


def _expanded(x: float, freedom: int) -> float:
    """The point from the normal distribution's, by powers of 1 / freedom (Abramowitz, Stegun 1964, 26.7.5)."""
    terms = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return x + sum(term / freedom ** (k + 1) for k, term in enumerate(terms))


def _searched(tail: float, freedom: int, low: float) -> float:
    """The point above `low` beyond which `tail` of the distribution lies, by halving."""
    high = 2 * low
    while _beyond(high, freedom) > tail:
        low, high = high, 2 * high
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _beyond(middle, freedom) > tail else (low, middle)
    return high


def _beyond(t: float, freedom: int) -> float:
    """How much of the distribution lies beyond t, in closed form for whole degrees of freedom (26.7.3, 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    odd, cosine = freedom % 2, math.cos(angle)
    term, total = cosine if odd else 1.0, 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    within = math.sin(angle) * total
    return (1 - (2 / math.pi * (angle + within) if odd else within)) / 2
