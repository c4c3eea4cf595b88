"""Barrier prediction: how high the barrier between two networks is, from what is known at the two alone.

Loss, slope and curvature along the straight line, at its two ends, give a second-order prediction and those of the
Hermite polynomials; each stands beside the measured barrier. The same for one layer moved and the others held, with
the rank correlation of predicted and measured. It describes: far from a quadratic the ends tell little.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from diag.connectivity.barrier_prediction import End, cubic, ends_of, layer_excess, quintic, second_order
from diag.connectivity.interpolation import Interpolation
from diag.connectivity.interpolation_layers import layer_barriers
from diag.display import format_number
from diag.ranges import GridPoints
from diag.registry import instrument
from diag.result import Confidence, Level, Result, Verdict, measured

SOURCE = "Singh et al. 2024, arXiv:2406.16300"
LAYER_POINTS = (0.25, 0.5, 0.75)
FEWEST_TO_RANK = 3  # layers


@dataclass(frozen=True, kw_only=True, eq=False)
class BarrierPrediction(Result):
    """The barrier on the straight line between two networks, predicted from its ends and measured."""

    barrier: float = measured("measured: the largest loss excess over the chord", unit="loss")
    second_order: float = measured("predicted from the quadratics about the two ends, blended", unit="loss")
    cubic: float = measured("predicted from the ends' losses and slopes (Hermite)", unit="loss")
    quintic: float = measured("predicted from their curvatures too (Hermite)", unit="loss")
    second_order_error: float = measured("the second-order prediction less the measured barrier", unit="loss")
    cubic_error: float = measured("the cubic prediction less the measured barrier", unit="loss")
    quintic_error: float = measured("the quintic prediction less the measured barrier", unit="loss")
    disagreement: float = measured("largest difference of two predictions: known without measuring", unit="loss")
    rank_correlation: float = measured(
        "Spearman's, over layers moved to the second network: predicted and measured barriers (NaN: under 3 layers)"
    )
    rank_correlation_back: float = measured("the same over layers moved to the first network")
    slopes: NDArray[numpy.float64] = measured("derivative of the loss along the line, at its ends", shape="(2,)")
    curvatures: NDArray[numpy.float64] = measured("second derivative there", shape="(2,)")
    layer_barriers: dict[str, float] = measured(
        "measured: one layer moved to the second network, the rest as in the first", unit="loss"
    )
    layer_predictions: dict[str, float] = measured("the same from the first network's quadratic", unit="loss")
    layer_barriers_back: dict[str, float] = measured(
        "measured: one layer moved to the first network, the rest as in the second", unit="loss"
    )
    layer_predictions_back: dict[str, float] = measured("the same from the second network's quadratic", unit="loss")
    alphas: NDArray[numpy.float64] = measured("places on the line", shape="(points,)")
    excess: NDArray[numpy.float64] = measured("measured loss excess there", unit="loss", shape="(points,)")
    predictions: dict[str, NDArray[numpy.float64]] = measured(
        "predicted loss excess there, by kind of prediction", unit="loss", shape="(points,)"
    )

    def verdict(self) -> Verdict:
        ranks = [r for r in (self.rank_correlation, self.rank_correlation_back) if not math.isnan(r)]
        by_layer = (
            f"; over {len(self.layer_barriers)} layers, predicted and measured barriers of one layer rank alike "
            f"with a correlation of {' and '.join(format_number(r) for r in ranks)}"
            if ranks
            else ""
        )
        return Verdict(
            Level.DESCRIPTION,
            f"The two networks' losses, slopes and curvatures predict a barrier of "
            f"{format_number(self.second_order)} (second order), {format_number(self.cubic)} (cubic) and "
            f"{format_number(self.quintic)} (quintic) between them, and it is {format_number(self.barrier)}"
            f"{by_layer}; the numbers only describe.",
            advice="Where the predictions differ by as much as the barrier, measure it: the ends do not tell.",
            source=SOURCE,
            confidence=Confidence.WEAK_EMPIRICAL,
            value=self.second_order,
        )

    def plot(self, ax: Any = None) -> Any:
        """The measured excess and the three predictions along the line."""
        ax.plot(self.alphas, self.excess, marker="o", markersize=3, color="black", label="measured")
        for name, values in self.predictions.items():
            ax.plot(self.alphas, values, linestyle="--", label=name)
        ax.set(xlabel="a: from the first network (0) to the second (1)", ylabel="loss over the chord")
        ax.legend(fontsize="small")


@instrument(
    source=SOURCE,
    title="Barrier prediction",
    kind="description",
    formula="max_a a (1 - a) [g_0 - g_1 + (a c_0 + (1 - a) c_1) / 2], slopes g and curvatures c along the "
    "line at its ends",
    why="Where the ends rank the layers, those that keep two networks from being averaged are known without "
    "measuring the way between.",
)
def barrier_prediction(
    interpolation: Interpolation, other: Mapping[str, Tensor], *, points: GridPoints = 21, layers: bool = True
) -> BarrierPrediction:
    """How high the loss barrier to another network is, predicted from the two ends of the line and measured.

    points: of the measured line, both ends included. layers: also by layer, one moved and the others held.

    With phi(a) the loss on the line, phi', phi'' at both ends give the blended quadratics (exact where the loss is
    quadratic) and the cubic and quintic Hermite polynomials (exact up to those degrees), each less the chord. A
    layer's prediction is the quadratic of the network that keeps the other layers. Costs `points` forward passes,
    two gradients and two curvature products, and by layer two products and two profiles of five points more. The
    paper states a theorem that was not at hand: the formulas are our own.

    Raises InvalidInput where the two do not fit, and Unsupported with BatchNorm (the statistics between the two are
    not known at the ends), in half precision, where untrained tensors differ, or where curvature cannot be
    measured.
    """
    end = interpolation.fit(other)
    first, last = ends_of(interpolation, end, layers)
    line = interpolation.profile(end, [k / (points - 1) for k in range(points)])
    a, losses = line.alphas, (float(line.losses[0]), float(line.losses[-1]))
    predictions = {
        "second order": second_order(a, first.whole, last.whole),
        "cubic": cubic(a, losses, first.whole, last.whole),
        "quintic": quintic(a, losses, first.whole, last.whole),
    }
    heights = [float(p.max()) for p in predictions.values()]
    return BarrierPrediction(
        barrier=line.barrier,
        second_order=heights[0],
        cubic=heights[1],
        quintic=heights[2],
        second_order_error=heights[0] - line.barrier,
        cubic_error=heights[1] - line.barrier,
        quintic_error=heights[2] - line.barrier,
        disagreement=_disagreement(list(predictions.values())),
        slopes=numpy.array([first.whole.slope, last.whole.slope]),
        curvatures=numpy.array([first.whole.curvature, last.whole.curvature]),
        alphas=a.numpy(),
        excess=line.brackets.numpy(),
        predictions={n: p.numpy() for n, p in predictions.items()},
        **_by_layer(interpolation, end, losses, first, last, layers),
    )


def _disagreement(predictions: Sequence[Tensor]) -> float:
    stacked = torch.stack(list(predictions))
    return float((stacked.max(0).values - stacked.min(0).values).max())


def _by_layer(
    path: Interpolation, end: Mapping[str, Tensor], losses: tuple[float, float], first: End, last: End, layers: bool
) -> dict[str, Any]:
    found = layer_barriers(path, end, alphas=LAYER_POINTS) if layers else {}
    grid = torch.tensor([0.0, *LAYER_POINTS, 1.0], dtype=torch.float64)
    names = [n for n in found if n in first.layers]
    forth = {n: float(layer_excess(grid, losses, first.layers[n], back=False).max()) for n in names}
    back = {n: float(layer_excess(grid, losses, last.layers[n], back=True).max()) for n in names}
    measured_forth = {n: found[n].from_first for n in names}
    measured_back = {n: found[n].from_second for n in names}
    return {
        "layer_barriers": measured_forth,
        "layer_predictions": forth,
        "layer_barriers_back": measured_back,
        "layer_predictions_back": back,
        "rank_correlation": _rank_correlation(forth, measured_forth),
        "rank_correlation_back": _rank_correlation(back, measured_back),
    }


def _rank_correlation(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    from scipy.stats import spearmanr

    pairs = [(a[n], b[n]) for n in a]
    if len(pairs) < FEWEST_TO_RANK or any(len({p[k] for p in pairs}) == 1 for k in (0, 1)):
        return math.nan
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)
