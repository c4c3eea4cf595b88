"""Opposing signals: two small groups of examples that pull the sharpest direction of the loss opposite ways.

Training is stable while steps along the sharpest direction shrink. Where two groups share one large feature and
need opposite responses to it, that direction is theirs: a step that helps one hurts the other, and at the edge
of stability their losses rise and fall in turn. Opposite gradients alone show nothing, since any step sorts
the examples into those it helps and those it hurts; what tells is how much of all movement two groups carry,
and whether they trade places from step to step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray
from torch import Tensor

from diag.display import format_number, format_share
from diag.errors import InvalidInput, Unsupported
from diag.linalg.lanczos import eigenpairs
from diag.linalg.opposition import rank_auc
from diag.linalg.signed_graph import agreeing_parts, signed_graph
from diag.quantities.curvature import CurvatureOperator
from diag.quantities.losses_at import LossesAt
from diag.quantities.opposition import (
    about_gradients,
    groups_of_record,
    null_share,
    replayed_groups,
    static_groups,
)
from diag.quantities.per_example import PerExampleGradients
from diag.quantities.shown import SHOWN, displayed, imported, kept
from diag.registry import instrument
from diag.result import OUR_CHOICE, Confidence, Level, Precondition, Provenance, Result, Verdict, measured

SOURCE = "Rosenfeld, Risteski, ICLR 2024, arXiv:2311.04163"
DIRECTIONS, NULLS = 5, 5
SWAP, PERSIST, ANTIPHASE, SHARE, OVER_CHANCE, SPIKE = 0.6, 0.2, -0.7, 0.4, 5.0, 1.1
EDGE = (1.9, 3.0)  # of learning rate times sharpness, for gradient descent
EDGE_OF_GRAPH = 0.3


@dataclass(frozen=True, kw_only=True, eq=False)
class OpposingSignals(Result):
    """Two groups of rows, A and B, and how much of the loss's movement and curvature they carry."""

    share: float = measured("movement |change of loss| in A and B together", unit="share")
    swap: float = measured(
        "examples that change ends from one step to the next; NaN for a static kick", unit="share"
    )
    persist: float = measured("examples that stay at their end; NaN for a static kick", unit="share")
    antiphase: float = measured("correlation over the steps of A's and B's mean change; NaN for a static kick")
    lag_one: float = measured("correlation of A's mean change with itself a step later; NaN for a static kick")
    curvature_share: float = measured("curvature along the direction that A and B carry", unit="share")
    chance_share: float = measured("2k/n, the share of as many random examples if all moved alike", unit="share")
    null_share: float = measured("largest share after random steps of the same length", unit="share")
    sharpness: float = measured("largest eigenvalue of the Hessian")
    spike: float = measured("largest mean loss after a step over that before it; NaN for a static kick")
    slope_a: float = measured("mean slope of A's losses along the direction")
    slope_b: float = measured("mean slope of B's losses along the direction")
    slope_auc: float = measured("chance that a member's slope is larger in size than a non-member's")
    norm_auc: float = measured("the same for the norm of the gradient alone (a null)")
    loss_auc: float = measured("the same for the loss alone (a null)")
    loss_correlation: float = measured("correlation of |change| with the loss (a null: hard examples move more)")
    cosine: float = measured("cosine of the two groups' gradients (negative also by selection: proves nothing)")
    norm_a: float = measured("norm of A's mean gradient")
    norm_b: float = measured("norm of B's mean gradient")
    norm_rest: float = measured("norm of the mean gradient of the rest")
    direction: int = measured("which eigenvector separates the groups, 0 the sharpest; -1: not from a direction")
    mode: str = measured("static, replay or online")
    k: int = measured("examples in each group")
    num_examples: int = measured("examples, n")
    same_side: bool = measured("both groups' losses rise along the same side of the direction")
    group_a: NDArray[numpy.int64] = measured("rows whose loss rises most, the largest first", shape="(k,)")
    group_b: NDArray[numpy.int64] = measured("rows whose loss falls most, the largest first", shape="(k,)")
    shares: NDArray[numpy.float64] = measured("share for each direction that was tried", shape="(directions,)")
    eigenvalues: NDArray[numpy.float64] = measured("curvature along each", shape="(directions,)")
    changes: NDArray[numpy.float64] = measured("mean change of A, B and the rest, per step", shape="(steps, 3)")
    cosines: NDArray[numpy.float64] = measured("cosines between the gradients of A, then B", shape="(2k, 2k)")
    labels_a: tuple[int, ...] = measured("labels of A, in order; empty where there are none")
    labels_b: tuple[int, ...] = measured("labels of B, in order; empty where there are none")
    losses_a: NDArray[numpy.float64] = measured("losses of A, in order", shape="(k,)")
    losses_b: NDArray[numpy.float64] = measured("losses of B, in order", shape="(k,)")
    shown: NDArray[Any] = measured(
        "inputs of the first 12 of A and of B, features standardised; empty without a tensor", shape="(rows, *)"
    )
    difference: NDArray[numpy.float64] = measured(
        "mean input of A less that of B, in standard deviations; empty where there is none", shape="(*)"
    )

    # ---- judging ---------------------------------------------------------------------------------

    def verdict(self) -> Verdict:
        unmet = self.unmet()
        if unmet is not None:
            return Verdict(Level.NOT_APPLICABLE, f"No verdict: {unmet.detail}", source=SOURCE)
        return self._of_a_kick() if self.mode == "static" else self._of_steps()

    @property
    def limit(self) -> float:
        """The share from which on the groups are outsized: more than their number, and than random steps."""
        null = 0.0 if math.isnan(self.null_share) else self.null_share
        return max(self._setting("share_limit", SHARE), OVER_CHANCE * self.chance_share, null)

    @property
    def outsized(self) -> bool:
        """True where the two groups carry far more of the movement than chance explains."""
        return self.share > self.limit

    def _of_a_kick(self) -> Verdict:
        if not self.outsized or self.same_side:
            return self._judged(
                Level.OK,
                f"No two groups of {self.k} stand out along the {DIRECTIONS} sharpest directions: the best carry "
                f"{self._carried()}, which excludes only large groups with very large features.",
            )
        return self._judged(
            Level.WARNING,
            f"{2 * self.k} of {self.num_examples:,} examples, in two groups that move opposite ways, dominate a "
            f"sharp direction: they carry {self._carried()}.",
            "Look at the two groups side by side for a feature that they share and labels that disagree; "
            "mode='replay' shows whether they trade places.",
        )

    def _of_steps(self) -> Verdict:
        oscillates = (
            self.swap >= self._setting("swap_limit", SWAP)
            and self.persist <= PERSIST
            and self.antiphase <= ANTIPHASE
        )
        if self.persist > -ANTIPHASE and self.swap <= PERSIST:
            return self._judged(
                Level.OK,
                f"The same examples stay at each end (persist {format_number(self.persist)}, swap "
                f"{format_number(self.swap)}): they are the hardest and the easiest, not opposing.",
            )
        if not oscillates:
            return self._judged(
                Level.OK,
                f"The ends neither trade places nor stay (swap {format_number(self.swap)}, persist "
                f"{format_number(self.persist)}, antiphase {format_number(self.antiphase)}): no period-two "
                f"oscillation; the groups carry {self._carried()}.",
            )
        pattern = f"swap {format_number(self.swap)}, antiphase {format_number(self.antiphase)}"
        if not self.outsized:
            return self._judged(
                Level.OK,
                f"Losses oscillate with period two along a sharp direction ({pattern}) and no two groups dominate: "
                f"the ends carry {self._carried()}; this is the ordinary edge of stability.",
                confidence=Confidence.STRONG_EMPIRICAL,
            )
        spikes = self.mode == "online" and self.spike >= SPIKE and self._labels_differ()
        found = f" while the mean loss jumps by a factor of {format_number(self.spike)}" if spikes else ""
        return self._judged(
            Level.WARNING,
            f"Two groups of {self.k} examples dominate the steps and trade places ({pattern}){found}: "
            f"they carry {self._carried()}.",
            "Look at the two groups: clip the gradient, use Adam or lower the learning rate, or repair the labels "
            "or the feature that they share.",
        )

    def _carried(self) -> str:
        chance = f"{format_share(self.chance_share)} by number"
        if not math.isnan(self.null_share):
            chance += f", {format_share(self.null_share)} after random steps"
        curvature = (
            ""
            if math.isnan(self.curvature_share)
            else (f" and {format_share(self.curvature_share)} of the curvature")
        )
        return f"{format_share(self.share)} of the loss's movement ({chance}){curvature}"

    def _judged(
        self,
        level: Level,
        sentence: str,
        advice: str = "",
        confidence: Confidence = Confidence.WEAK_EMPIRICAL,
    ) -> Verdict:
        return Verdict(
            level,
            sentence,
            advice,
            SOURCE,
            confidence,
            "Take the named rows out and measure again: the direction should lose its curvature. Late in training "
            "with cross-entropy a few plain hard examples can do the same."
            if level == Level.WARNING
            else "",
            self.share,
            self.limit,
            OUR_CHOICE,
        )

    def _setting(self, name: str, default: float) -> float:
        return self.provenance.settings.get(name, default)

    def _labels_differ(self) -> bool:
        return bool(self.labels_a) and _commonest(self.labels_a) != _commonest(self.labels_b)

    # ---- showing ---------------------------------------------------------------------------------

    def examples(self, describe: Callable[[Any], str] | None = None) -> Iterator[dict[str, Any]]:
        """The rows of A and of B with label, loss and input, and the difference of their means, for display.

        describe: makes text of one input (token numbers, say); else images, features or numbers are shown.
        """
        named = self.provenance.settings.get("describe", "")
        describe = describe or (imported(named) if named else None)
        at = 0
        for group, rows, labels, losses in (
            ("A: the loss rises", self.group_a, self.labels_a, self.losses_a),
            ("B: the loss falls", self.group_b, self.labels_b, self.losses_b),
        ):
            for i, row in enumerate(rows[:SHOWN]):
                item: dict[str, Any] = {"row": int(row), "group": group, "loss": float(losses[i])}
                if labels:
                    item["label"] = labels[i]
                if len(self.shown):
                    item |= displayed(self.shown[at], describe)
                    at += 1
                yield item
        if self.difference.size:
            yield {"row": None, "group": "mean of A less mean of B"} | displayed(self.difference, None)

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

    def plot(self, ax: Any) -> None:
        """Static: the share by direction. With steps: the mean change of A, of B and of the rest."""
        if self.mode == "static":
            ax.bar(range(len(self.shares)), self.shares, width=0.6)
            for height, style in ((self.null_share, "--"), (self.chance_share, ":")):
                ax.axhline(height, color="0.5", linewidth=0.8, linestyle=style)
            ax.set_xticks(range(len(self.shares)), [format_number(float(v)) for v in self.eigenvalues])
            ax.set(xlabel="curvature of the direction", ylabel="share of the movement in 2k examples")
            return
        for column, name in enumerate(("A", "B", "rest")):
            ax.plot(self.changes[:, column], marker="o", markersize=3, label=name)
        ax.legend()
        ax.set(xlabel="step", ylabel="mean change of the loss")


