"""Loss and error on the line between two networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray
from torch import Tensor

from diag.result import Result, measured


@dataclass(frozen=True, kw_only=True, eq=False)
class MeasuredLine(Result):
    """Loss and error on the line between two networks, and after alignment where it was asked for."""

    barrier: float = measured("largest loss excess over the chord between the ends", unit="loss")
    error_barrier: float = measured("largest error excess over the chord", unit="share")
    error_instability: float = measured("largest error minus the mean error of the ends", unit="share")
    deciding_error_barrier: float = measured(
        "the error barrier of the verdict: after alignment where there is one, held-out where there is such data",
        unit="share",
    )
    deciding_standard_error: float = measured("its standard error, paired over examples", unit="share")
    barrier_standard_error: float = measured("standard error of the barrier, paired over examples", unit="loss")
    barrier_at: float = measured("where on the line the loss barrier is")
    lowest_excess: float = measured("smallest loss excess over the chord: below 0 the line is better", unit="loss")
    mean_baseline_barrier: float = measured("largest loss minus the mean loss of the ends", unit="loss")
    midpoint_excess: float = measured("loss excess over the chord at a = 1/2", unit="loss")
    held_out_barrier: float = measured("the barrier in loss on held-out data", unit="loss")
    held_out_error_barrier: float = measured("the barrier in error on held-out data", unit="share")
    held_out_error_instability: float = measured("the error instability on held-out data", unit="share")
    aligned_barrier: float = measured("the barrier in loss after alignment", unit="loss")
    aligned_error_barrier: float = measured("the barrier in error after alignment", unit="share")
    aligned_error_instability: float = measured("the error instability after alignment", unit="share")
    aligned_held_out_barrier: float = measured("the barrier in loss after alignment, held-out", unit="loss")
    aligned_held_out_error_barrier: float = measured("the barrier in error after alignment, held-out", unit="share")
    repaired_barrier: float = measured("the barrier in loss after REPAIR", unit="loss")
    repaired_error_barrier: float = measured("the barrier in error after REPAIR", unit="share")
    curve_barrier: float = measured("the barrier in loss along the trained Bezier curve", unit="loss")
    curve_error_barrier: float = measured("the barrier in error along the trained Bezier curve", unit="share")
    units_moved: float = measured("units that alignment moved", unit="share")
    alignment_passes: float = measured("passes over all groups until no unit moved")
    function_change: float = measured("largest relative change of the second network's outputs by alignment")
    distance: float = measured("Euclidean distance between the two networks' weights")
    aligned_distance: float = measured("the same after alignment")
    angle: float = measured("angle between the two networks as seen from their common ancestor", unit="degrees")
    reset_shift: float = measured(
        "largest change of an end's own loss by measuring BatchNorm statistics again", unit="loss"
    )
    own_losses: NDArray[numpy.float64] = measured(
        "losses of the two networks as they are, before BatchNorm statistics are measured again",
        unit="loss",
        shape="(2,)",
    )
    variance_ratios: dict[str, float] = measured(
        "by layer, standard deviation at a = 1/2 over what the ends promise"
    )
    layer_barriers: dict[str, float] = measured("one layer moved to the second network, the rest as in the first")
    layer_barriers_back: dict[str, float] = measured(
        "one layer moved to the first network, the rest as in the second"
    )
    alphas: NDArray[numpy.float64] = measured(
        "places on the line from the first network to the second", shape="(points,)"
    )
    losses: NDArray[numpy.float64] = measured("mean loss there", unit="loss", shape="(points,)")
    errors: NDArray[numpy.float64] = measured("share of wrong answers there", unit="share", shape="(points,)")
    excess: NDArray[numpy.float64] = measured("loss excess over the chord there", unit="loss", shape="(points,)")
    excess_standard_errors: NDArray[numpy.float64] = measured(
        "its paired standard errors", unit="loss", shape="(points,)"
    )
    curves: dict[str, NDArray[numpy.float64]] = measured(
        'by curve ("held-out", "aligned", ...): rows a, loss, error', shape="(3, points)"
    )
    chance_error: float = measured("error of always giving the most frequent answer", unit="share")
    norm_stats: str = measured("how BatchNorm statistics followed the line")
    align: str = measured("what the second network was aligned by")
    aligned_state: Mapping[str, Tensor] | None = measured(
        "the second network's state dict after alignment", record=False, default=None
    )
