"""The sharpness that the optimizer sees, and the thresholds beside it."""

from __future__ import annotations

from dataclasses import dataclass

from diag.result import Result, measured


@dataclass(frozen=True, kw_only=True, eq=False)
class MeasuredEdge(Result):
    """The largest eigenvalue that the optimizer sees, beside the largest that it can bear."""

    ratio: float = measured("lambda_max / threshold", remark="NaN where the threshold is not known")
    lambda_max: float = measured(
        "largest eigenvalue of the Hessian as the optimizer sees it: with the weight decay that it adds to the "
        "gradient, preconditioned where it divides its steps"
    )
    residual: float = measured("an eigenvalue lies within this of lambda_max", remark="depends on the rounding")
    threshold: float = measured(
        "largest stable eigenvalue at this learning rate", remark="NaN where it is not known"
    )
    rule: str = measured("the threshold as a formula")
    sharpness: float = measured("largest eigenvalue of the Hessian of the loss itself")
    trace: float = measured("trace of the Hessian of the loss")
    trace_standard_error: float = measured("standard error of the trace")
    trace_ratio: float = measured(
        "learning rate x trace / 2 x (n - B) / (B (n - 1)): above 1 the point is not a linearly stable "
        "minimum of a squared loss under SGD with batches of B",
        remark="0 for full batches; NaN where B is not given or the optimizer is not plain SGD",
    )
    trace_ratio_standard_error: float = measured("standard error of the trace ratio")
    scatter_ratio: float = measured(
        "learning rate over the bound of equation 15 (the examples' curvature along the top eigenvector) on "
        "SGD with batches of B",
        remark="NaN where B is not given, the optimizer not plain SGD or the loss not squared",
    )
    norm_ratio: float = measured("learning rate over the bound of equation 16 (norms of the examples' curvature)")
    norm_ratio_standard_error: float = measured("standard error of the norm ratio", remark="0 from all examples")
    mean_square_ratio: float = measured(
        "learning rate over the exact threshold of mean-square stability", remark="NaN where the data are too many"
    )
    learning_rate: float = measured(
        "learning rate, the largest of the parameter groups", remark="NaN where there is none"
    )
    optimizer_kind: str = measured("class of the optimizer")
    num_products: int = measured("Hessian-vector products spent", remark="depends on the rounding")
