"""Rows whose labels look wrong, from the course of their margins while the network learns.

The margin of an example is the logit of its label less the largest other one. Examples with a wrong label are
learned against what the others teach, so their margins stay negative for long and their mean over training, the
area under the margin, is low even where the network knows them by heart in the end (Pleiss et al. 2020).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from diag.display import LARGEST_INPUT_SHOWN, displayed, format_share
from diag.errors import named
from diag.instruments.causes import Cause
from diag.ranges import Share
from diag.registry import instrument
from diag.result import OUR_CHOICE, Confidence, Level, Precondition, Result, Verdict, measured

SOURCE = "Pleiss et al. 2020, arXiv:2001.10528"
# Accuracies from which on margins are counted: of all, of what does not look wrong.
ACCURACY_OF_ALL, ACCURACY_OF_THE_REST = 0.6, 0.97
FEWEST_COURSES, FEWEST_WHILE_RISING = 8, 18  # measurements; and how many where the accuracy is still rising
RISING = 0.03
SURE_MARGIN = 1.5  # nats: the median margin of what is answered right, below which ambiguity explains as much
OPPOSED = 0.25  # of that median
SHARE_OF_WRONG_LABELS = 0.03
ROWS_SHOWN = 12


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelAudit(Result):
    """Of the probe set, row by row; the course over training is what judges (`trend`)."""

    accuracy: float = measured("examples answered as their label says", unit="share")
    negative: float = measured("examples whose label is not the network's answer", unit="share")
    margins: NDArray[numpy.float32] = measured("margin of each example's label", unit="nats", shape="(n,)")
    answers: NDArray[numpy.int32] = measured("the network's answer for each example", shape="(n,)")
    labels: NDArray[numpy.int32] = measured("the label of each example", shape="(n,)")
    shown_rows: NDArray[numpy.int32] = measured("rows with the lowest margins, whose inputs are kept", shape="(k,)")
    row_inputs: NDArray[Any] = measured("these inputs", remark="empty where they are large", shape="(k, ...)")

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        return Verdict(
            Level.DESCRIPTION,
            f"{format_share(self.negative)} of the {len(self.margins):,} examples are not answered as their label "
            "says; which labels look wrong follows from the course over training.",
            source=SOURCE,
        )

    @classmethod
    def trend(cls, series: Sequence[tuple[int, Self]]) -> Verdict:
        """A warning where some rows' margins stayed negative while the others were learned with certainty; what was
        seen once is not taken back when the network has learned these rows by heart."""
        judged = [cls._judged(series[:k]) for k in range(len(series), min(FEWEST_COURSES, len(series)) - 1, -1)]
        warned = [verdict for verdict in judged if verdict.level is Level.WARNING]
        return max(warned, key=lambda verdict: verdict.value or 0.0) if warned else judged[0]

    @classmethod
    def _judged(cls, series: Sequence[tuple[int, Self]]) -> Verdict:
        last = series[-1][1]
        area, median, counted = area_under_the_margin(series)
        if last.unmet() is not None or counted < FEWEST_COURSES or not median >= SURE_MARGIN:
            return last.verdict()
        earlier = series[-min(6, len(series))][1].accuracy
        if counted < FEWEST_WHILE_RISING and last.accuracy - earlier >= RISING:
            return last.verdict()
        suspicious = numpy.flatnonzero(area < -OPPOSED * median)
        share = len(suspicious) / len(area)
        limit = last.setting("warn_at")
        rows = suspicious[numpy.argsort(area[suspicious], kind="stable")]
        about: dict[str, Any] = {
            "value": share,
            "unit": "share",
            "threshold": limit,
            "threshold_source": OUR_CHOICE,
            "source": SOURCE,
        }
        if share < limit:
            found = f"{len(rows):,} of {len(area):,} labels look wrong by how their rows were learned."
            return Verdict(Level.OK, found, examples=tuple(map(int, rows[:50])), **about)
        return Verdict(
            Level.WARNING,
            f"The labels of about {format_share(share)} of the examples look wrong ({len(rows):,} of {len(area):,} "
            f"in the probe set, rows {named(rows.tolist(), 5)}, the surest first): the network held another answer "
            "for them for most of the training, against what it is sure of elsewhere.",
            advice="Look at these rows and correct or leave out their labels; stop before they are learned "
            "by heart.",
            confidence=Confidence.STRONG_EMPIRICAL,
            refutation="A person who sees these inputs agrees with their labels.",
            cause=Cause.LABELS_WRONG,
            step=1,
            # The rows of training itself, where they can be told apart, say the same of more of them.
            explained_by=(Cause.LABELS_WRONG, Cause.LABELS_SHUFFLED, Cause.TARGETS_SHIFTED, Cause.TARGETS_CAST),
            examples=tuple(map(int, rows[:200])),
            **about,
        )

    @classmethod
    def trend_examples(cls, series: Sequence[tuple[int, Self]]) -> Iterator[dict[str, Any]]:
        """The rows whose labels look most wrong, with label, the network's answer and input."""
        last, rows = series[-1][1], cls.trend(series).examples[:ROWS_SHOWN]
        pictures = {
            int(r): x for _, result in series for r, x in zip(result.shown_rows, result.row_inputs, strict=False)
        }
        answers = _usual_answers(series)
        for row in rows:
            item = {"row": row, "group": "labels that look wrong", "label": f"{last.labels[row]} ({answers[row]}?)"}
            yield item | (displayed(pictures[row]) if row in pictures else {})

    def plot(self, ax: Any = None) -> Any:
        """The margins of all examples."""
        ax.hist(self.margins, bins=40)
        ax.axvline(0.0, color="black", linewidth=0.8, linestyle=":")
        ax.set(xlabel="margin of the label (nats)", ylabel="examples")

    @classmethod
    def plot_trend(cls, ax: Any, series: Sequence[tuple[int, Self]]) -> None:
        """The area under the margin of all examples."""
        area, _, _ = area_under_the_margin(series)
        ax.hist(area, bins=40)
        ax.axvline(0.0, color="black", linewidth=0.8, linestyle=":")
        ax.set(xlabel="area under the margin (nats)", ylabel="examples")


