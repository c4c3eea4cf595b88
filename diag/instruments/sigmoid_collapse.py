"""Sigmoid collapse: yes-or-no decisions so confident that rounding deletes their gradient.

The twin of softmax collapse for binary and multi-label losses, with a law of its own. The gradient of the binary
cross-entropy of a logit z with target y is sigmoid(z) - y. For a target of 1 it is exactly 0 once the sigmoid
rounds to 1, in a type of b significand bits from z = b ln 2 on (16.6 in float32). For a target of 0 it is the
sigmoid itself, which only underflows: at z = -88 to -104 in float32. So positives fall silent first and negatives
go on, which moves all logits down. What training makes of it no paper says, so it describes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from diag.display import format_number, format_share
from diag.errors import InvalidInput
from diag.linalg.softmax_rounding import SIGNIFICAND_BITS
from diag.registry import instrument
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.objective.decisions import BinaryDecisions

SOURCE = "arithmetic of rounding to nearest; Prieto et al. 2025, arXiv:2501.04697, for the softmax"
NOT_WIDENED = ("float32", "float64")  # narrower types compute the sigmoid in float32 and round the result
SAME_SIGMOID = 0.05  # relative: how far gradients may be from the sigmoid's before the loss counts as another one
# No type rounds away a gradient whose exact value is above this: where it is zero all the same, it is masked.
UNROUNDED = 2**-8
# Roundings of the sigmoid that a gradient must exceed to be compared with the exact one.
CLEAR = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class SigmoidCollapse(Result):
    """How many yes-or-no decisions lost their gradient to rounding, and how far the others are from it."""

    collapsed: float = measured("decisions whose loss gradient is exactly zero", unit="share")
    collapsed_positive: float = measured("those with target 1 alone", unit="share")
    collapsed_negative: float = measured("those with target 0 alone", unit="share")
    headroom: float = measured(
        "how far the median margin of targets 1 is below that at which the sigmoid rounds to 1", unit="nats"
    )
    median_positive: float = measured("median margin of targets 1, the logit itself", unit="nats")
    median_negative: float = measured("median margin of targets 0, minus the logit", unit="nats")
    gradient_error: float = measured("relative rounding error of the median gradient of targets 1")
    accuracy: float = measured("decisions on the right side of zero", unit="share")
    zero_gradient_by_dtype: dict[str, float] = measured(
        "decisions whose binary_cross_entropy_with_logits has a gradient of exactly 0 in that dtype", unit="share"
    )
    margins: NDArray[numpy.float64] = measured(
        "logit of targets 1, minus the logit of targets 0", unit="nats", shape="(decisions,)"
    )
    positive: NDArray[numpy.bool_] = measured("whether the target is 1", shape="(decisions,)")
    dtype: str = measured("dtype of the logits")

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        n, edge = len(self.margins), format_number(sigmoid_edge(self.dtype))
        if self.collapsed > 0:
            found = (
                f"{format_share(self.collapsed)} of {n:,} decisions have an exactly zero gradient "
                f"({format_share(self.collapsed_positive)} of the targets 1, from a logit of about {edge} in "
                f"{self.dtype}, and {format_share(self.collapsed_negative)} of the targets 0)"
            )
        else:
            found = (
                f"None of {n:,} decisions has lost its gradient to rounding: the median logit of targets 1 is "
                f"{format_number(self.median_positive)}, and {self.dtype} rounds the sigmoid to 1 from about {edge}"
            )
        return Verdict(
            Level.DESCRIPTION,
            f"{found}; the numbers only describe.",
            advice="As a control, train on with diag.remedies.stable_binary_cross_entropy: if training goes on as "
            "before, rounding was not what held it.",
            source=SOURCE,
            confidence=Confidence.ARITHMETIC,
            value=self.collapsed,
        )

    def plot(self, ax: Any = None) -> Any:
        """The margins of both kinds of targets, and where the sigmoid rounds to 1."""
        for kind, name in ((self.positive, "target 1"), (~self.positive, "target 0")):
            values = self.margins[kind & numpy.isfinite(self.margins)]
            if len(values):
                ax.hist(values, bins=40, alpha=0.6, label=name)
        edge = sigmoid_edge(self.dtype)
        ax.axvline(edge, color="tab:red", label=f"{self.dtype}, target 1: {edge:.1f}")
        ax.set(xlabel="margin (nats)", ylabel="decisions")
        ax.legend(fontsize=7, frameon=False)


def sigmoid_edge(dtype: str) -> float:
    """The logit (nats) from which the sigmoid is exactly 1: 1 + e^-z rounds to 1 from b ln 2 on. Types below
    float32 round 1 - e^-z, whose neighbour below 1 is half as far: from (b + 1) ln 2 on."""
    return (SIGNIFICAND_BITS[dtype] + (dtype not in NOT_WIDENED)) * math.log(2)


@instrument(
    source=SOURCE,
    title="Sigmoid collapse",
    kind="description",
    why="Decisions whose gradient is rounded away no longer teach the network anything, and those on yes fall "
    "silent first.",
    formula="share of decisions with sigmoid(z) - y = 0 in the dtype of the logits; for y = 1 from z = b ln 2 on",
)
def sigmoid_collapse(binary_decisions: BinaryDecisions) -> SigmoidCollapse:
    """Share of yes-or-no decisions whose sigmoid rounds to its target, so that their gradient is exactly zero.

    binary_decisions: logits, targets and gradients of the loss that training uses
    (`diag.snapshot.objective.decisions`), of binary and multi-label losses. Targets other than 0 and 1 are left
    out, and decisions whose gradient is zero far from rounding, as those of a mask are. Margins are in float64.
    Where the gradients are not those of a sigmoid, up to one factor for each output and target, there is no
    verdict.

    Raises InvalidInput for a dtype other than bfloat16, float16, float32 and float64, and where every decision is
    masked. Source: rounding to nearest.
    """
    dtype = str(binary_decisions.logits.dtype).removeprefix("torch.")
    if dtype not in SIGNIFICAND_BITS:
        raise InvalidInput(f"The logits have dtype {dtype}; expected one of {', '.join(SIGNIFICAND_BITS)}.")
    d = _unmasked(binary_decisions)
    if not len(d.logits):
        raise InvalidInput(
            "Every decision has a gradient of zero far from rounding; give some that are not masked."
        )
    margins = torch.where(d.positive, d.logits.double(), -d.logits.double())
    exact = torch.sigmoid(-margins)
    size = d.gradients.double().abs()
    factor = _factors(d, size, exact)
    lost = size == 0
    positive, negative = margins[d.positive], margins[~d.positive]
    relative = ((size - factor * exact).abs() / (factor * exact))[d.positive]
    return SigmoidCollapse(
        collapsed=float(lost.double().mean()),
        collapsed_positive=_mean(lost[d.positive]),
        collapsed_negative=_mean(lost[~d.positive]),
        headroom=sigmoid_edge(dtype) - _median(positive),
        median_positive=_median(positive),
        median_negative=_median(negative),
        gradient_error=_median(relative),
        accuracy=float((margins > 0).double().mean()),
        zero_gradient_by_dtype={name: _zero_gradients(d, name) for name in SIGNIFICAND_BITS},
        margins=margins.cpu().numpy(),
        positive=d.positive.cpu().numpy(),
        dtype=dtype,
        preconditions=(_of_a_sigmoid(d, size, factor * exact, exact > CLEAR * 2.0 ** -SIGNIFICAND_BITS[dtype]),),
    )


def _unmasked(d: BinaryDecisions) -> BinaryDecisions:
    exact = torch.sigmoid(torch.where(d.positive, -d.logits.double(), d.logits.double()))
    kept = ~((d.gradients == 0) & (exact > UNROUNDED))
    return BinaryDecisions(d.logits[kept], d.positive[kept], d.gradients[kept], d.outputs[kept])


def _factors(d: BinaryDecisions, size: Tensor, exact: Tensor) -> Tensor:
    """The factor of each decision's output and target, as of weights, by least squares; 1 where it is not known."""
    group = 2 * d.outputs + d.positive.long()
    sums = size.new_zeros(int(group.max()) + 1, 2)
    sums.index_add_(0, group, torch.stack([size * exact, exact.square()], 1))
    known = sums[:, 1] > UNROUNDED**2
    return torch.where(known, sums[:, 0] / sums[:, 1].clamp_min(1e-300), 1.0)[group]


def _of_a_sigmoid(d: BinaryDecisions, size: Tensor, expected: Tensor, clear: Tensor) -> Precondition:
    """Where nothing rounds, gradients are in proportion to sigmoid(z) - y, and of its sign."""
    away = ((size - expected).abs() / expected)[clear]
    right = (d.gradients < 0) == d.positive
    share = float(away.mean()) if len(away) else 0.0
    holds = share <= SAME_SIGMOID and bool(right[clear & (size > 0)].all())
    return Precondition(
        "the loss is a cross-entropy of the sigmoid",
        holds,
        f"the loss is not a plain cross-entropy of the sigmoid (its gradients differ by {format_share(share)}), so "
        "the margins say nothing about its rounding.",
    )


def _zero_gradients(d: BinaryDecisions, dtype: str) -> float:
    z = d.logits.detach().to(getattr(torch, dtype)).requires_grad_()
    with torch.enable_grad():
        loss = F.binary_cross_entropy_with_logits(z, d.positive.to(z.dtype), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, z)
    return float((gradient == 0).double().mean())


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if len(values) else math.nan


def _median(values: Tensor) -> float:
    return float(values.median()) if len(values) else math.nan
