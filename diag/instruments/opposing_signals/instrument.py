"""Opposing signals: two small groups of examples that pull the sharpest direction of the loss opposite ways.

Training is stable while steps along the sharpest direction shrink. Where two groups share one large feature and
need opposite responses to it, that direction is theirs: a step that helps one hurts the other, and at the edge
of stability their losses rise and fall in turn. Opposite gradients alone show nothing, since any step sorts
the examples into those it helps and those it hurts; the evidence is how much of all movement two groups carry,
and whether they trade places from step to step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy
from torch import Tensor

from diag.curvature.carry import carried_eigenpairs
from diag.curvature.neighbourhood.losses_at import LossesAt
from diag.curvature.operators import CurvatureOperator
from diag.display import format_number
from diag.errors import Unsupported
from diag.gradients import PerExampleGradients
from diag.instruments.opposing_signals.fields import MeasuredSignals
from diag.instruments.opposing_signals.judging import (
    CURVATURE_SHARE,
    DIRECTIONS,
    SOURCE,
    SWAP,
    of_a_kick,
    of_steps,
)
from diag.instruments.opposing_signals.loss_record import EDGE, LEAST_STEPS, Edge, LossRecord, Recording
from diag.instruments.opposing_signals.measuring import (
    Groups,
    about_gradients,
    about_record,
    check_request,
    chosen_record,
    curvature_share,
    group_size,
    groups_of_record,
    null_share,
    replayed_groups,
    static_groups,
)
from diag.instruments.opposing_signals.movement import rank_auc
from diag.instruments.opposing_signals.showing import draw_groups, imported, kept, two_groups
from diag.instruments.opposing_signals.signed_graph import agreeing_parts, signed_graph
from diag.ranges import Seed, Share, WholeNumber
from diag.registry import GRADIENT, PRODUCT, SELF_TEST, StepWindow, instrument
from diag.result import Level, Provenance, Verdict

NULLS = 20  # random steps; the margin beyond them is in `fields`
WINDOW = 20
EDGE_OF_GRAPH = 0.3


@dataclass(frozen=True, kw_only=True, eq=False)
class OpposingSignals(MeasuredSignals):
    """Two groups of rows, A and B, and how much of the loss's movement and curvature they carry."""

    # ---- judging

    def verdict(self) -> Verdict:
        unmet = self.unmet()
        if unmet is not None:
            return unmet.verdict(SOURCE)
        return of_a_kick(self) if self.mode == "static" else of_steps(self)

    @classmethod
    def trend(cls, series: Sequence[tuple[int, Self]]) -> Verdict:
        """The last verdict; where it is quiet and an earlier one was not, it says when."""
        last = series[-1][1].verdict()
        warned = [step for step, result in series if result.verdict().level == Level.WARNING]
        if last.level == Level.WARNING or not warned:
            return last
        return replace(last, sentence=f"{last.sentence[:-1]}; two groups did dominate at step {warned[-1]:,}.")

    # ---- showing

    def examples(self, describe: Callable[[Any], str] | None = None) -> Iterator[dict[str, Any]]:
        """The rows of A and of B with label, loss and input, and the difference of their means, for display.

        describe: makes text of one input (token numbers, say); else images, features or numbers are shown.
        """
        named = self.setting("describe")
        return two_groups(self, describe or (imported(named) if named else None))

    def graph(self, at_least: float = EDGE_OF_GRAPH) -> Any:
        """The signed networkx graph of A and B: nodes are rows, edges have `weight`, the cosine of two gradients.

        Cosines smaller than `at_least` in size are left out (our choice, uncalibrated).
        """
        graph = signed_graph([*self.group_a.tolist(), *self.group_b.tolist()], self.cosines, at_least)
        for row in graph:
            graph.nodes[row]["group"] = "A" if row in self.group_a else "B"
        return graph

    def groups(self, at_least: float = EDGE_OF_GRAPH) -> list[set[int]]:
        """Rows whose gradients agree: the connected parts of the graph's positive edges, the largest first."""
        return agreeing_parts(self.graph(at_least))

    def plot(self, ax: Any = None) -> Any:
        """Static: the share by direction. With steps: the mean losses of A, of B and of the rest."""
        if self.mode == "static":
            ax.bar(range(len(self.shares)), self.shares, width=0.6)
            for height, style in ((self.null_share, "--"), (self.chance_share, ":")):
                ax.axhline(height, color="0.5", linewidth=0.8, linestyle=style)
            ax.set_xticks(range(len(self.shares)), [format_number(float(v)) for v in self.eigenvalues])
            ax.set(xlabel="curvature of the direction", ylabel="share of the movement in 2k examples")
        else:
            draw_groups(ax, self.steps, self.trace)


