"""The record that a self-test of curvature leaves: its numbers, and what they say in one sentence."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

# By the arithmetic of the test, since a float32 difference can prove less. Our choice, uncalibrated.
WARN_ABOVE = {"float64": 0.003, "float32": 0.03}


class ProductMethod(enum.StrEnum):
    """How a curvature product is computed."""

    DOUBLE_BACKWARD = "double backward"
    FINITE_DIFFERENCE = "finite difference"


@dataclass(frozen=True, kw_only=True)
class SelfTest:
    """What the self-test of a curvature product found; all errors are relative.

    method: double backward, or finite differences where that failed for the `reason` given.
    precision: the arithmetic of the test. step: the finite difference's step, relative to ||theta||.
    errors: direction -> ||product - finite difference|| / ||product|| in the worst parameter, at the best of the
        steps (for the finite difference itself: its change between two steps).
    gradient_error: <grad L, d> against the difference of the loss along d. repeatability: two evaluations of
    one gradient. asymmetry: <u, A v> - <v, A u> in units of the larger product.
    rounding_error: the product in the operator's own precision against the one in the test's.
    earlier: it is of an earlier measurement of the same model, and was taken over (see carry.py).
    """

    method: ProductMethod
    precision: str
    num_examples: int
    errors: dict[str, float] = field(default_factory=dict)
    gradient_error: float
    repeatability: float
    asymmetry: float
    rounding_error: float = 0.0
    step: float = 0.0
    reason: str = ""
    earlier: bool = False

    @property
    def differenced(self) -> bool:
        """Whether products are finite differences."""
        return self.method == ProductMethod.FINITE_DIFFERENCE

    @property
    def level(self) -> str:
        """ "ok", or "warning" where a check came out above the warning threshold or a fallback is in use."""
        worst = max([*self.errors.values(), self.gradient_error, self.asymmetry])
        doubtful = worst > WARN_ABOVE[self.precision] or self.rounding_error > WARN_ABOVE["float32"]
        return "warning" if doubtful or self.differenced else "ok"

    def sentence(self) -> str:
        """The outcome in one sentence with its numbers."""
        worst = max(self.errors.values(), default=0.0)
        tested = f"tested in {self.precision} on {self.num_examples} examples"
        if self.earlier:
            tested += " at an earlier measurement"
        if self.differenced:
            return (
                f"Products are finite differences, because {self.reason}; two steps agree to {worst:.1e} "
                f"({tested})."
            )
        return (
            f"Products agree with finite differences to {worst:.1e}, and rounding changes them by "
            f"{self.rounding_error:.1e} ({tested})."
        )
