"""Softmax collapse: examples so confident that rounding deletes the gradient on their own class.

In a floating type with b significand bits, 1 + s == 1 for s <= u = 2^-b. The softmax denominator of example i,
divided by its largest term, is 1 + exp(-m_i) with the log-odds margin m_i = z_{i,y} - logsumexp_{k!=y} z_{i,k}.
So a log_softmax loss is exactly zero from m_i = b ln 2 on: 5.5 in bfloat16, 7.6 in float16, 16.6 in float32,
36.7 in float64. Another formula for the same loss need not collapse there (diag.stable_cross_entropy), so the
verdict is about the gradients of the loss that was used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from diag.display import format_number, format_share
from diag.errors import InvalidInput
from diag.instruments.outcome.gain import share_right
from diag.instruments.softmax_collapse.fields import MeasuredMargins
from diag.instruments.softmax_collapse.judging import SOURCE, verdict_on_margins
from diag.linalg.softmax_rounding import (
    EXAMPLE_LOSS,
    LABEL_GRADIENT,
    ROW_SIZE,
    ROW_SUM,
    SIGNIFICAND_BITS,
    class_factors,
    collapse_margin,
    compared_with_exact,
    counters,
    distance_from_softmax,
    float64_margins,
    in_blocks,
    shares_of,
)
from diag.ranges import Share, Threshold
from diag.registry import instrument
from diag.result import Level, Precondition, Verdict

ALARM_AT = 0.5
NEAR_NATS = 2.0
NEAR_RESIDUAL = 1e-3
SAME_LOSS = 0.05  # how far wrong-class gradients may be from the softmax's before the loss counts as another one
# "Low and flat" held-out accuracy, beside a fitted training set: our choice, uncalibrated.
STALLED_FOR, STALLED_WITHIN, STALLED_BELOW = 3, 0.01, 0.5


@dataclass(frozen=True, kw_only=True, eq=False)
class SoftmaxCollapse(MeasuredMargins):
    """Have examples lost their gradient to rounding?"""

    def verdict(self) -> Verdict:
        return verdict_on_margins(self)

    @classmethod
    def trend(cls, series: Sequence[tuple[int, Self]]) -> Verdict:
        last = series[-1][1].verdict()
        if last.level is Level.NOT_APPLICABLE:
            return last
        first = next((step for step, result in series if result.collapsed > 0), None)
        # When the rest of the way will be gone is not said: margins grow by other laws under other optimizers.
        since, before = series[-5:][0]
        grown = series[-1][1].median_margin - before.median_margin
        if series[-1][1].collapsed > 0:
            more = f"; first seen at step {first:,}."
        elif grown > 0 and series[-1][1].headroom > 0:
            more = f"; it has grown by {format_number(grown)} nats since step {since:,}."
        else:
            more = "."
        advice = last.advice + cls._stalled(series)
        return dataclasses.replace(last, sentence=last.sentence.removesuffix(".") + more, advice=advice)

    @classmethod
    def _stalled(cls, series: Sequence[tuple[int, Self]]) -> str:
        """What a fitted training set, collapse, and a low and flat held-out accuracy are consistent with."""
        recent = [result for _, result in series[-STALLED_FOR:]]
        held_out = [result.held_out_accuracy for result in recent]
        fitted = all(result.accuracy == 1 and result.collapsed > 0 for result in recent)
        flat = max(held_out) - min(held_out) <= STALLED_WITHIN and max(held_out) < STALLED_BELOW
        if len(recent) < STALLED_FOR or not (fitted and flat):
            return ""
        return (
            f" The training set is fitted and the held-out accuracy stays at {format_share(held_out[-1])}: "
            "consistent with training that collapse has stalled, which is contested, so run the control."
        )

    def plot(self, ax: Any = None) -> Any:
        """The histogram of the margins, with one vertical line per dtype where the softmax collapses."""
        finite = self.margins[numpy.isfinite(self.margins)]
        ax.hist(finite, bins=40, color="tab:blue", alpha=0.75)
        right = max(collapse_margin(self.dtype), float(finite.max(initial=0.0)))
        for name in SIGNIFICAND_BITS:
            if collapse_margin(name) <= 1.3 * right:
                _mark(ax.axvline, ax, name, own=name == self.dtype)
        ax.set(xlabel="log-odds margin (nats)", ylabel="examples")
        ax.legend(fontsize=7, frameon=False)

    @classmethod
    def plot_trend(cls, ax: Any, series: Sequence[tuple[int, Self]]) -> None:
        """The median margin and its 10-90 % band over the steps, with the collapse margin of the dtype."""
        steps = [step for step, _ in series]
        bands = numpy.array([_percentiles(result.margins) for _, result in series])
        ax.plot(steps, bands[:, 1], marker="o", markersize=3, label="median margin")
        ax.fill_between(steps, bands[:, 0], bands[:, 2], alpha=0.2, label="10-90 % of the examples")
        _mark(ax.axhline, ax, series[-1][1].dtype, own=True)
        ax.set(xlabel="step", ylabel="log-odds margin (nats)")
        ax.legend(fontsize=7, frameon=False)


def _mark(line: Any, ax: Any, dtype: str, own: bool) -> None:
    colours = dict(zip(SIGNIFICAND_BITS, ("tab:orange", "tab:green", "tab:red", "tab:purple"), strict=True))
    line(
        collapse_margin(dtype),
        color=colours[dtype],
        linestyle="-" if own else "--",
        label=f"{dtype}: b ln 2 = {collapse_margin(dtype):.1f}" + (" (in use)" if own else ""),
    )


def _percentiles(values: NDArray[numpy.float64]) -> NDArray[numpy.float64]:
    # method="nearest" never interpolates, so margins of infinity give no NaN.
    return numpy.percentile(values, [10, 50, 90], method="nearest")


@instrument(
    source=SOURCE,
    title="Softmax collapse",
    why="An example whose gradient is rounded to zero no longer teaches anything: learning stops although "
    "the accuracy on new data may still be low.",
    formula="margin = z_y - ln sum_{k != y} exp z_k; collapsed where margin >= b ln 2, b the significand's bits",
)
def softmax_collapse(
    logits: Tensor,
    labels: Tensor,
    logit_gradients: Tensor | None = None,
    held_out_logits: Tensor | None = None,
    held_out_labels: Tensor | None = None,
    *,
    alarm_at: Share = ALARM_AT,
    near_nats: Threshold = NEAR_NATS,
    near_residual: Threshold = NEAR_RESIDUAL,
) -> SoftmaxCollapse:
    """Share of examples whose softmax loses its small terms to rounding, so that their gradient is exactly zero.

    logits (n, K), bfloat16, float16, float32 or float64, as the loss gets them; labels (n,) class numbers;
    logit_gradients (n, K): d loss_i / d logits_i by the loss that training uses, up to one factor per class.
    Without them the loss is taken to be F.cross_entropy in the logits' dtype, and nothing is said of the run's own.
    Margins are computed in float64 (nats). held_out_logits and held_out_labels add the accuracy on held-out data:
    collapse is an alarm where that is lower by more than a fifth, and a description where it is not, or not known.

    Settings: `alarm_at`, the share from which collapse can be an alarm; `near_nats` and `near_residual`, the
    headroom and the zero-sum residual at which collapse counts as near (our choice, uncalibrated).

    Where the wrong-class gradients are not those of a softmax (another loss, label smoothing), there is no
    verdict. Raises InvalidInput for other dtypes, and for values that do not fit (see `diag.snapshot.validation`).
    Source: Prieto et al. 2025, arXiv:2501.04697, Definitions 1 and 3, Equations 2-4; b ln 2 follows from
    rounding to nearest.
    """
    dtype = str(logits.dtype).removeprefix("torch.")
    if dtype not in SIGNIFICAND_BITS:
        raise InvalidInput(f"The logits have dtype {dtype}; expected one of {', '.join(SIGNIFICAND_BITS)}.")
    labels = labels.to(logits.device).long()
    margin = in_blocks(float64_margins, logits, labels)
    counted = {name: in_blocks(lambda z, y, d=name: counters(z, y, d), logits, labels) for name in SIGNIFICAND_BITS}
    compared = in_blocks(compared_with_exact, logits, labels, logit_gradients)
    tensor = logits if logit_gradients is None else logit_gradients
    factor = class_factors(compared, labels, logits.shape[1], tensor.dtype)
    own, true = compared[:, LABEL_GRADIENT], -torch.sigmoid(-margin) * factor
    taken = f"F.cross_entropy in {dtype} (taken as the loss)"
    distance = distance_from_softmax(compared, factor, tensor.dtype)
    return SoftmaxCollapse(
        collapsed=float(((own == 0) & (factor != 0)).double().mean()),
        headroom=collapse_margin(dtype) - float(margin.median()),
        median_margin=float(margin.median()),
        zero_sum_residual=float(compared[:, ROW_SUM].sum() / compared[:, ROW_SIZE].sum()),
        gradient_error=float(((own - true).abs() / true.abs()).nanmedian()),
        loss_underestimate=-float(F.logsigmoid(margin).mean() + counted[dtype][:, EXAMPLE_LOSS].mean()),
        accuracy=share_right(logits, labels),
        held_out_accuracy=share_right(held_out_logits, held_out_labels),
        collapsed_by_dtype={d: float((margin >= collapse_margin(d)).double().mean()) for d in SIGNIFICAND_BITS},
        margins=margin.cpu().numpy(),
        dtype=dtype,
        loss=taken if logit_gradients is None else "the loss of the run",
        preconditions=() if logit_gradients is None else (_softmax_loss(distance, factor),),
        **_counts(counted),
    )


def _counts(counted: Mapping[str, Tensor]) -> dict[str, Any]:
    """The shares that were counted in each dtype, by field."""
    shares = {name: shares_of(columns) for name, columns in counted.items()}
    fields = ("zero_loss_by_dtype", "paper_count_by_dtype", "repository_count_by_dtype", "zero_gradient_by_dtype")
    return {field: {name: share[i] for name, share in shares.items()} for i, field in enumerate(fields)}


def _softmax_loss(distance: float, factor: Tensor) -> Precondition:
    """A plain cross-entropy has wrong-class gradients in proportion to the softmax's probabilities."""
    found = f"its wrong-class gradients differ from the softmax's by {format_share(distance)}"
    if not bool(factor.any()):
        found = "its gradients are zero where the softmax's are not"
    holds = bool(factor.any()) and not distance > SAME_LOSS
    return Precondition(
        "the loss is a cross-entropy of the softmax",
        holds,
        f"the loss is not a plain cross-entropy of the softmax ({found}), so the margins say nothing about "
        "its rounding.",
    )
