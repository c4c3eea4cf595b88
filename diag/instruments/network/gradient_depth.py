"""Gradients over the depth: whether they shrink or grow by orders of magnitude from the last layers to the first.

Compared are root mean squares per entry of the gradients of weights, as the sizes of tensors differ. Depth is the
way from weight to weight in the graph of the loss: heads that stand side by side are not deep. Where that way is
not known, as of a compiled model, layers are taken in the order of `named_parameters()`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from diag.display import format_number, format_share
from diag.instruments.causes import Cause
from diag.instruments.optimization.course import SMALL, finite_losses, left_of_loss, median
from diag.instruments.outcome.constant_answer import targets_of_the_loss
from diag.ranges import Times
from diag.registry import Kind, instrument
from diag.result import OUR_CHOICE, Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.history import History, by_rows, parts
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.network import DepthFacts

SOURCE = "arithmetic of the recorded norms"
GRADIENT_RATIO = 1000.0
FEWEST_LAYERS_IN_DEPTH = 4
RECENT_STEPS = 20
SMOOTHED = 5  # steps
DONE = 0.01  # of the first loss, and of that of the best constant answer
EXPLAINED_BY = (
    Cause.UNITS_DEAD, Cause.UNITS_SATURATED, Cause.LEARNING_RATE_TOO_HIGH, Cause.INITIALIZATION_CONSTANT,
    Cause.INITIALIZATION_SCALE, Cause.TRAINING_DIVERGED, Cause.GRAPH_CUT, Cause.WEIGHT_DECAY_TOO_STRONG,
    Cause.INPUTS_TOO_SMALL, Cause.INPUTS_NOT_NORMALIZED, Cause.NOT_FINITE,
    Cause.LOSS_ASCENDED, Cause.LOSS_UNBOUNDED,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class GradientDepth(Result):
    """Of the weights with at least 64 entries that get a gradient; medians over the last twenty steps."""

    factor: float = measured("gradient of the first quarter of the layers over that of the last quarter")
    layers: tuple[str, ...] = measured("the weights, in the model's order")
    sizes: NDArray[numpy.float64] = measured("root mean square of each one's gradient", shape="(layers,)")
    since: int = measured(
        "the step from which the factor has been beyond the limit up to now", remark="0: it is not", default=0
    )

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        limit = self.setting("factor")
        if 1 / limit <= self.factor <= limit:
            return Verdict(
                Level.OK,
                f"Gradients of the first layers are {format_number(self.factor)} times those of the last.",
                source=SOURCE,
                value=self.factor,
                threshold=limit,
                threshold_source=OUR_CHOICE,
            )
        vanish = self.factor < 1
        found = f"{format_number(self.factor)} times those of the last" if self.factor else "exactly zero by now"
        smallest = numpy.argmin(self.sizes) if vanish else numpy.argmax(self.sizes)
        return Verdict(
            Level.ALARM,
            f"Gradients {'vanish' if vanish else 'explode'} over the depth: those of the first layers are {found}.",
            advice="Add normalisation layers or skip connections, use an activation that is not flat (ReLU, GELU), "
            "or scale the initial weights for the activation (variance 2 / fan-in for ReLU).",
            source=SOURCE,
            confidence=Confidence.STRONG_EMPIRICAL,
            refutation="The first layers' weights move as far as the last layers' do, relative to their size.",
            value=self.factor,
            threshold=1 / limit if vanish else limit,
            threshold_source=OUR_CHOICE,
            layers=(self.layers[int(smallest)],),
            cause=Cause.GRADIENTS_VANISH if vanish else Cause.GRADIENTS_EXPLODE,
            explained_by=EXPLAINED_BY,
            step=self.since or None,
        )

    def plot(self, ax: Any = None) -> Any:
        """The gradient of every layer."""
        ax.semilogy(self.sizes, marker="o", markersize=3)
        ax.set(xlabel="weight, in the model's order", ylabel="gradient per entry (root mean square)")


@instrument(
    source=SOURCE,
    title="Gradients over the depth",
    kind=Kind.CHECK,
    before_training="always",
    why="Layers that get a gradient thousands of times smaller than others hardly learn; where it is "
    "thousands of times larger, they overshoot.",
)
def gradient_depth(history: History, loop: Loop | None = None, *, factor: Times = GRADIENT_RATIO) -> GradientDepth:
    """Whether gradients shrink or grow by orders of magnitude over the depth of the network.

    history: the record of a watched run; loop: where several optimizers descend losses of their own, the network of
    each is one, and the graph of the loss tells which weights stand one behind the other. Compared are the medians
    of the first and the last quarter of the weights on such a way (tensors named "weight" with at least 64 entries
    that ever had a gradient), each over the last twenty steps. Where a network ends in several heads, the one with
    which the factor is nearest to one is that compared with. A factor beyond `factor` either way is an alarm;
    networks of fewer than four such layers are not judged, nor a loss that is next to zero beside its first value
    and beside that of the best constant answer, where this is known. Raises nothing of its own.
    """
    sides = [] if loop is None else [side for side in loop.sides if side]
    sides = sides or [frozenset(history.layers)]
    done = _done(history, loop)
    depth = DepthFacts() if loop is None else loop.depth
    return max((_of_side(history, side, depth, factor, done) for side in sides), key=_unevenness)


def _of_side(history: History, side: frozenset[str], depth: DepthFacts, factor: float, done: bool) -> GradientDepth:
    """Of the weights that one optimizer trains."""
    weights = [name for name in history.layers if name in side and _is_weight(name)]
    if 2 * len(side.intersection(depth.placed)) < len(weights):  # the way is not known
        return _of_network(history, weights, factor, done)
    parts = _connected([[name for name in chain if name in side] for chain in depth.chains])
    each = [min((_of_network(history, way, factor, done) for way in ways), key=_judged_first) for ways in parts]
    return max(each, key=_unevenness, default=_of_network(history, (), factor, done))


def _is_weight(name: str) -> bool:
    return "weight" in name.rpartition(".")[2]


def _connected(ways: list[list[str]]) -> list[list[list[str]]]:
    """The ways through a network, those that share a weight together: these are one network with several ends."""
    parts: list[list[list[str]]] = []
    for way in ways:
        mine = [part for part in parts if any(set(way) & set(other) for other in part)]
        parts = [part for part in parts if part not in mine] + [[way, *(other for part in mine for other in part)]]
    return parts


def _judged_first(result: GradientDepth) -> float:
    """The evenest first; what says nothing last."""
    unevenness = _unevenness(result)
    return math.inf if unevenness < 0 else unevenness


def _unevenness(result: GradientDepth) -> float:
    if result.factor == 0:
        return math.inf
    return abs(math.log(result.factor)) if result.factor > 0 else -1.0


def _done(history: History, loop: Loop | None) -> bool:
    """Whether the loss is next to zero. The first loss alone does not tell: where the targets lie far from zero, a
    network that answers nothing but their mean is far below it."""
    left, known = left_of_loss(history), None if loop is None else targets_of_the_loss(loop)
    constant = known.constant_loss / finite_losses(history)[0][0] if known and left < DONE else 1.0
    return left < DONE * min(constant, 1.0)


def _of_network(history: History, of: Sequence[str], factor: float, done: bool) -> GradientDepth:
    """Of these weights, the first that a signal meets first."""
    sizes, names = numpy.asarray(history.sizes, float), history.layers
    places = {name: i for i, name in enumerate(names)}
    weights = [places[name] for name in of if name in places]
    chosen = [i for i in weights if sizes[i] >= SMALL]
    norms = numpy.asarray(history.gradient_norm[-RECENT_STEPS:][:, chosen], float) / numpy.sqrt(sizes[chosen])
    norms[~numpy.isfinite(norms)] = numpy.nan
    seen = (
        numpy.isfinite(norms).any(0) & _had_gradient(history, chosen, norms) if len(norms) else numpy.zeros(0, bool)
    )
    medians = numpy.nanmedian(norms[:, seen], axis=0) if seen.any() else numpy.zeros(0)
    enough = len(medians) >= FEWEST_LAYERS_IN_DEPTH
    quarter = max(len(medians) // 4, 1)
    first, last = (float(numpy.median(m)) if enough else math.nan for m in (medians[:quarter], medians[-quarter:]))
    found = first / last if enough and last > 0 else math.nan
    return GradientDepth(
        factor=found,
        since=_since(history, numpy.asarray(chosen)[seen], found, factor) if enough else 0,
        layers=tuple(numpy.asarray(names)[chosen][seen].tolist()) if enough else (),
        sizes=medians if enough else numpy.zeros(0),
        preconditions=(
            Precondition(
                "depth", enough, f"fewer than {FEWEST_LAYERS_IN_DEPTH} weights were seen to get a gradient."
            ),
            Precondition("gradients", not enough or last > 0, "the gradients of the last layers are zero."),
            Precondition(
                "a loss to descend",
                not done,
                f"the loss is below {format_share(DONE)} of its first value, which leaves next to no gradient.",
            ),
        ),
    )


def _had_gradient(history: History, columns: list[int], recent: NDArray[Any]) -> NDArray[numpy.bool_]:
    """Which of these tensors had a gradient that was not zero, in the last steps or, where not, at any step before.
    A gradient that became zero has vanished for good; what never had one may not belong to what is trained."""
    had = (numpy.nan_to_num(recent) > 0).any(0)
    for part in () if had.all() else parts(history):
        had |= (numpy.nan_to_num(part.gradient_norm[:, columns]) > 0).any(0)
    return numpy.asarray(had)


def _since(history: History, columns: NDArray[Any], found: float, limit: float) -> int:
    """The first step of the stretch up to now over which the factor, as a median of five steps, was beyond the
    limit on the side where it is now; 0 where it is within."""
    if not (found < 1 / limit or found > limit):
        return 0
    scale, quarter = numpy.sqrt(numpy.asarray(history.sizes, float)[columns]), max(len(columns) // 4, 1)

    def factors(part: History) -> NDArray[Any]:
        each = numpy.asarray(part.gradient_norm[:, columns], float) / scale
        with numpy.errstate(divide="ignore", invalid="ignore"):
            return numpy.asarray(median(each[:, :quarter], axis=1) / median(each[:, -quarter:], axis=1))

    course = by_rows(history, factors)
    steps, course = history.steps[numpy.isfinite(course)], course[numpy.isfinite(course)]
    if len(course) > SMOOTHED:
        course = median(numpy.lib.stride_tricks.sliding_window_view(course, SMOOTHED), axis=1)
    within = numpy.flatnonzero(course >= 1 / limit if found < 1 else course <= limit)
    start = int(within[-1]) + 1 if len(within) else 0
    return int(steps[start]) if start < len(course) else 0
