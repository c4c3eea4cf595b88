"""Gradient flow: what reaches each layer at each step, what moves, and whether every number was finite.

It needs nothing but the record of a watched run: norms of the gradient (before clipping), of the parameters and
of the steps taken, the distance from the start, and which losses and gradients were not finite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from diag.instruments.gradient_flow.fields import RecordedFlow
from diag.instruments.gradient_flow.judging import SOURCE, STEPS_BEFORE_ZERO_GRADIENT, verdicts_on_flow
from diag.instruments.gradient_flow.statistics import (
    factor_over_depth,
    growth_of_distance,
    idle_layers,
    most_often,
    never_moved,
    norm_at_start,
    normalisation_layers,
    unseen_layers,
)
from diag.linalg.growth import LAWS
from diag.ranges import Share, Times
from diag.registry import instrument
from diag.result import Verdict
from diag.snapshot.history import History, by_rows, parts, taken

DEPTH_FACTOR = 100.0
SKIPPED_SHARE = 0.05
STEPS_SHOWN = 96
STEPS_NAMED = 100
LAYERS_NAMED = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class GradientFlow(RecordedFlow):
    """What reaches each layer, and whether every number was finite."""

    def verdict(self) -> Verdict:
        return next(v for v in verdicts_on_flow(self) if v is not None)

    def plot(self, ax: Any = None) -> Any:
        """The gradient norm of every parameter tensor over the steps, or over the depth where there is one step."""
        if len(self.steps) == 1:
            ax.semilogy(self.gradient_norm[0], marker="o", markersize=3)
            ax.set(xlabel="parameter tensor, in the model's order", ylabel="gradient norm")
            return
        with numpy.errstate(divide="ignore", invalid="ignore"):
            image = numpy.log10(self.gradient_norm.T.astype(float))
        image[~numpy.isfinite(image)] = numpy.nan
        mesh = ax.pcolormesh(_edges(self.steps), numpy.arange(len(self.layers) + 1), image, rasterized=True)
        ax.figure.colorbar(mesh, ax=ax, label="log10 of the gradient norm")
        ax.set(xlabel="step", ylabel="parameter tensor, in the model's order")
        if len(self.layers) <= LAYERS_NAMED:
            ax.set_yticks(numpy.arange(len(self.layers)) + 0.5, self.layers, fontsize=7)
        ax.invert_yaxis()

    @classmethod
    def plot_trend(cls, ax: Any, series: Sequence[tuple[int, Any]]) -> None:
        """The record has its own course, so the last result shows all."""
        series[-1][1].plot(ax)


@instrument(
    source=SOURCE,
    title="Gradient flow",
    before_training="always",
    why="A layer that no gradient reaches, or that does not move, does not learn; a loss or gradient that "
    "is not finite ends the training.",
    formula="|dL/dW_l|, |W_l(t + 1) - W_l(t)|, |W_l(t) - W_l(0)| of every layer l at every step t",
)
def gradient_flow(
    history: History,
    *,
    plain_network: bool = False,
    depth_factor: Times = DEPTH_FACTOR,
    skipped_share: Share = SKIPPED_SHARE,
) -> GradientFlow:
    """What reaches each layer at each step, what moves, and whether every loss and gradient was finite.

    history: the record of a watched run with T steps and L parameter tensors (`diag.snapshot.history`); norms
    are 2-norms without unit, those of the gradients before clipping. Distances are over all weights but those of
    normalisation layers. Steps are optimizer steps, from 1.

    The three laws of growth of the distance (logarithmic, square root, power) are fitted to log-spaced steps from
    10 on, over the longest stretch of one learning rate, and only where it spans two decades. They describe;
    weight decay, Adam and normalisation break their interpretation.

    Settings: `plain_network=True` says that the network is a plain stack of layers, without normalisation or skip
    connections, recorded from its initialisation: only then is a gradient that changes by more than
    `depth_factor` over the depth (in the order of named_parameters()) called vanishing or exploding. It is read
    off the biases: in a ReLU network without them <W, dL/dW> is the same for every layer, so the weights'
    gradients cannot show. `skipped_share`: from here on skipped steps are a warning, where there are more
    than the sixteen in which a scale of 2^16 comes down to one (our choice, uncalibrated).

    Raises InvalidInput for settings it does not know. Sources: arithmetic; Hoffer, Hubara, Soudry 2017,
    arXiv:1705.08741 (distance); Roberts, Yaida, Hanin 2022, arXiv:2106.10165 (depth).
    """
    bad_loss = numpy.asarray(~history.loss_finite | numpy.isinf(history.loss))
    bad_gradient = by_rows(history, lambda part: _broken(part).any(1))
    seen_gradient = by_rows(history, lambda part: _seen(part).any(1))
    return GradientFlow(
        non_finite_losses=int(bad_loss.sum()),
        non_finite_gradients=int(bad_gradient.sum()),
        non_finite_applied=int((bad_gradient & ~history.skipped).sum()),
        skipped_steps=int(history.skipped.sum()),
        num_steps=len(history),
        depth_factor=factor_over_depth(history),
        plain_network=plain_network,
        loss_steps=_numbers(history, bad_loss),
        gradient_steps=_numbers(history, bad_gradient),
        skipped_step_numbers=_numbers(history, history.skipped),
        gradient_layers=most_often(history, numpy.sum([_broken(part).sum(0) for part in parts(history)], 0)),
        idle_layers=idle_layers(history),
        loss_growth=_growth_of_the_loss(history),
        losses_seen=int((~numpy.isnan(history.loss) | ~history.loss_finite).sum()),
        gradients_seen=int(seen_gradient.sum()),
        longest_unread=_longest_gap(seen_gradient),
        unseen_layers=unseen_layers(history),
        still=never_moved(history, STEPS_BEFORE_ZERO_GRADIENT),
        layers=history.layers,
        notes=history.notes,
        **_of_the_distance(history),
    )


def _growth_of_the_loss(history: History) -> float:
    losses = history.loss[numpy.isfinite(history.loss)]
    return float(numpy.median(losses[-5:]) / losses[0]) if len(losses) and losses[0] > 0 else math.nan


def _of_the_distance(history: History) -> dict[str, Any]:
    """The distance from the start: its growth, and the norms at the steps that are shown."""
    weights = ~normalisation_layers(history)
    distance = by_rows(history, lambda h: numpy.sqrt((h.distance[:, weights].astype(float) ** 2).sum(1)))
    fits, first, last = growth_of_distance(history, distance)
    known = distance[numpy.isfinite(distance)]
    start = norm_at_start(history, weights)
    rows = _rows_shown(history, distance)
    drawn = taken(history, rows)
    with numpy.errstate(divide="ignore", invalid="ignore"):
        ratio = drawn.update_norm / drawn.parameter_norm
    return {
        "growth_slope": fits["log"].slope if fits else math.nan,
        "growth_exponent": fits["power"].slope if fits else math.nan,
        "r2_by_law": {law: fits[law].r2 if fits else math.nan for law in LAWS},
        "aic_by_law": {law: fits[law].aic if fits else math.nan for law in LAWS},
        "first_fitted_step": first,
        "last_fitted_step": last,
        "relative_distance": float(known[-1] / start) if len(known) and start > 0 else math.nan,
        "steps": drawn.steps,
        "distance": distance[rows],
        "gradient_norm": drawn.gradient_norm,
        "parameter_norm": drawn.parameter_norm,
        "update_norm": drawn.update_norm,
        "update_ratio": ratio,
    }


def _broken(history: History) -> NDArray[numpy.bool_]:
    """Which gradients were not finite: (steps, layers)."""
    return numpy.asarray(~history.gradient_finite | numpy.isinf(history.gradient_norm))


def _seen(history: History) -> NDArray[numpy.bool_]:
    """Which gradients were seen: (steps, layers)."""
    return numpy.asarray(~numpy.isnan(history.gradient_norm) | ~history.gradient_finite)


def _longest_gap(seen: NDArray[numpy.bool_]) -> int:
    """The most rows in a row, at the ends too, that were not seen."""
    at = numpy.concatenate([[-1], numpy.flatnonzero(seen), [len(seen)]])
    return int(numpy.diff(at).max() - 1)


def _rows_shown(history: History, distance: NDArray[numpy.float64]) -> NDArray[numpy.int64]:
    """Evenly spaced rows, among those whose parameters were observed where there are some."""
    observed = numpy.flatnonzero(numpy.isfinite(distance))
    rows = observed if len(observed) > 1 else numpy.arange(len(history))
    drawn = numpy.unique(numpy.linspace(0, len(rows) - 1, STEPS_SHOWN).round().astype(int))
    return numpy.asarray(rows[drawn])


def _numbers(history: History, which: Any) -> tuple[int, ...]:
    return tuple(int(step) for step in history.steps[numpy.flatnonzero(which)[:STEPS_NAMED]])


def _edges(steps: NDArray[numpy.int64]) -> NDArray[numpy.float64]:
    middle = (steps[1:] + steps[:-1]) / 2
    return numpy.concatenate([[2 * steps[0] - middle[0]], middle, [2 * steps[-1] - middle[-1]]])