def _grouped(
    mode: str, record: LossRecord | None, losses_at: LossesAt, vectors: Tensor, values: Tensor, k: int
) -> tuple[str, Groups]:
    """The mode that is taken, and the two groups of k that it finds."""
    if record is not None:
        return "online", groups_of_record(record.losses, k)
    if mode == "replay":
        return mode, replayed_groups(losses_at, vectors, values, k)
    return "static", static_groups(losses_at, vectors, values, k)


def _sharpest(hessian: CurvatureOperator, seed: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues on the CPU, and their eigenvectors as rows."""
    if not hessian.spread.alone:
        raise Unsupported(
            "The groups' gradients are those of one process's rows, of which each rank has others; measure "
            "opposing signals in one process on all the data, without ranks=."
        )
    pairs = carried_eigenpairs(hessian, "hessian", largest=min(DIRECTIONS, hessian.size), tolerance=1e-2, seed=seed)
    values, vectors = pairs.values.cpu(), pairs.vectors
    assert vectors is not None
    if not float(values[0]) > 0:
        raise Unsupported(
            "The loss curves upwards in no direction here, so none is sharp; measure a trained network."
        )
    return values, hessian.whole_rows(vectors)


def _passes(settings: Mapping[str, Any]) -> float:
    # 16 products find the directions, 8 more look for those that a run from one vector cannot see.
    return SELF_TEST + 24 * PRODUCT + 2 * (DIRECTIONS + NULLS) + 8 * GRADIENT


_STEPS = StepWindow(
    quantity="loss_record",
    length=lambda settings: settings["window"] if settings["mode"] in ("auto", "online") else 0,
    required=lambda settings: settings["mode"] == "online",
    least=LEAST_STEPS,
    begin=Recording,
    insist="mode='online'",
    shorten="a smaller window=",
)


@instrument(
    source=SOURCE,
    title="Opposing signals",
    passes=_passes,
    window=_STEPS,
    why="Two groups of examples that ask for opposite changes make the loss jump at large steps; what the "
    "examples of a group have in common is worth a look.",
    formula="movement_i = l_i(w + e u) - l_i(w - e u), u an eigenvector of H",
)
def opposing_signals(
    hessian: CurvatureOperator,
    losses_at: LossesAt,
    per_example_gradients: PerExampleGradients,
    inputs: Any = None,
    labels: Tensor | None = None,
    loss_record: LossRecord | None = None,
    *,
    mode: str = "auto",
    k: WholeNumber = 0,
    window: WholeNumber = WINDOW,
    share_limit: Share = CURVATURE_SHARE,
    swap_limit: Share = SWAP,
    describe: str = "",
    seed: Seed = 0,
) -> OpposingSignals:
    """Two groups of examples that pull the sharpest directions of the loss opposite ways, by their rows.

    hessian: of the mean loss, an operator of size P. losses_at: per-example losses (n,) at given parameters.
    per_example_gradients: of the same n examples. inputs, labels: for display only. loss_record: their losses at
    consecutive optimizer steps, up to this moment; `diag.watch` records it.

    Static mode kicks the parameters both ways along each of the five sharpest directions and takes the k
    examples at each end of l(w + e u) - l(w - e u); the direction with the largest share of the movement is
    kept. Online mode takes the groups from the leading mode of the changes in `loss_record`; it judges at the edge
    of the optimizer's stability and where all steps used the same examples. Replay mode does so for 40 steps of
    full-batch descent at 2.5 / sharpness on a copy (the last 15 of them). The nulls are random steps of the same
    length, as many random examples, and the loss and the gradient norm alone.

    A detector of large groups with very large features: 20 + 20 of 1,000 examples with a feature 11 times an
    image's norm were found by every seed tried, a feature of 4 times was missed. A negative result means little.

    Settings: `mode`, "static", "replay", "online", or "auto": online where a record is given, a verdict can stand
    on it and the ends trade places, else static; `k`, the group size, 0 for max(10, 2 % of n); `window`, the steps
    that a watch records, 0 for none; `share_limit` and `swap_limit`, our choice, uncalibrated; `describe`,
    "module:function" that turns one input into text; `seed`, of Lanczos and of the random steps.

    Raises InvalidInput for another mode, k, window or record, MissingQuantity for online mode without a record,
    Unsupported for too few examples or a loss that curves nowhere upwards. Source: Rosenfeld and Risteski 2024,
    arXiv:2311.04163.
    """
    n = losses_at.num_examples
    check_request(mode, window, loss_record, n)
    k = group_size(k, n)
    record, why_not = chosen_record(mode, loss_record, k, swap_limit)
    values, vectors = _sharpest(hessian, seed)
    mode, groups = _grouped(mode, record, losses_at, vectors, values, k)
    losses, u = losses_at(losses_at.center), vectors[max(groups.direction, 0)]
    carried, unknown = curvature_share(hessian, u, groups.rows)
    return OpposingSignals(
        **groups.numbers,
        **about_gradients(per_example_gradients, u, groups, losses),
        **kept(groups, losses, inputs, labels),
        **about_record(record, groups),
        curvature_share=carried,
        direction=groups.direction,
        mode=mode,
        sharpness=float(values[0]),
        num_examples=n,
        k=k,
        chance_share=2 * k / n,
        null_share=null_share(losses_at, float(values[0]), k, NULLS, seed),
        eigenvalues=values.numpy(),
        notes=(*unknown, *why_not, *(record.notes if record is not None else ())),
    )


def opposing_signals_online(
    record: Tensor,
    *,
    learning_rate: float,
    sharpness: tuple[float, float],
    labels: Tensor | None = None,
    k: int = 0,
    edge: tuple[float, float] = EDGE,
) -> OpposingSignals:
    """Online mode without a model: what the losses alone show.

    record: (T + 1, n) losses of one fixed set of examples at consecutive steps of gradient descent. sharpness: the
    largest Hessian eigenvalue at the first and the last. edge: the range of sharpness over 2 / learning rate that
    counts as the edge of stability.

    Raises InvalidInput where the record is no (T + 1, n) matrix of at least four steps.
    """
    first, last = (Edge(value, 2 / learning_rate, "2 / learning rate") for value in sharpness)
    record_of_run = LossRecord(record, first, last)
    n = record_of_run.num_examples
    k = group_size(k, n)
    groups = groups_of_record(record_of_run.losses, k)
    unknown: dict[str, Any] = dict.fromkeys(UNKNOWN_WITHOUT_A_MODEL, math.nan)
    return OpposingSignals(
        **groups.numbers,
        **unknown,
        **kept(groups, record_of_run.losses[-1], None, labels),
        **about_record(record_of_run, groups, edge),
        loss_auc=rank_auc(record_of_run.losses[0], groups.members(n)),
        direction=-1,
        mode="online",
        sharpness=float(sharpness[-1]),
        num_examples=n,
        k=k,
        same_side=False,
        chance_share=2 * k / n,
        cosines=numpy.zeros((0, 0)),
        eigenvalues=numpy.array(sharpness[-1:], dtype=float),
        provenance=Provenance("opposing_signals", {"mode": "online", "k": k}, num_examples=n),
    )


UNKNOWN_WITHOUT_A_MODEL = (
    *("curvature_share", "slope_a", "slope_b", "slope_auc", "norm_auc", "cosine"),
    *("norm_a", "norm_b", "norm_rest", "null_share"),
)
