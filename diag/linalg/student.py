"""Standard errors from few values, widened so that an interval of two of them covers the truth in 95 of 100 cases.

With k values the standard error is uncertain itself: the mean lies within t of them in 95 of 100 cases, t being the
97.5 % point of Student's distribution with k - 1 degrees of freedom (Student 1908): 2.26 for ten, 2.78 for five.
What is returned here is t / 2 of them, so that "two standard errors" is right for any number of values.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from torch import Tensor

COVERED = 0.95
STANDARD_ERRORS = 2.0  # so many of those returned here on either side make an interval with that coverage


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
    from scipy.stats import t

    return float(t.ppf(1 - (1 - COVERED) / (2 * of), values - 1)) / 2
