"""Dead units: rectified units that are zero on every example, which no gradient reaches.

A unit that is silent on the examples at hand may speak on others, and wide layers have many such; a layer of which
nearly all units are silent passes nothing on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from diag.display import format_share
from diag.errors import layers_called
from diag.instruments.causes import MAKES_STEPS_TOO_LARGE, Cause
from diag.instruments.graded import graded
from diag.instruments.network.alike import rows_differ
from diag.instruments.network.finite import all_finite
from diag.ranges import Share
from diag.registry import Kind, instrument
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.activations import Activation

SOURCE = "arithmetic of one forward pass"
SHARE_DEAD = 0.75
FEWEST_UNITS = 4
EXPLAINED_BY = (
    *MAKES_STEPS_TOO_LARGE, Cause.LEARNING_RATE_TOO_HIGH, Cause.TRAINING_DIVERGED, Cause.INPUTS_CONSTANT,
    Cause.INITIALIZATION_CONSTANT, Cause.WEIGHT_DECAY_TOO_STRONG, Cause.NOT_FINITE, Cause.LOSS_TERM_DOMINATES,
    Cause.CLASS_WEIGHTS_WRONG, Cause.UNDERFITTING, Cause.NORMALIZATION_STATISTICS_BAD,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class DeadUnits(Result):
    """Layers are the calls of a rectifier, in the order of the forward pass."""

    worst: float = measured("dead units of the layer with the most", unit="share")
    all_dead: float = measured("dead units of all layers together", unit="share")
    layers: tuple[str, ...] = measured("the modules that call a rectifier")
    dead: NDArray[numpy.float64] = measured("dead units in each", unit="share", shape="(layers,)")

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        limit = self.setting("alarm_at")
        verdict = graded(SOURCE, self.worst, limit, confidence=Confidence.ARITHMETIC)
        if self.worst < limit:
            return verdict(
                Level.OK,
                f"In the worst layer {format_share(self.worst)} of the rectified units are zero on every example.",
            )
        shares = [share for share in self.dead.tolist() if share >= limit]
        pairs = zip(self.layers, self.dead, strict=True)
        over = list(dict.fromkeys(name for name, share in pairs if share >= limit))
        return verdict(
            Level.ALARM,
            f"{_from_to(shares)} of the units of {layers_called(over)} are dead: they are zero on every "
            "one of the examples looked at, and get no gradient from them.",
            advice="Start again from a state before they died, with a lower learning rate or a warm-up; or use an "
            "activation that is not flat below zero (GELU, leaky ReLU); look at large negative biases.",
            refutation="The same units are active on other examples.",
            layers=tuple(over),
            cause=Cause.UNITS_DEAD,
            explained_by=EXPLAINED_BY,
        )

    def plot(self, ax: Any = None) -> Any:
        """The share of dead units of each layer."""
        ax.bar(range(len(self.dead)), 100 * self.dead)
        ax.set(xlabel="rectifier, in the order of the forward pass", ylabel="dead units (%)", ylim=(0, 100))


def _from_to(shares: Sequence[float]) -> str:
    """The shares of several layers: the least and the largest, where they read differently."""
    ends = dict.fromkeys(format_share(share) for share in (min(shares), max(shares)))
    return " to ".join(ends)


@instrument(
    source=SOURCE,
    title="Dead units",
    kind=Kind.CHECK,
    before_training="always",
    why="A unit that is zero on every example gets no gradient, so it stays dead: the network is smaller "
    "than it looks.",
)
def dead_units(activations: Sequence[Activation], inputs: Any = None, *, alarm_at: Share = SHARE_DEAD) -> DeadUnits:
    """Which rectified units are zero on every example, so that no gradient reaches them.

    activations: statistics of the outputs of nonlinearities (`diag.snapshot.activations`); inputs: what the model
    was given, as nothing is said where its rows are all equal. A layer is a call of ReLU, wherever it is made;
    layers of fewer than four units are left out. From a share of `alarm_at` dead units
    in one layer on it is an alarm. Raises nothing of its own.
    """
    rectified = [a for a in activations if a.function == "relu" and a.units >= FEWEST_UNITS]
    units = numpy.array([a.units for a in rectified], float)
    dead = numpy.array([a.dead for a in rectified], float)
    known = Precondition("rectifiers", bool(rectified), "the network has no rectified units.")
    return DeadUnits(
        worst=float(dead.max()) if rectified else 0.0,
        all_dead=float((dead * units).sum() / units.sum()) if rectified else 0.0,
        layers=tuple(a.name or "the ReLU in the model's own forward()" for a in rectified),
        dead=dead,
        preconditions=(known, all_finite(activations), rows_differ(inputs)),
    )
