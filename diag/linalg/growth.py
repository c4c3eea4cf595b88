"""How a distance grows with the step number: three laws fitted by least squares, and how well each describes it.

The laws are a + c log t, a + c sqrt t and the power law exp(a) t^c (fitted in log-log). Residuals of all three
are taken in the distance itself, so that their R^2 and AIC can be compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

LAWS = ("log", "sqrt", "power")


@dataclass(frozen=True)
class Fit:
    """One fitted law: its slope c (for the power law the exponent), R^2 and AIC (two parameters, Gaussian)."""

    law: str
    intercept: float
    slope: float
    r2: float
    aic: float

    def __call__(self, t: NDArray[numpy.float64]) -> NDArray[numpy.float64]:
        """The law's distance at the steps `t`."""
        if self.law == "power":
            return numpy.exp(self.intercept) * t**self.slope
        return self.intercept + self.slope * (numpy.log(t) if self.law == "log" else numpy.sqrt(t))


def fit_growth(t: NDArray[numpy.float64], d: NDArray[numpy.float64]) -> dict[str, Fit]:
    """The three laws for distances `d` > 0 at steps `t` > 0, both (T,) with T >= 3, by name."""
    coordinates = {
        "log": (numpy.log(t), d),
        "sqrt": (numpy.sqrt(t), d),
        "power": (numpy.log(t), numpy.log(d)),
    }
    return {law: _fit(law, *coordinates[law], t, d) for law in LAWS}


def _fit(
    law: str,
    x: NDArray[numpy.float64],
    y: NDArray[numpy.float64],
    t: NDArray[numpy.float64],
    d: NDArray[numpy.float64],
) -> Fit:
    slope, intercept = (float(c) for c in numpy.polyfit(x, y, 1))
    residual = float(((d - Fit(law, intercept, slope, 0.0, 0.0)(t)) ** 2).sum())
    total = float(((d - d.mean()) ** 2).sum())
    # A residual of rounding size would give log 0; the floor is far below any measured distance.
    floor = max(residual, 1e-30 * max(total, 1e-300))
    r2 = 1 - residual / total if total > 0 else math.nan
    return Fit(law, intercept, slope, r2, len(t) * math.log(floor / len(t)) + 4)


def log_spaced(steps: NDArray[numpy.int64], count: int) -> NDArray[numpy.int64]:
    """At most `count` indices into ascending positive `steps`, about even in log t, first and last among them."""
    if len(steps) <= count:
        return numpy.arange(len(steps))
    spread = numpy.geomspace(steps[0], steps[-1], count)
    return numpy.unique(numpy.searchsorted(steps, spread.round()).clip(0, len(steps) - 1))
