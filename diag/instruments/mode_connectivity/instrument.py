"""Mode connectivity: is there a barrier in loss and error on the straight line between two networks?

For theta_a = (1-a) theta_0 + a theta_1 the barrier is the largest excess of the loss over the chord between the
two ends. Two networks that differ only in the order of their units have a large one, so the second can first be
aligned to the first (`align=`). What is left afterwards does not show that the two are different: matching is a
local search, and permutations are not all symmetries (scaling a ReLU layer and its successor is one that leaves
a barrier which no permutation removes: `beyond_permutations=` matches over these too).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy
from numpy.typing import NDArray
from torch import Tensor

from diag.connectivity.connection import ALIGN, Connection, measure_connection
from diag.connectivity.interpolation import Interpolation
from diag.display import format_share
from diag.errors import InvalidInput
from diag.instruments.mode_connectivity.fields import MeasuredLine
from diag.instruments.mode_connectivity.judging import FRANKLE, verdict_on_line
from diag.ranges import Count, GridPoints, Positive, Threshold, WholeNumber
from diag.registry import instrument
from diag.result import Precondition, Verdict

CONNECTED_BELOW = 0.02  # Frankle et al.'s line for the error instability
SEPARATED_ABOVE = 0.1
CURVES = {
    "held_out": "held-out", "aligned": "aligned", "aligned_held_out": "aligned, held-out", "repaired": "repaired",
    "curve": "Bezier curve",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class ModeConnectivity(MeasuredLine):
    """Is there a barrier between two networks?"""

    def verdict(self) -> Verdict:
        return verdict_on_line(self)

    def plot(self, ax: Any = None) -> Any:
        ax.plot(self.alphas, self.losses, marker="o", markersize=3, label="as they are")
        for name, (alphas, losses, _) in self.curves.items():
            ax.plot(alphas, losses, marker=".", markersize=3, label=name)
        ax.plot(
            self.alphas[[0, -1]], self.losses[[0, -1]], color="grey", linewidth=0.8, linestyle=":", label="chord"
        )
        ax.set(xlabel="a: from the first network (0) to the second (1)", ylabel="loss")
        ax.legend(fontsize="small")

    @classmethod
    def plot_trend(cls, ax: Any, series: Sequence[tuple[int, Self]]) -> None:
        steps = [step for step, _ in series]
        ax.plot(
            steps, [r.deciding_error_barrier for _, r in series], marker="o", markersize=3, label="error barrier"
        )
        ax.axhline(CONNECTED_BELOW, color="grey", linestyle=":", label="connected below")
        ax.set(xlabel="step", ylabel="error barrier (share)")
        ax.legend(fontsize="small")


@instrument(
    source=FRANKLE,
    why="Where the loss stays low between two networks, the mean of their weights is a network as good as "
    "they are, sometimes a better one; where it rises, the mean is useless.",
    formula="barrier = max_a [L((1 - a) A + a B) - (1 - a) L(A) - a L(B)], 0 <= a <= 1",
)
def mode_connectivity(
    interpolation: Interpolation,
    other: Mapping[str, Tensor],
    ancestor: Mapping[str, Tensor] | None = None,
    *,
    points: GridPoints = 11,
    refine: WholeNumber = 2,
    align: str | None = None,
    norm_stats: str = "reset",
    repair: bool = False,
    layers: bool = False,
    path: str = "line",
    bezier_steps: WholeNumber = 200,
    bezier_learning_rate: Positive = 1e-3,
    orders: Count | None = None,
    beyond_permutations: bool = False,
    connected_below: Threshold = CONNECTED_BELOW,
    separated_above: Threshold = SEPARATED_ABOVE,
) -> ModeConnectivity:
    """Whether the loss rises between two networks: where it does not, their weights can be averaged.

    Measured on the straight line from the snapshot's network to the other one. points: of the grid, with both
    ends; refine: rounds of bisection around the maximum. align: "weights" or "activations" to match the second
    network's units first; orders: of visiting the groups in weight matching; beyond_permutations: also signs,
    scales, rotations and invertible maps, where the model has such symmetries. norm_stats:
    BatchNorm statistics measured again at each point ("reset"), interpolated ("lerp": a negative control, it gives
    no verdict) or the first network's ("keep"). repair: also with REPAIR. layers: also by layer. path="bezier":
    also along a curve trained for bezier_steps. connected_below, separated_above: error barriers at which the
    verdict's word changes.

    The cost is one forward pass a point, and one more with "reset" where there is BatchNorm. Both networks stay
    as they are. Raises InvalidInput where the two do not fit (naming the first difference) or a setting is out
    of range, and Unsupported where a model cannot be traced for alignment or has nothing to repair.
    """
    _check(align, path)
    found = measure_connection(
        interpolation,
        interpolation.fit(other),
        points=points,
        refine=refine,
        align=align,
        norm_stats=norm_stats,
        repair=repair,
        layers=layers,
        bezier_steps=bezier_steps if path == "bezier" else 0,
        bezier_learning_rate=bezier_learning_rate,
        orders=orders,
        beyond_permutations=beyond_permutations,
        ancestor=ancestor,
    )
    return _result(found, interpolation, norm_stats, align)


def _check(align: str | None, path: str) -> None:
    if align not in (None, *ALIGN):
        raise InvalidInput(f"align is {align!r}; expected None, {' or '.join(map(repr, ALIGN))}.")
    if path not in ("line", "bezier"):
        raise InvalidInput(f"path is {path!r}; expected 'line' or 'bezier'.")


def _result(found: Connection, path: Interpolation, norm_stats: str, align: str | None) -> ModeConnectivity:
    line, line_used = found.line, found.aligned or found.line
    ends = (found.aligned_held_out, found.aligned, found.held_out, line)
    deciding = next(p for p in ends if p is not None)
    middle = int((line.alphas - 0.5).abs().argmin())
    return ModeConnectivity(
        barrier=line.barrier,
        error_barrier=line.error_barrier,
        error_instability=line.instability,
        deciding_error_barrier=deciding.error_barrier,
        deciding_standard_error=deciding.error_standard_error,
        barrier_standard_error=float(line_used.standard_errors[line_used.peak]),
        barrier_at=float(line.alphas[line.peak]),
        lowest_excess=float(line.brackets.min()),
        mean_baseline_barrier=line.mean_baseline_barrier,
        midpoint_excess=float(line.brackets[middle]) if line.alphas[middle] == 0.5 else math.nan,
        units_moved=found.alignment.moved / found.alignment.units if found.alignment else math.nan,
        alignment_passes=float(found.alignment.passes) if found.alignment else math.nan,
        function_change=found.function_change,
        distance=found.distance,
        aligned_distance=found.aligned_distance,
        angle=found.angle,
        variance_ratios=found.variance_ratios,
        layer_barriers={n: b.from_first for n, b in found.layers.items()},
        layer_barriers_back={n: b.from_second for n, b in found.layers.items()},
        alphas=line.alphas.numpy(),
        losses=line.losses.numpy(),
        errors=line.errors.numpy(),
        excess=line.brackets.numpy(),
        excess_standard_errors=line.standard_errors.numpy(),
        curves=_curves(found),
        chance_error=found.chance_error,
        norm_stats=norm_stats if path.has_batch_norm else "none",
        align=align or "",
        aligned_state=found.aligned_state,
        preconditions=_preconditions(found, path, norm_stats),
        **_own(found, path.has_batch_norm and norm_stats == "reset"),
        **_barriers(found),
    )


def _own(found: Connection, reset: bool) -> dict[str, Any]:
    """The two networks' own losses, and how far measuring BatchNorm statistics again moves them."""
    assert found.ends is not None
    own = found.ends.losses
    return {
        "own_losses": numpy.array(own),
        "reset_shift": _shift(own, found.line.losses) if reset else math.nan,
    }


