"""What is measured of two groups of opposing examples: the fields alone, which `judging` reads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from diag.result import Result, measured

OVER_CHANCE = 5.0
OVER_NULL = 2.0  # by which the odds of the groups' movement exceed the largest after random steps; our choice


@dataclass(frozen=True, kw_only=True, eq=False)
class MeasuredSignals(Result):
    """Two groups of rows, A and B, and how much of the loss's movement and curvature they carry."""

    share: float = measured("movement |change of loss| in A and B together", unit="share")
    swap: float = measured(
        "examples that change ends from one step to the next", remark="NaN for a static kick", unit="share"
    )
    persist: float = measured("examples that stay at their end", remark="NaN for a static kick", unit="share")
    antiphase: float = measured(
        "correlation over the steps of A's and B's mean change", remark="NaN for a static kick"
    )
    lag_one: float = measured(
        "correlation of A's mean change with itself a step later", remark="NaN for a static kick"
    )
    curvature_share: float = measured(
        "Gauss-Newton curvature along the direction (the sharpest, for recorded steps) in A and B", unit="share"
    )
    chance_share: float = measured("2k/n, the share of as many random examples if all moved alike", unit="share")
    null_share: float = measured("largest share after random steps of the same length", unit="share")
    sharpness: float = measured("largest eigenvalue of the Hessian")
    edge_first: float = measured(
        "sharpness over the optimizer's threshold at the first recorded step", remark="else NaN"
    )
    edge_last: float = measured("the same at the last recorded step")
    spike: float = measured("largest mean loss after a step over that before it", remark="NaN for a static kick")
    slope_a: float = measured("mean slope of A's losses along the direction")
    slope_b: float = measured("mean slope of B's losses along the direction")
    slope_auc: float = measured("chance that a member's slope is larger in size than a non-member's")
    norm_auc: float = measured("the same for the norm of the gradient alone (a null)")
    loss_auc: float = measured("the same for the loss alone (a null)")
    loss_correlation: float = measured("correlation of |change| with the loss (a null: hard examples move more)")
    cosine: float = measured("cosine of the two groups' gradients (negative also by selection: proves nothing)")
    norm_a: float = measured("norm of A's mean gradient")
    norm_b: float = measured("norm of B's mean gradient")
    norm_rest: float = measured("norm of the mean gradient of the rest")
    direction: int = measured(
        "which eigenvector separates the groups, 0 the sharpest", remark="-1: not from a direction"
    )
    mode: str = measured("static, replay or online")
    k: int = measured("examples in each group")
    num_examples: int = measured("examples, n")
    same_side: bool = measured("both groups' losses rise along the same side of the direction")
    group_a: NDArray[numpy.int64] = measured("rows whose loss rises most, the largest first", shape="(k,)")
    group_b: NDArray[numpy.int64] = measured("rows whose loss falls most, the largest first", shape="(k,)")
    shares: NDArray[numpy.float64] = measured("share for each direction that was tried", shape="(directions,)")
    eigenvalues: NDArray[numpy.float64] = measured("curvature along each", shape="(directions,)")
    changes: NDArray[numpy.float64] = measured("mean change of A, B and the rest, per step", shape="(steps, 3)")
    trace: NDArray[numpy.float64] = measured(
        "mean loss of A, B and the rest at each step", remark="empty for a static kick", shape="(steps + 1, 3)"
    )
    steps: tuple[int, ...] = measured("the steps of the trace", remark="those of a replay count from 0")
    cosines: NDArray[numpy.float64] = measured("cosines between the gradients of A, then B", shape="(2k, 2k)")
    labels_a: tuple[int, ...] = measured("labels of A, in order", remark="empty where there are none")
    labels_b: tuple[int, ...] = measured("labels of B, in order", remark="empty where there are none")
    losses_a: NDArray[numpy.float64] = measured("losses of A, in order", shape="(k,)")
    losses_b: NDArray[numpy.float64] = measured("losses of B, in order", shape="(k,)")
    row_inputs: NDArray[Any] = measured(
        "inputs of the first 12 of A and of B, features standardised",
        remark="empty without a tensor",
        shape="(rows, *)",
    )
    difference: NDArray[numpy.float64] = measured(
        "mean input of A less that of B, in standard deviations", remark="empty where there is none", shape="(*)"
    )

    @property
    def limit(self) -> float:
        """The share from which on the groups are outsized: far more than their number, and than random steps."""
        null = 0.0 if math.isnan(self.null_share) else self.null_share
        over_null = OVER_NULL * null / (1 + (OVER_NULL - 1) * null)
        return max(float(self.setting("share_limit")), OVER_CHANCE * self.chance_share, over_null)

    @property
    def outsized(self) -> bool:
        """True where the two groups carry far more of the movement than chance explains."""
        return self.share > self.limit