def area_under_the_margin(series: Sequence[tuple[int, LabelAudit]]) -> tuple[NDArray[numpy.float64], float, int]:
    """(mean margin of each example, the median of the positive ones, measurements that count).

    Counted are measurements since the network answered `ACCURACY_OF_ALL` of the examples right, and of these the
    ones since it answered `ACCURACY_OF_THE_REST` of those that do not look wrong: what is only learned late is no
    wrong label. Measurements on another number of examples than the last are left out.
    """
    n = len(series[-1][1].margins)
    results = [r for _, r in series if len(r.margins) == n]
    since = next((i for i, r in enumerate(results) if r.accuracy >= ACCURACY_OF_ALL), None)
    if since is None or not n:
        return numpy.zeros(n), math.nan, 0
    margins = numpy.stack([r.margins for r in results[since:]]).astype(float)
    area, median = _area(margins)
    others = area >= -OPPOSED * median if math.isfinite(median) else numpy.ones(n, bool)
    known = (margins[:, others] > 0).mean(1) if others.any() else numpy.zeros(len(margins))
    first = (
        int(numpy.argmax(known >= ACCURACY_OF_THE_REST)) if (known >= ACCURACY_OF_THE_REST).any() else len(margins)
    )
    if first == len(margins):
        return area, math.nan, 0
    return (*_area(margins[first:]), len(margins) - first)


def _area(margins: NDArray[numpy.float64]) -> tuple[NDArray[numpy.float64], float]:
    area = margins.mean(0)
    positive = area[area > 0]
    return area, float(numpy.median(positive)) if len(positive) else math.nan


def _usual_answers(series: Sequence[tuple[int, LabelAudit]]) -> list[int]:
    """What the network answered most often for each example where it was not the label."""
    last = series[-1][1]
    answers = numpy.stack([r.answers for _, r in series if len(r.answers) == len(last.labels)])
    found = []
    for row, label in enumerate(last.labels.tolist()):
        others = answers[:, row][answers[:, row] != label]
        found.append(int(numpy.bincount(others).argmax()) if len(others) else label)
    return found


@instrument(
    source=SOURCE,
    title="Labels that look wrong",
    passes=lambda settings: 1.0,
    why="Wrong labels are usually learned by heart late in a training, at the cost of what carries over to "
    "new data; found early, they can be corrected.",
    formula="area_i = mean over time of margin_i, margin = z_y - ln sum_{k != y} exp z_k",
)
def label_audit(
    logits: Tensor, labels: Tensor, inputs: Any = None, *, warn_at: Share = SHARE_OF_WRONG_LABELS
) -> LabelAudit:
    """Which rows' labels look wrong, from the course of their margins while the network learns.

    logits (n, K), labels (n,) of the probe set; inputs: to show the rows. One measurement describes; over a run the
    area under the margin of each row is its mean margin since the network answered 60 % right. Rows whose area is
    below minus a quarter of the median of the positive ones look wrong; from a share of `warn_at` of them on it
    warns, where eight measurements were made, the accuracy no longer rises and that median is above 1.5 nats.
    Raises nothing of its own. Source: Pleiss et al. 2020, arXiv:2001.10528 (whose threshold comes from an extra
    class instead).
    """
    z = logits.detach().double().cpu()
    y = labels.detach().cpu()
    own = z.gather(1, y[:, None])[:, 0]
    others = z.scatter(1, y[:, None], -torch.inf).amax(1)
    margins = (own - others).clamp(-1e30, 1e30)
    one_each = isinstance(inputs, Tensor) and len(inputs) == len(y)
    rows, row_inputs = margins.argsort(stable=True)[:ROWS_SHOWN], torch.zeros(0, dtype=torch.float32)
    if one_each and inputs[0].numel() <= LARGEST_INPUT_SHOWN:
        row_inputs = inputs.detach().cpu()[rows]
    return LabelAudit(
        accuracy=float((margins > 0).double().mean()),
        negative=float((margins <= 0).double().mean()),
        margins=margins.float().numpy(),
        answers=z.argmax(1).to(torch.int32).numpy(),
        labels=y.to(torch.int32).numpy(),
        shown_rows=rows.to(torch.int32).numpy() if len(row_inputs) else numpy.zeros(0, numpy.int32),
        row_inputs=row_inputs.numpy() if row_inputs.dtype is not torch.bfloat16 else row_inputs.float().numpy(),
        preconditions=(
            Precondition("one label an example", inputs is None or one_each, "an example has several labels."),
        ),
    )