def _barriers(found: Connection) -> dict[str, Any]:
    """The barriers along every other path that was measured; NaN along those that were not."""
    held, aligned = found.held_out, found.aligned
    paths = {
        "held_out": held,
        "aligned": aligned,
        "aligned_held_out": found.aligned_held_out,
        "repaired": found.repaired,
        "curve": found.curve,
    }
    barriers = {f"{n}_barrier": p.barrier if p else math.nan for n, p in paths.items()}
    errors = {f"{n}_error_barrier": p.error_barrier if p else math.nan for n, p in paths.items()}
    return (
        barriers
        | errors
        | {
            "held_out_error_instability": held.instability if held else math.nan,
            "aligned_error_instability": aligned.instability if aligned else math.nan,
        }
    )


def _curves(found: Connection) -> dict[str, NDArray[numpy.float64]]:
    profiles = {label: getattr(found, name) for name, label in CURVES.items()}
    return {
        label: numpy.stack([p.alphas.numpy(), p.losses.numpy(), p.errors.numpy()])
        for label, p in profiles.items()
        if p is not None
    }


def _preconditions(found: Connection, path: Interpolation, norm_stats: str) -> tuple[Precondition, ...]:
    line = found.line
    control = path.has_batch_norm and norm_stats == "lerp"
    worst = max(float(line.errors[0]), float(line.errors[-1]))
    learned = math.isnan(worst) or worst < found.chance_error
    finite = [math.isfinite(float(x)) for x in (line.losses[0], line.losses[-1])]
    return (
        Precondition(
            "both losses are finite",
            all(finite),
            f"the loss of the {'second' if finite[0] else 'first'} network is not finite.",
        ),
        Precondition(
            "BatchNorm statistics fit the interpolated weights",
            not control,
            'the BatchNorm statistics were interpolated, which is a negative control: set norm_stats="reset".',
        ),
        _same_networks(found),
        Precondition(
            "both networks have learned",
            learned,
            f"one of the two networks is wrong on {format_share(worst)} of the examples and always giving the "
            f"most frequent answer on {format_share(found.chance_error)}; a line to an untrained network "
            f"says nothing.",
        ),
    )


def _same_networks(found: Connection) -> Precondition:
    """Whether BatchNorm statistics that are measured again leave the two networks what they are."""
    ends, line = found.ends, found.line
    known = ends is not None and not math.isnan(max(ends.errors))
    moved = _shift(ends.errors, line.errors) if ends and known else 0.0
    wrong = [*(ends.errors if ends else (0.0, 0.0)), float(line.errors[0]), float(line.errors[-1])]
    shares = [format_share(share) for share in wrong]
    return Precondition(
        "statistics measured again leave the two networks as they are",
        moved <= CONNECTED_BELOW,
        f"measuring BatchNorm statistics again makes other networks of the two: they are wrong on {shares[0]} and "
        f"{shares[1]} of the examples, and then on {shares[2]} and {shares[3]}; measure on the data that they were "
        "trained on, and check that their own statistics fit it.",
    )


def _shift(own: tuple[float, float], line: Tensor) -> float:
    """The larger change of a number of the two networks at the ends of a line."""
    return max(abs(own[0] - float(line[0])), abs(own[1] - float(line[-1])))
