"""Copies: layers whose units all have the same weights, so that they compute the same and stay the same.

Gradients of units that are alike are alike. A layer that starts at zero, or with one number everywhere, has in
effect one unit, and no training changes that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy
from numpy.typing import NDArray
from torch import Tensor

from diag.display import format_share
from diag.errors import named
from diag.instruments.causes import Cause
from diag.instruments.graded import graded
from diag.registry import Kind, instrument
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.history import History, parts

SOURCE = "arithmetic: units with equal weights have equal gradients"
# A layer that starts at zero on purpose (the last one, the end of a branch) has been trained by then.
STEPS_BEFORE_COPIES = 10
FEWEST_UNITS_COMPARED = 4
SAME_WEIGHTS_WITHIN = 1e-4  # of the layer's largest weight
MOST_ENTRIES_COMPARED = 1 << 22  # no more entries are compared
# One layer of copies may be an untrained branch; two, or a third of them all, is how the network began.
SHARE_OF_COPIES, FEWEST_COPIES = 1 / 3, 2


@dataclass(frozen=True, kw_only=True, eq=False)
class UnitCopies(Result):
    """Layers are weights of two or more axes; a unit is a row."""

    share: float = measured("layers all of whose units have the same weights", unit="share")
    layers: tuple[str, ...] = measured("these layers")
    compared: int = measured("layers that were compared")

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        found = f"{len(self.layers)} of {self.compared} layers"
        level = Level.UNKNOWN if self._many() else Level.OK
        return self._graded(
            level,
            f"In {found} all units have the same weights"
            + (", which a network that has not been trained may do." if level is Level.UNKNOWN else "."),
        )

    @property
    def _graded(self) -> partial[Verdict]:
        return graded(SOURCE, self.share, SHARE_OF_COPIES, confidence=Confidence.ARITHMETIC)

    def _many(self) -> bool:
        return len(self.layers) >= FEWEST_COPIES and self.share >= SHARE_OF_COPIES

    @classmethod
    def trend(cls, series: Sequence[tuple[int, Self]]) -> Verdict:
        """An alarm once training is under way and units are copies still."""
        step, last = series[-1]
        if last.unmet() is not None or step < STEPS_BEFORE_COPIES or not last._many():
            return last.verdict()
        return last._graded(
            Level.ALARM,
            f"In {len(last.layers)} of {last.compared} layers ({format_share(last.share)}) all units have the same "
            f"weights: {named(last.layers)}. They started alike, so they stay copies of one another.",
            advice="Start the weights at random (torch.nn.init.kaiming_normal_); zeros are for biases only.",
            refutation="Two units of such a layer that differ.",
            layers=last.layers,
            cause=Cause.INITIALIZATION_CONSTANT,
            explained_by=(
                Cause.WEIGHT_DECAY_TOO_STRONG,
                Cause.NOT_FINITE,
                Cause.GRAPH_CUT,
                Cause.MODULE_UNUSED,
                Cause.GRADIENT_ABSENT,
            ),
            step=1,
        )

    def plot(self, ax: Any = None) -> Any:
        """How many layers consist of copies."""
        ax.bar(["copies", "others"], [len(self.layers), self.compared - len(self.layers)])
        ax.set(xlabel="layers", ylabel="number")


@instrument(
    source=SOURCE,
    title="Copies of units",
    kind=Kind.CHECK,
    before_training="always",
    why="Units with the same weights get the same gradients and stay the same: a layer of a hundred copies "
    "is a layer of one.",
)
def unit_copies(params: Mapping[str, Tensor], history: History | None = None) -> UnitCopies:
    """Whether the units of whole layers have the same weights.

    params: the parameters by name. history: the record of a watched run, for which weights have been trained at
    all: the ends of branches start at zero on purpose, and where no step is taken they stay so for another reason.
    Compared are weights of two or more axes with at least four rows, up to 1e-4 of the largest entry; of very
    large ones the first rows. An alarm where at step 10 or later at least two layers, and a third of all, consist
    of copies. Raises nothing of its own.
    """
    weights = {
        n: p for n, p in params.items() if p.ndim >= 2 and len(p) >= FEWEST_UNITS_COMPARED and p.numel() > len(p)
    }
    copies = tuple(name for name, weight in weights.items() if _all_alike(weight))
    if history is not None:
        untrained = _untrained(history)
        copies = tuple(name for name in copies if name not in untrained)
    finite = all(bool(p.isfinite().all()) for p in weights.values())
    return UnitCopies(
        share=len(copies) / max(len(weights), 1),
        layers=copies,
        compared=len(weights),
        preconditions=(
            Precondition(
                "layers", len(weights) >= FEWEST_COPIES, "the network has fewer than two layers of several units."
            ),
            Precondition("finite weights", finite, "some weights are not finite."),
        ),
    )


def _untrained(history: History) -> set[str]:
    """Parameters that no step has moved for a reason other than a gradient of zero: all steps were left out,
    nothing moved in any that was measured, or theirs is not zero and they stood still."""
    if len(history) and history.skipped.all():
        return set(history.layers)
    seen = _any(numpy.isfinite(p.update_norm) for p in parts(history))
    moved = _any(numpy.nan_to_num(p.update_norm) > 0 for p in parts(history))
    pushed = _any(numpy.nan_to_num(p.gradient_norm) > 0 for p in parts(history))
    # What no optimizer holds is not measured, while others are.
    still = ~moved & (pushed | ~moved.any() | ~seen) & seen.any()
    return {name for name, stood in zip(history.layers, still, strict=True) if stood}


def _any(tables: Iterable[NDArray[numpy.bool_]]) -> NDArray[numpy.bool_]:
    """Which columns hold True in any row of any table."""
    return numpy.asarray(numpy.logical_or.reduce([table.any(0) for table in tables]), bool)


def _all_alike(weight: Tensor) -> bool:
    rows = weight.detach().flatten(1)
    rows = rows[: max(FEWEST_UNITS_COMPARED, MOST_ENTRIES_COMPARED // rows.shape[1])]
    # Rounding parts units that are alike, as a product of matrices treats its rows differently.
    near = SAME_WEIGHTS_WITHIN * rows.abs().max()
    first = rows[:, : min(rows.shape[1], 8)]  # most weights differ in their first entries
    return bool(((first - first[:1]).abs() <= near).all()) and bool(((rows - rows[:1]).abs() <= near).all())
