"""How many examples lost their gradient to rounding, and how far the others are from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from diag.result import Result, measured


@dataclass(frozen=True, kw_only=True, eq=False)
class MeasuredMargins(Result):
    """How many examples lost their gradient to rounding, and how far the others are from it."""

    collapsed: float = measured("examples whose loss gradient on their own class is exactly zero", unit="share")
    headroom: float = measured(
        "how far the median margin is below b ln 2, the collapse margin of the logits' dtype", unit="nats"
    )
    median_margin: float = measured("median log-odds margin of the true class", unit="nats")
    zero_sum_residual: float = measured(
        "sum over examples of |sum of the logit gradients|, over the sum of their sizes: 0 in exact arithmetic"
    )
    gradient_error: float = measured("relative rounding error of the median example's gradient on its own class")
    loss_underestimate: float = measured(
        "mean loss in float64 minus mean cross_entropy in the dtype of the logits", unit="nats"
    )
    accuracy: float = measured("examples whose label has the largest logit", unit="share")
    held_out_accuracy: float = measured("the same on held-out data", unit="share")
    collapsed_by_dtype: dict[str, float] = measured("examples with margin >= b ln 2 in that dtype", unit="share")
    zero_loss_by_dtype: dict[str, float] = measured("examples whose cross_entropy is exactly 0", unit="share")
    paper_count_by_dtype: dict[str, float] = measured(
        "examples whose softmax denominator equals the label's own term (the paper's Definition 3)", unit="share"
    )
    repository_count_by_dtype: dict[str, float] = measured(
        "examples whose softmax denominator equals its largest term, right or wrong (the authors' code)",
        unit="share",
    )
    zero_gradient_by_dtype: dict[str, float] = measured(
        "examples whose cross_entropy gradient on the label is exactly 0", unit="share"
    )
    margins: NDArray[numpy.float64] = measured("log-odds margin of each example", unit="nats", shape="(examples,)")
    dtype: str = measured("dtype of the logits")
    loss: str = measured("the loss whose gradients were examined")
