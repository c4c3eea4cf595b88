"""Gradient flow: what reaches each layer at each step, what moves, and whether every number was finite.

It needs nothing but the record of a watched run: norms of the gradient (before clipping), of the parameters and
of the steps taken, the distance from the start, and which losses and gradients were not finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from diag.display import format_number, format_share
from diag.errors import counted, named, of_the_steps
from diag.instruments.causes import Cause
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
from diag.result import OUR_CHOICE, Confidence, Level, Result, Verdict, measured
from diag.snapshot.history import History, by_rows, parts, taken

SOURCE = (
    "arithmetic for what is not finite; Hoffer, Hubara, Soudry 2017, arXiv:1705.08741, for the distance; Roberts, "
    "Yaida, Hanin 2022, arXiv:2106.10165, for the depth"
)
DEPTH_FACTOR = 100.0
SKIPPED_SHARE = 0.05
HALVINGS = 16  # by which a GradScaler's first scale, 2^16, comes down to one: so it is found
LEFT = 5.0  # times the first loss
STEPS_SHOWN = 96
STEPS_NAMED = 100
LAYERS_NAMED = 16
SEEN_SHARE = 0.95  # of the steps (our choice), from which on what was seen speaks for all
LONGEST_GAP = 0.2  # of the steps (our choice): gradients read at some steps speak for all, if never longer apart
STEPS_BEFORE_ZERO_GRADIENT = 10  # steps; what starts at zero on purpose gets its gradient after the first ones


@dataclass(frozen=True, kw_only=True, eq=False)
class GradientFlow(Result):
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

    def verdict(self) -> Verdict:
        return next(v for v in self._verdicts() if v is not None)

    def _verdicts(self) -> Iterator[Verdict | None]:
        """Worst first: arithmetic before theory, and a description at the end."""
        yield self._non_finite()
        yield self._unseen()
        yield self._idle()
        yield self._many_skipped()
        yield self._vanishing()
        left = self.loss_growth > LEFT  # whether training went well is not judged here, and is not to seem so
        whole = self._is_seen(self.losses_seen) and self._gradients_speak_for_all() and not self.unseen_layers
        yield Verdict(
            (Level.DESCRIPTION if left else Level.OK) if whole else Level.UNKNOWN,
            f"{self._finite()}{self._skips()}{self._growth()}.",
            source=SOURCE,
            confidence=Confidence.ARITHMETIC,
            value=0.0,
            threshold=0.0,
        )

    def _non_finite(self) -> Verdict | None:
        if not self.non_finite_losses and not self.non_finite_applied:
            return None
        found = []
        if self.non_finite_losses:
            found.append(f"the loss was not finite at {_steps(self.non_finite_losses, self.loss_steps)}")
        if self.non_finite_applied:
            found.append(
                f"gradients were not finite at {_steps(self.non_finite_gradients, self.gradient_steps)}, and the "
                f"optimizer took {self.non_finite_applied:,} of these steps"
            )
        text = " and ".join(found)
        return Verdict(
            Level.ALARM,
            f"{text[0].upper()}{text[1:]} (of {self.num_steps:,} recorded).",
            advice="Look at the batch of the first such step; then lower the learning rate, warm it up, or clip "
            "the gradient; under float16 use a GradScaler.",
            source="arithmetic",
            confidence=Confidence.ARITHMETIC,
            refutation="Compute the loss of that batch again in float64 from the state before the step: if it is "
            "finite, the precision is to blame, not the batch.",
            value=float(self.non_finite_losses + self.non_finite_applied),
            threshold=0.0,
            threshold_source="any step at all",
            layers=self.gradient_layers[:5],
            cause=Cause.NOT_FINITE,
            explained_by=(Cause.NOT_FINITE, Cause.DATA_NOT_FINITE, Cause.GRADIENT_UNDERFLOW),
            step=self.loss_steps[0] if self.loss_steps else None,
        )

    def _idle(self) -> Verdict | None:
        if not self.idle_layers or self.gradients_seen < STEPS_BEFORE_ZERO_GRADIENT:
            return None
        return Verdict(
            Level.WARNING,
            f"The gradient of {len(self.idle_layers):,} of {len(self.layers):,} parameter tensors was exactly zero "
            f"{self._span(self.gradients_seen)}: {named(self.idle_layers)}.",
            advice="Check that these layers take part in the loss: dead ReLUs, a zero factor in front of a branch, "
            "or labels that mask it leave a layer without a gradient.",
            source="arithmetic",
            confidence=Confidence.ARITHMETIC,
            refutation="A single step on other data with a gradient other than zero in these tensors.",
            value=float(len(self.idle_layers)),
            threshold=0.0,
            threshold_source="any tensor at all",
            layers=self.idle_layers,
            explained_by=(
                Cause.GRADIENT_UNDERFLOW,
                Cause.UNITS_DEAD,
                Cause.GRAPH_CUT,
                Cause.INITIALIZATION_CONSTANT,
                Cause.OUTPUT_CONSTANT,
                Cause.INPUTS_CONSTANT,
                Cause.PARAMETER_IN_NO_OPTIMIZER,
                Cause.LEARNING_RATE_ZERO,
                Cause.GRADIENTS_ZEROED_BEFORE_STEP,
            ),
        )

    def _many_skipped(self) -> Verdict | None:
        limit = self.setting("skipped_share")
        share = self.skipped_steps / max(self.num_steps, 1)
        if share <= limit or self.skipped_steps <= HALVINGS:
            return None
        return Verdict(
            Level.WARNING,
            f"The GradScaler left out {format_share(share)} of the steps ({self.skipped_steps:,} of "
            f"{self.num_steps:,}), first at step {self.skipped_step_numbers[0]:,}.",
            advice="A few skips are how the scale is found; so many say that gradients overflow float16 again and "
            "again: use bfloat16, or look for the layer whose gradient is not finite.",
            source="torch.amp.GradScaler",
            confidence=Confidence.ARITHMETIC,
            refutation="A run in bfloat16 or float32 whose gradients are as large.",
            value=share,
            threshold=limit,
            threshold_source=OUR_CHOICE,
            layers=self.gradient_layers[:5],
            explained_by=(
                Cause.SCALER_SKIPS_FOREVER,
                Cause.NOT_FINITE,
                Cause.DATA_NOT_FINITE,
                Cause.INPUTS_NOT_NORMALIZED,
                Cause.TARGETS_NOT_NORMALIZED,
            ),
        )

    def _vanishing(self) -> Verdict | None:
        limit = self.setting("depth_factor")
        strays = self.depth_factor < 1 / limit or self.depth_factor > limit
        if not (self.plain_network and strays):
            return None
        word = "vanishes" if self.depth_factor < 1 else "explodes"
        return Verdict(
            Level.ALARM,
            f"The gradient {word} over the depth at initialisation: by a factor of "
            f"{format_number(self.depth_factor)} from the last layer's bias to the first's.",
            advice="Scale the initial weights for the activation (variance 2 / fan-in for ReLU, 1 / fan-in for "
            "tanh), or add normalisation or skip connections.",
            source="Roberts, Yaida, Hanin 2022, arXiv:2106.10165",
            confidence=Confidence.STRONG_EMPIRICAL,
            refutation="The factor over several seeds: in a narrow, deep network a single draw fluctuates.",
            value=self.depth_factor,
            threshold=limit,
            threshold_source=OUR_CHOICE,
        )

    def _unseen(self) -> Verdict | None:
        """No gradient at all, or weights that never moved: that nothing was infinite then says nothing."""
        if self.num_steps < STEPS_BEFORE_ZERO_GRADIENT or (self.gradients_seen and not self.still):
            return None
        nothing = not self.gradients_seen
        if nothing and not self.layers:
            return Verdict(
                Level.UNKNOWN,
                "The record has no layers, as that of a log has none, so nothing is known of their gradients.",
                source="arithmetic",
                confidence=Confidence.ARITHMETIC,
            )
        found = "No gradient was seen" if nothing else "No weight moved"
        return Verdict(
            Level.UNKNOWN if nothing else Level.WARNING,
            f"{found} at any of the {self.num_steps:,} steps recorded.",
            advice="Call backward() on the loss itself, zero gradients before it and not between it and the step, "
            "and look at the learning rate and at the run's notes.",
            source="arithmetic",
            confidence=Confidence.ARITHMETIC,
            refutation="A gradient at a step of the optimizer, and a weight that is another after it.",
            explained_by=(Cause.GRAPH_CUT, Cause.GRADIENTS_ZEROED_BEFORE_STEP, Cause.LEARNING_RATE_ZERO,
                          Cause.WEIGHTS_UNCHANGED, Cause.UNITS_DEAD, Cause.OUTPUT_CONSTANT,
                          Cause.SCALER_SKIPS_FOREVER, Cause.GRADIENT_UNDERFLOW, Cause.STEP_BEFORE_BACKWARD),
        )  # fmt: skip

    def _is_seen(self, steps: int) -> bool:
        """Whether what was seen at so many steps speaks for all."""
        return steps >= SEEN_SHARE * self.num_steps

    def _gradients_speak_for_all(self) -> bool:
        """Whether they were seen at nearly all steps, or all through the run: a gradient in between that was not
        finite, and was applied, would have made the losses after it so."""
        return self._is_seen(self.gradients_seen) or self.longest_unread <= LONGEST_GAP * self.num_steps

    def _finite(self) -> str:
        """What was finite: only what was seen."""
        if not self.gradients_seen and not self.losses_seen:
            return f"No loss and no gradient was seen at any of the {self.num_steps:,} steps recorded"
        seen = self.losses_seen, self.gradients_seen
        if seen == (self.num_steps, self.num_steps):
            found = f"Losses and gradients were finite {self._span(self.num_steps)}"
        elif seen[0] == self.num_steps and self._gradients_speak_for_all():
            found = (
                f"Losses were finite {self._span(seen[0])}, and gradients at the {seen[1]:,} of them at which they "
                "were read"
            )
        else:
            found = (
                f"Of {self.num_steps:,} steps recorded, losses at {seen[0]:,} and gradients at {seen[1]:,} were "
                "seen, and these were finite"
            )
        if not self.unseen_layers or not self.gradients_seen:
            return found
        return (
            f"{found}; {len(self.unseen_layers):,} of the {len(self.layers):,} parameter tensors had no gradient "
            f"at any step ({named(self.unseen_layers)})"
        )

    def _span(self, seen: int) -> str:
        if len(self.steps) <= 1:
            return "at the one state measured"
        return f"at {of_the_steps(seen, seen, self.num_steps)}"

    def _skips(self) -> str:
        if not self.skipped_steps:
            return ""
        return f" or were skipped by the GradScaler ({self.skipped_steps:,} steps, as it finds its scale)"

    def _growth(self) -> str:
        if not self.last_fitted_step:
            return ""
        log, sqrt = self.r2_by_law["log"], self.r2_by_law["sqrt"]
        word = "better" if log > sqrt else "worse"
        return (
            f"; over steps {self.first_fitted_step:,} to {self.last_fitted_step:,} the logarithmic law fits the "
            f"distance from the start {word} than sqrt (R^2 {log:.3f} and {sqrt:.3f})"
        )

    def plot(self, ax: Any = None) -> None:
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


def _steps(count: int, numbers: Sequence[int]) -> str:
    listed = ", ".join(f"{n:,}" for n in numbers[:3]) + (", ..." if count > 3 else "")
    return f"{counted(count, 'step')} ({listed})"


def _edges(steps: NDArray[numpy.int64]) -> NDArray[numpy.float64]:
    middle = (steps[1:] + steps[:-1]) / 2
    return numpy.concatenate([[2 * steps[0] - middle[0]], middle, [2 * steps[-1] - middle[-1]]])