@instrument(source=SOURCE, title="Opposing signals")
def opposing_signals(
    hessian: CurvatureOperator,
    losses_at: LossesAt,
    per_example_gradients: PerExampleGradients,
    inputs: Any = None,
    labels: Tensor | None = None,
    *,
    mode: str = "static",
    k: int = 0,
    share_limit: float = SHARE,
    swap_limit: float = SWAP,
    describe: str = "",
    seed: int = 0,
) -> OpposingSignals:
    """Two groups of examples that pull the sharpest directions of the loss opposite ways, by their rows.

    hessian: of the mean loss, an operator of size P. losses_at: per-example losses (n,) at given parameters.
    per_example_gradients: of the same n examples. inputs, labels: for display only.

    Static mode kicks the parameters both ways along each of the five sharpest directions and takes the k
    examples at each end of l(w + e u) - l(w - e u); the direction with the largest share of the movement is
    kept. Replay mode runs 40 steps of full-batch descent at 2.5 / sharpness on a copy, and takes the groups from
    the leading mode of the last 15. `opposing_signals_online` does the same for losses recorded in training. The
    nulls are random steps of the same length, as many random examples, and the loss and the gradient norm alone.

    A detector of large groups with very large features: 20 + 20 of 1,000 examples with a feature 11 times an
    image's norm were found by every seed tried, a feature of 4 times was missed. A negative result means little.

    Settings: `mode`, "static" or "replay"; `k`, the group size, 0 for max(10, 2 % of n); `share_limit` and
    `swap_limit`, our choice, uncalibrated; `describe`, "module:function" that turns one input into text;
    `seed`, of Lanczos and of the random steps.

    Raises InvalidInput for another mode or k, Unsupported for too few examples or a loss that curves nowhere
    upwards. Source: Rosenfeld and Risteski 2024, arXiv:2311.04163.
    """
    if mode not in ("static", "replay"):
        raise InvalidInput(f"mode is {mode!r}; expected 'static' or 'replay'.")
    n = losses_at.num_examples
    k = _group_size(k, n)
    pairs = eigenpairs(hessian, largest=min(DIRECTIONS, hessian.size), tolerance=1e-2, seed=seed)
    values, vectors = pairs.values.cpu(), pairs.vectors
    assert vectors is not None
    if not float(values[0]) > 0:
        raise Unsupported(
            "The loss curves upwards in no direction here, so none is sharp; measure a trained network."
        )
    find = static_groups if mode == "static" else replayed_groups
    groups, losses = find(losses_at, vectors, values, k), losses_at(losses_at.center)
    return OpposingSignals(
        **groups.numbers,
        **about_gradients(per_example_gradients, vectors[groups.direction], groups, losses),
        **kept(groups, losses, inputs, labels),
        direction=groups.direction,
        mode=mode,
        sharpness=float(values[0]),
        num_examples=n,
        k=k,
        chance_share=2 * k / n,
        null_share=null_share(losses_at, float(values[0]), k, NULLS, seed),
        eigenvalues=values.numpy(),
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
    """The same judgement for losses that were recorded while training.

    record: (T + 1, n) losses of one fixed probe set at consecutive optimizer steps. sharpness: the largest Hessian
    eigenvalue at the first and the last. edge: the range of learning rate times sharpness that counts as the
    edge of stability, (1.9, 3) for plain gradient descent; scale it for another optimizer's threshold.

    Raises InvalidInput where the record is no (T + 1, n) matrix of at least four steps.
    """
    if record.ndim != 2 or len(record) < 5 or not record.is_floating_point():
        raise InvalidInput(
            f"The record of losses has the shape {tuple(record.shape)}; expected (T + 1, n), floating, with at "
            "least four steps."
        )
    n = record.shape[1]
    k = _group_size(k, n)
    record = record.detach().cpu().double()
    groups = groups_of_record(record, k)
    first, last = (learning_rate * value for value in sharpness)
    unknown: dict[str, Any] = dict.fromkeys(UNKNOWN_WITHOUT_A_MODEL, math.nan)
    return OpposingSignals(
        **groups.numbers,
        **unknown,
        **kept(groups, record[0], None, labels),
        loss_auc=rank_auc(record[0], groups.members(n)),
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
        preconditions=(
            Precondition(
                "the edge of stability",
                all(edge[0] <= product <= edge[1] for product in (first, last)),
                f"learning rate times sharpness is {format_number(first)} at the start and {format_number(last)} "
                f"at the end, outside {edge[0]} to {edge[1]}, where losses oscillate along the sharpest direction.",
            ),
        ),
    )


UNKNOWN_WITHOUT_A_MODEL = (
    *("curvature_share", "slope_a", "slope_b", "slope_auc", "norm_auc", "cosine"),
    *("norm_a", "norm_b", "norm_rest", "null_share"),
)


def _group_size(k: int, n: int) -> int:
    if k < 0 or 2 * k > n:
        raise InvalidInput(f"k is {k} for {n} examples; expected 0 (2 % of them, at least 10) up to half of them.")
    k = k or max(10, round(0.02 * n))
    if n < 4 * k:
        raise Unsupported(f"{n} examples are too few for two groups of {k}; give at least {4 * k}, or a smaller k.")
    return k


def _commonest(labels: tuple[int, ...]) -> int:
    return max(set(labels), key=labels.count)
