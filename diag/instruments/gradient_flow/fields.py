"""What is counted over the record of a run, and its course."""

from __future__ import annotations

from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from diag.result import Result, measured


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordedFlow(Result):
    """Counts over the whole record, and its course at up to 96 evenly spaced steps; NaN: not observed."""

    non_finite_losses: int = measured("steps whose loss was infinite or not a number", unit="steps")
    non_finite_gradients: int = measured("steps with a gradient that was not finite", unit="steps")
    non_finite_applied: int = measured("of these, steps that the optimizer took all the same", unit="steps")
    skipped_steps: int = measured("steps that the GradScaler left out", unit="steps")
    num_steps: int = measured("steps recorded")
    growth_slope: float = measured("slope c of the distance law a + c log t, over the steps that were fitted")
    growth_exponent: float = measured("exponent of the distance as a power of the step number")
    r2_by_law: dict[str, float] = measured("R^2 of the distance by each law of growth")
    aic_by_law: dict[str, float] = measured(
        "Akaike's criterion by each law", remark="residuals are correlated, so rank only"
    )
    first_fitted_step: int = measured("first step of the fit", remark="0 where there is none")
    last_fitted_step: int = measured("last step of the fit", remark="0 where there is none")
    relative_distance: float = measured("distance from the start over the norm of the parameters there, at the end")
    depth_factor: float = measured(
        "norm of the first step's bias gradients at the first layer over the last, along a log-linear fit"
    )
    plain_network: bool = measured("the user says: a plain stack, recorded from its initialisation")
    loss_steps: tuple[int, ...] = measured("the first of the steps whose loss was not finite")
    gradient_steps: tuple[int, ...] = measured("the first of the steps with a gradient that was not finite")
    skipped_step_numbers: tuple[int, ...] = measured("the first of the steps that were left out")
    gradient_layers: tuple[str, ...] = measured("tensors whose gradient was not finite, most often first")
    idle_layers: tuple[str, ...] = measured("tensors whose gradient was exactly zero at every step")
    losses_seen: int = measured("steps at which a loss was seen", unit="steps")
    gradients_seen: int = measured("steps at which a gradient was seen", unit="steps")
    longest_unread: int = measured("most steps in a row at which no gradient was seen", unit="steps")
    unseen_layers: tuple[str, ...] = measured("tensors that had no gradient at any step")
    still: bool = measured("the weights were looked at, and never moved")
    loss_growth: float = measured(
        "median of the last five losses over the first", remark="NaN where that is not above zero"
    )
    layers: tuple[str, ...] = measured("parameter tensors, in the order of named_parameters()")
    steps: NDArray[numpy.int64] = measured("the steps shown", shape="(steps,)")
    distance: NDArray[numpy.float64] = measured("distance of all weights from the start", shape="(steps,)")
    gradient_norm: NDArray[numpy.float32] = measured(
        "2-norm of the gradient before clipping", shape="(steps, layers)"
    )
    parameter_norm: NDArray[numpy.float32] = measured("2-norm of the parameters", shape="(steps, layers)")
    update_norm: NDArray[numpy.float32] = measured("2-norm of the step taken", shape="(steps, layers)")
    update_ratio: NDArray[numpy.float32] = measured("step over parameter norm", shape="(steps, layers)")
