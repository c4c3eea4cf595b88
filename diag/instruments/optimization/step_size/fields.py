"""What the check of the step size has measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from diag.display import format_share
from diag.result import Result, measured

SOURCE = "arithmetic of the recorded steps"
ADAPTIVE_OPTIMIZERS = ("Adam", "AdamW", "NAdam", "RAdam", "Adamax")
MEASUREMENTS_IN_A_ROW = 5
ENOUGH_STEPS = 30
ROSE = 1.1  # times the first loss


@dataclass(frozen=True, kw_only=True, eq=False)
class MeasuredSteps(Result):
    """Ratios are medians over the large tensors; NaN: not observed."""

    largest_ratio: float = measured("step over weights: the largest median of five consecutive measurements")
    largest_at: int = measured("the step at which these five measurements ended", remark="0 where there are fewer")
    began_at: int = measured("the first that was too high of the first five whose median was", remark="0: none")
    ratio: float = measured("step over weights: the median while the learning rate was above half of its largest")
    tensors: int = measured("tensors with at least 64 entries that moved")
    num_steps: int = measured("steps recorded", unit="steps")
    loss_fall: float = measured("fall of the loss from the first tenth of the steps to the last", unit="share")
    loss_peak_ratio: float = measured(
        "the largest recorded loss over the first one", remark="NaN where the first is not positive"
    )
    now: float = measured("the median of the last losses over the first one", default=math.nan)
    lost: bool = measured("the last losses were not finite", default=False)
    below_zero: bool = measured("some losses are negative, so that a share says nothing", default=False)
    loss_fell: bool = measured(
        "the loss of the last third of the steps is below that of the first, beyond noise", default=True
    )
    clip_factor: float = measured("norm of the applied over that of the true gradient, the median", unit="share")
    gradient_size: float = measured("root mean square of the gradient's entries, the median tensor and step")
    adam_share: float = measured("size of Adam's step per entry over the learning rate, the median", unit="share")
    loss_rose: bool = measured("the loss of these steps, or of the five after them, was well above the first one")
    shrunk: bool = measured("the weights had less than half of their first norm then: decay or a penalty took it")
    growth: float = measured("norm of a typical layer's weights at the end over the first one", default=math.nan)
    from_nothing: bool = measured("a typical layer of weights began next to zero, or all alike")
    unpushed: bool = measured("the gradient of a typical tensor was zero at a typical step")
    travelled: float = measured(
        "distance from the start at the end, over the norm: the median tensor", default=math.nan
    )
    straightness: float = measured(
        "that distance over the length of the way there, the median tensor", default=math.nan
    )
    from_scratch: bool = measured("training has ended, and had begun with weights as drawn", default=False)
    over: bool = measured("training has ended", default=False)
    rate: float = measured("the largest learning rate", default=math.nan)
    first_loss: float = measured("the first loss", default=math.nan)
    optimizer: str = measured("the optimizer's kind")
    epsilon: float = measured("Adam's epsilon")
    peak_then: float = measured(
        "the largest loss over the first one, when the largest ratio was first seen", default=math.nan
    )
    slow_layers: tuple[str, ...] = measured(
        "of several sides with losses of their own, what the one holds whose steps are next to nothing", default=()
    )
    slow_ratio: float = measured("step over weights of that side, the median", default=math.nan)
    slow_other: float = measured("the same of the fastest side", default=math.nan)
    slow_farthest: float = measured("how far its steps can move a layer, over its size", default=math.nan)
    steps: NDArray[numpy.int64] = measured("the steps measured", shape="(steps,)")
    ratios: NDArray[numpy.float64] = measured("the median ratio at each", shape="(steps,)")

    @property
    def fallen(self) -> str:
        """What the loss has done, in words that hold for one below zero, or one that is not known, too."""
        if self.below_zero:
            return "fallen" if self.loss_fell else "not fallen by more than it scatters"
        known = math.isfinite(self.loss_fall)
        return f"fallen by {format_share(max(self.loss_fall, 0.0))}" if known else "a course that is not known"
