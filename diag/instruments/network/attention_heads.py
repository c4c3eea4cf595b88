"""Attention heads: whether they select at all, and whether they leave themselves a gradient.

A head whose weights lie on one key from the start has a softmax that is flat, so it hardly learns where to look;
one that gives all keys the same weight passes on their mean and selects nothing. A fresh head is nearly even and
sharpens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy
from numpy.typing import NDArray

from diag.display import format_number
from diag.errors import named
from diag.instruments.causes import Cause
from diag.instruments.optimization.course import SMALL, median
from diag.ranges import Share
from diag.registry import Kind, instrument
from diag.result import OUR_CHOICE, Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.history import History
from diag.snapshot.inside.attention import AttentionCall
from diag.snapshot.inside.scores import ENTROPY, KEYS, LOGIT

SOURCE = "Zhai et al. 2023, arXiv:2303.06296 (entropy collapse); arithmetic of one forward pass"
SHARP, EVEN = 0.1, 0.999  # entropy over that of an even spread; logits that vary by .08 give .999 for 32 keys
SHARE_OF_HEADS = 0.5  # of the heads
FIRST_STEPS, STEPS_BEFORE_UNIFORM = 3, 100  # steps
LARGE_LOGITS = 100.0  # logits: where QK-Clip (Kimi K2) begins to cut
WEIGHTS_MOVED = 0.1  # of the weights' size, before an even spread is more than a start
FEW_KEYS = 4
EXPLAINED_BY = (
    Cause.LEARNING_RATE_TOO_HIGH, Cause.TRAINING_DIVERGED, Cause.INPUTS_NOT_NORMALIZED, Cause.INITIALIZATION_SCALE,
    Cause.NOT_FINITE, Cause.INITIALIZATION_CONSTANT, Cause.WARMUP_MISSING, Cause.WEIGHT_DECAY_TOO_STRONG,
    Cause.LEARNING_RATE_TOO_LOW, Cause.INPUTS_CONSTANT, Cause.GRADIENTS_NOT_ZEROED,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionHeads(Result):
    """Of all heads, in the order of the forward pass, on some 64 examples and 64 queries of each."""

    layers: tuple[str, ...] = measured("the module of each head")
    entropy: NDArray[numpy.float64] = measured(
        "entropy of a head's weights over that of an even spread", unit="share", shape="(heads,)"
    )
    largest: NDArray[numpy.float64] = measured("the largest absolute logit of each", shape="(heads,)")
    moved: float = measured("distance of the weights from the start over their size, the median tensor")

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        return Verdict(
            Level.UNKNOWN if self._sharp().mean() >= SHARE_OF_HEADS else Level.OK,
            f"A typical head spreads its weight with {format_number(float(numpy.median(self.entropy)))} of the "
            f"entropy of an even spread; the largest logit is {format_number(float(self.largest.max()))}.",
            source=SOURCE,
            value=float(numpy.median(self.entropy)),
        )

    def _sharp(self) -> NDArray[numpy.bool_]:
        return numpy.asarray(self.entropy < self.provenance.settings.get("sharp", SHARP))

    @classmethod
    def trend(cls, series: Sequence[tuple[int, Self]]) -> Verdict:
        """Heads that sit on one key from the start, or came to with logits that grew; heads that stay even."""
        judged = [(step, r) for step, r in series if r.unmet() is None]
        if not judged:
            return series[-1][1].verdict()
        (step, first), (now, last) = judged[0], judged[-1]
        if first._sharp().mean() >= SHARE_OF_HEADS and step <= FIRST_STEPS:
            return first._on_one_key(step, from_the_start=True)
        if (
            last._sharp().mean() >= SHARE_OF_HEADS
            and float(numpy.median(last.largest[last._sharp()])) > LARGE_LOGITS
        ):
            return last._on_one_key(now, from_the_start=False)
        even = last.provenance.settings.get("even", EVEN)
        if now >= STEPS_BEFORE_UNIFORM and last.moved > WEIGHTS_MOVED and float(last.entropy.min()) > even:
            return last._even(now, even)
        return last.verdict()

    def _on_one_key(self, step: int, from_the_start: bool) -> Verdict:
        sharp = self._sharp()
        where = tuple(dict.fromkeys(name for name, s in zip(self.layers, sharp, strict=True) if s))
        how = "from the start" if from_the_start else "and its logits have grown"
        return Verdict(
            Level.WARNING,
            f"Attention sits on one key {how}: in {int(sharp.sum())} of {len(sharp)} heads ({named(where)}) the "
            f"weights have under {self.provenance.settings.get('sharp', SHARP):.0%} of the entropy of an even "
            f"spread, with logits of up to {format_number(float(self.largest.max()))}, where the softmax is flat.",
            advice="Divide queries times keys by the root of the head's width; start their weights smaller; "
            "normalise queries and keys (QK-norm) where logits grow.",
            source=SOURCE,
            confidence=Confidence.STRONG_EMPIRICAL,
            refutation="With logits divided by ten the training is not better.",
            value=float(numpy.median(self.entropy)),
            threshold=SHARP,
            threshold_source=OUR_CHOICE,
            layers=where,
            cause=Cause.ATTENTION_ONE_HOT if from_the_start else Cause.ATTENTION_LOGITS_GROW,
            explained_by=EXPLAINED_BY,
            step=step,
        )

    def _even(self, step: int, even: float) -> Verdict:
        return Verdict(
            Level.WARNING,
            f"Attention selects nothing: after {step:,} steps each of {len(self.entropy)} heads spreads its weight "
            f"over all keys, with at least {format_number(float(self.entropy.min()))} of the entropy of an even "
            "spread, while the weights have moved.",
            advice="Look at what queries times keys are divided by (the root of the head's width), and whether "
            "gradients reach the queries' and keys' weights.",
            source=SOURCE,
            confidence=Confidence.STRONG_EMPIRICAL,
            refutation="With each head replaced by the mean over its keys the loss is higher.",
            value=float(self.entropy.min()),
            threshold=even,
            threshold_source=OUR_CHOICE,
            layers=tuple(dict.fromkeys(self.layers)),
            cause=Cause.ATTENTION_UNIFORM,
            explained_by=EXPLAINED_BY,
        )

    def plot(self, ax: Any = None) -> Any:
        """The entropy of every head."""
        ax.plot(self.entropy, marker="o", markersize=3, linestyle="")
        ax.set(xlabel="head, in the order of the forward pass", ylabel="entropy over an even spread's", ylim=(0, 1))


@instrument(
    source=SOURCE,
    title="Attention heads",
    kind=Kind.CHECK,
    why="Heads that look everywhere alike select nothing, and heads whose softmax has become one-hot hardly "
    "get a gradient: both take capacity away, and growing logits often come before a loss that diverges.",
)
def attention_heads(
    attention_calls: Sequence[AttentionCall],
    history: History | None = None,
    *,
    sharp: Share = SHARP,
    even: Share = EVEN,
) -> AttentionHeads:
    """How evenly each attention head spreads its weight over the keys, and how large its logits are.

    attention_calls: those heard in a forward pass (`diag.snapshot.inside.attention`). history: the record so far,
    to see whether the weights have moved. A warning where at least half of the heads have an entropy below `sharp`
    of an even spread's in the first three steps, or later with logits above 100; and where after a hundred steps
    and more every head has above `even` of it. Heads that see fewer than four keys are left out. Raises nothing of
    its own.
    """
    heads = [(call.layer, rows[~rows.isnan().any(-1)]) for call in attention_calls for rows in call.rows]
    known = [(layer, rows) for layer, rows in heads if len(rows) and float(rows[:, KEYS].max()) >= FEW_KEYS]
    return AttentionHeads(
        layers=tuple(layer for layer, _ in known),
        entropy=numpy.array([float(rows[:, ENTROPY].mean()) for _, rows in known]),
        largest=numpy.array([float(rows[:, LOGIT].max()) for _, rows in known]),
        moved=_moved(history),
        preconditions=(
            Precondition("heads", bool(known), f"no head sees {FEW_KEYS} keys or more by scores that are finite."),
        ),
    )


def _moved(history: History | None) -> float:
    """Distance from the start over the norm, at the last step at which they were measured."""
    if history is None or not len(history.steps):
        return float("nan")
    large = numpy.asarray(history.sizes) >= SMALL
    with numpy.errstate(divide="ignore", invalid="ignore"):
        share = numpy.asarray(history.distance[:, large], float) / history.parameter_norm[:, large]
    rows = numpy.isfinite(share).any(1) if share.size else numpy.zeros(0, bool)
    return float(median(share[rows][-1])) if rows.any() else float("nan")
