"""Attention: how sharply each head selects among its keys, how far from rounding, and how its weights grow.

Gradient descent on attention drives the scores of the selected keys away from those of the others, in the
direction of a support vector machine's solution (Transformers as SVMs): entropies fall, margins and the norm of
W_Q^T W_K grow. A head that selects one key is what some tasks need, so a low entropy is described, never judged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy
import torch
from numpy.typing import NDArray

from diag.display import format_number, format_share
from diag.errors import InvalidInput
from diag.linalg.softmax_rounding import SIGNIFICAND_BITS, collapse_margin
from diag.ranges import Share
from diag.registry import instrument
from diag.result import OUR_CHOICE, Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.inside.attention import AttentionCall
from diag.snapshot.inside.scores import ENTROPY, GAP, KEYS, LOGIT, MARGIN, SPREAD, WEIGHT

SOURCE = "Tarzanagh et al. 2023, Transformers as Support Vector Machines, arXiv:2308.16898"
ONE_HOT, UNIFORM = 0.01, 0.99


@dataclass(frozen=True, kw_only=True, eq=False)
class Attention(Result):
    """Every head of every attention, in the order of the forward pass; means and medians are over its queries."""

    lowest_entropy: float = measured("entropy of the weights over the log of the keys, in the sharpest head")
    median_entropy: float = measured("the same in the median head")
    highest_entropy: float = measured("the same in the most even head: 1 is the same weight for all keys")
    one_hot_heads: float = measured("heads that give nearly all weight to one key", unit="share")
    uniform_heads: float = measured("heads that give nearly the same weight to all keys", unit="share")
    largest_logit: float = measured("largest score of any head, in absolute value")
    collapsed: float = measured(
        "queries whose softmax rounds to a single key in the dtype of the scores", unit="share"
    )
    collapsed_by_dtype: dict[str, float] = measured("queries with a margin >= b ln 2 in that dtype", unit="share")
    weight_norm: float = measured("root mean square over heads of |W_Q^T W_K|", remark="NaN: no plain projections")
    num_heads: int = measured("heads, all attentions together")
    layers: tuple[str, ...] = measured("the module that each head belongs to")
    heads: tuple[int, ...] = measured("the number of each head in its module")
    keys: NDArray[numpy.float64] = measured("keys that a query of the head may see, median", shape="(heads,)")
    entropies: NDArray[numpy.float64] = measured("mean entropy over the log of the keys", shape="(heads,)")
    largest_weights: NDArray[numpy.float64] = measured("mean of the largest weight", shape="(heads,)")
    logits: NDArray[numpy.float64] = measured("largest score in absolute value", shape="(heads,)")
    spreads: NDArray[numpy.float64] = measured("median standard deviation of a query's scores", shape="(heads,)")
    gaps: NDArray[numpy.float64] = measured(
        "median gap of the largest score to the next: the separation margin of the selected key", shape="(heads,)"
    )
    smallest_gaps: NDArray[numpy.float64] = measured("the same, smallest over the queries", shape="(heads,)")
    weight_norms: NDArray[numpy.float64] = measured("|W_Q^T W_K|, NaN where it is not known", shape="(heads,)")

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        return self._described(
            f"{self.num_heads} heads spread their weight with an entropy of {format_number(self.lowest_entropy)} "
            f"to {format_number(self.highest_entropy)} of the largest possible, {self._extremes()}, and "
            f"{format_share(self.collapsed)} of the queries are rounded to a single key; the numbers only describe."
        )

    def _extremes(self) -> str:
        return (
            f"{format_share(self.one_hot_heads)} of them on nearly one key and {format_share(self.uniform_heads)} "
            "nearly evenly"
        )

    def _described(self, sentence: str) -> Verdict:
        return Verdict(
            Level.DESCRIPTION,
            sentence,
            advice="A head that selects one key may be what the task needs; a head that selects none has learnt "
            "nothing of where to look. Compare snapshots, and heads of one layer.",
            source=SOURCE,
            confidence=Confidence.WEAK_EMPIRICAL,
            value=self.lowest_entropy,
            threshold_source=OUR_CHOICE,
        )

    @classmethod
    def trend(cls, series: Sequence[tuple[int, Self]]) -> Verdict:
        """How entropy, margin and the norm of the weights moved from the first measurement to the last."""
        (began, first), (ended, last) = series[0], series[-1]
        if last.unmet() is not None or len(series) < 2 or first.layers != last.layers:
            return last.verdict()
        gap = [format_number(float(numpy.nanmedian(r.gaps))) for r in (first, last)]
        growth = last.weight_norm / first.weight_norm if first.weight_norm else math.nan
        norm = f", and |W_Q^T W_K| grew by {format_number(growth)}" if math.isfinite(growth) else ""
        return last._described(
            f"From step {began:,} to {ended:,} the median entropy went from {format_number(first.median_entropy)} "
            f"to {format_number(last.median_entropy)} of the largest possible, the median gap to the next key from "
            f"{gap[0]} to {gap[1]}{norm}."
        )

    def plot(self, ax: Any = None) -> Any:
        """The entropy of each head, one column a layer."""
        places = list(dict.fromkeys(self.layers))
        ax.scatter([places.index(name) for name in self.layers], self.entropies, c=self.heads, cmap="viridis", s=18)
        ax.set_xticks(range(len(places)), places, rotation=45, ha="right", fontsize=7)
        ax.set(
            xlabel="attention, in the order of the forward pass", ylabel="entropy / log(keys)", ylim=(-0.03, 1.03)
        )

    @classmethod
    def plot_trend(cls, ax: Any, series: Sequence[tuple[int, Self]]) -> None:
        """Lowest, median and highest entropy over the steps."""
        steps = [step for step, _ in series]
        ax.plot(steps, [r.median_entropy for _, r in series], marker="o", markersize=3, label="median head")
        low, high = ([getattr(r, name) for _, r in series] for name in ("lowest_entropy", "highest_entropy"))
        ax.fill_between(steps, low, high, alpha=0.2, label="all heads")
        ax.set(xlabel="step", ylabel="entropy / log(keys)", ylim=(-0.03, 1.03))
        ax.legend(fontsize=7, frameon=False)


@instrument(
    source=SOURCE,
    title="Attention",
    kind="description",
    why="Heads that look everywhere alike pass on an average and select nothing; heads that look at a "
    "single key hardly get a gradient any more.",
    formula="H = -sum_j p_j ln p_j / ln(keys), p = softmax(s); gap = s_(1) - s_(2)",
)
def attention(
    attention_calls: Sequence[AttentionCall], *, one_hot: Share = ONE_HOT, uniform: Share = UNIFORM
) -> Attention:
    """Entropy, largest weight, scores, margins and weight norms of every attention head.

    attention_calls: those seen in a forward pass over some 64 examples (`diag.snapshot.inside.attention`),
    each with some of its queries. Entropy is that of a query's weights over the log of the number of keys that it
    may see: 1 is uniform, 0 one-hot; queries that see one key are left out. The gap is s_1 - s_2 of the sorted
    scores, the separation margin of the selected key, min over the others of s_selected - s_j. With keys as
    classes, a softmax rounds to a single key exactly when s_1 - logsumexp of the others is at least b ln 2 for b
    significand bits; fused kernels may use a wider type than that of the queries, by which `collapsed` counts.

    Settings: `one_hot` and `uniform`, the mean entropies below and above which a head counts as such (our choice,
    uncalibrated). Raises InvalidInput where no attention is given. Source: Tarzanagh et al. 2023, arXiv:2308.16898;
    b ln 2 follows from rounding to nearest.
    """
    calls = list(attention_calls)
    if not calls:
        raise InvalidInput("There is no attention among what was given; give at least one call.")
    heads = [(call, h, _known(call.rows[h])) for call in calls for h in range(len(call.rows))]
    tables = [table for _, _, table in heads]
    entropies = numpy.array([_mean(t[:, ENTROPY]) for t in tables])
    rows = {call.dtype: torch.cat([t for c, _, t in heads if c.dtype == call.dtype]) for call in calls}
    norms = numpy.array([call.weight_norms[h] for call, h, _ in heads])
    return Attention(
        lowest_entropy=_over_heads(numpy.min, entropies),
        median_entropy=_over_heads(numpy.median, entropies),
        highest_entropy=_over_heads(numpy.max, entropies),
        one_hot_heads=float((entropies < one_hot).mean()),
        uniform_heads=float((entropies > uniform).mean()),
        largest_logit=_over_heads(numpy.max, numpy.array([_largest(t) for t in tables])),
        collapsed=_collapsed(rows),
        collapsed_by_dtype={d: _collapsed({d: torch.cat(list(rows.values()))}) for d in SIGNIFICAND_BITS},
        weight_norm=_over_heads(lambda n: numpy.sqrt((n**2).mean()), norms),
        num_heads=len(heads),
        layers=tuple(call.layer for call, _, _ in heads),
        heads=tuple(h for _, h, _ in heads),
        keys=numpy.array([_median(t[:, KEYS]) for t in tables]),
        entropies=entropies,
        largest_weights=numpy.array([_mean(t[:, WEIGHT]) for t in tables]),
        logits=numpy.array([_largest(t) for t in tables]),
        spreads=numpy.array([_median(t[:, SPREAD]) for t in tables]),
        gaps=numpy.array([_median(t[:, GAP]) for t in tables]),
        smallest_gaps=numpy.array([float(t[:, GAP].min()) if len(t) else math.nan for t in tables]),
        weight_norms=norms,
        preconditions=(_choosing(entropies),),
    )


def _choosing(entropies: NDArray[numpy.float64]) -> Precondition:
    known = int(numpy.isfinite(entropies).sum())
    detail = f"{known} of {len(entropies)} heads have queries that choose among two keys or more"
    return Precondition("queries that choose among keys by finite scores", known == len(entropies), f"{detail}.")


def _known(rows: torch.Tensor) -> torch.Tensor:
    return rows[~rows.isnan().any(-1)]


def _mean(values: torch.Tensor) -> float:
    return float(values.mean()) if len(values) else math.nan


def _median(values: torch.Tensor) -> float:
    return float(values.median()) if len(values) else math.nan


def _largest(rows: torch.Tensor) -> float:
    return float(rows[:, LOGIT].max()) if len(rows) else math.nan


def _over_heads(reduce: Any, values: NDArray[numpy.float64]) -> float:
    finite = values[numpy.isfinite(values)]
    return float(reduce(finite)) if len(finite) else math.nan


def _collapsed(rows: dict[str, torch.Tensor]) -> float:
    """Share of rows whose margin is at least that of their dtype."""
    hits = [r[:, MARGIN] >= collapse_margin(d) for d, r in rows.items() if d in SIGNIFICAND_BITS]
    return float(torch.cat(hits).double().mean()) if hits and sum(map(len, hits)) else math.nan
