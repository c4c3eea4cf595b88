"""Rows of the training data whose labels look wrong, from the margins that training's own batches gave them.

The margin of a row is the logit of its label less the largest other one, before the step that learns from it. A
wrong label is learned against what all the others teach: the network is as sure of another answer there as it is
of the right one elsewhere, and the row's mean margin (the area under the margin, Pleiss et al. 2020) lies as far
below zero as others lie above it. Rows that are hard, rare or between two classes have margins around zero: where
these are many beside the very negative ones, nothing is said.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from numpy.typing import NDArray

from diag.display import LARGEST_INPUT_SHOWN, displayed, format_share
from diag.errors import named
from diag.instruments.causes import Cause
from diag.ranges import Share
from diag.registry import instrument
from diag.result import OUR_CHOICE, Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.rows import RowFacts

SOURCE = "Pleiss et al. 2020, arXiv:2001.10528"
LEARNED = 0.6  # accuracy from which on margins count
LOOKS = 3  # of them at least
SURE = 1.0  # nats: the median margin of what is answered right
NAMED_FROM, DEEP = 0.25, 0.5  # of that median, below zero: rows that are named, and those by which it is decided
FOR_EACH_SHALLOW = 3.0  # very negative rows for each that is only a little negative
FEWEST = 6  # and so many more
SHARE_OF_WRONG = 0.02
MOST_SURE = 2.0  # times the median of what is answered right at the same time: larger margins count as that
CLASS = 0.5  # of a class's rows: where more look wrong, the class is not learned
CHANGED = 0.01  # of the sights: labels that change say nothing of a row
STRETCHES_AT_MOST = 0.2
FEWER = 0.05  # rows that were met less often than the others
ROWS_LISTED = 400
ROWS_PICTURED = 12
TOGETHER_AT_LEAST = 8  # rows in one stretch of the data
DECIDE = 1 << 15  # rows


@dataclass(frozen=True, kw_only=True, eq=False)
class RowLabels(Result):
    """Of the rows that training has met, as they were when it was plainest."""

    count: int = measured("rows whose labels look wrong")
    rows: int = measured("rows that were followed")
    looks: int = measured("sights of a row that its mean margin is of", remark="0 where it was not judged")
    sure: float = measured("median margin of the rows that are answered right", unit="nats")
    deep: int = measured("rows whose mean margin is below minus half of that")
    shallow: int = measured("rows whose mean margin is between that and zero")
    named: NDArray[numpy.int32] = measured("rows whose labels look wrong, the surest first", shape="(k,)")
    labels: NDArray[numpy.int32] = measured("their labels", shape="(k,)")
    answers: NDArray[numpy.int32] = measured("the network's answers for them", shape="(k,)")
    where: tuple[str, ...] = measured("the rows as they can be found")
    counted_in: str = measured("what the numbers of rows are places in")
    run: tuple[int, ...] = measured(
        "where the named rows lie together in the data: the first, the last, and how many",
        remark="empty where they do not",
    )
    found: bool = measured("whether they are told apart from hard rows")
    row_inputs: NDArray[Any] = measured(
        "inputs of the first of these rows", remark="empty where not at hand", shape="(s, ...)"
    )
    counts: NDArray[numpy.int32] = measured("rows by mean margin", shape="(40,)")
    edges: NDArray[numpy.float32] = measured("edges of these counts", unit="nats", shape="(41,)")

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        if not self.found:
            text = f"No labels of the {self.rows:,} rows that training met look wrong by how they were learned."
            return Verdict(Level.OK, text, source=SOURCE, value=0.0, threshold=self.setting("warn_at"))
        share = self.count / self.rows
        place = f" of the {self.counted_in}" if self.counted_in else " met first at"
        together = (
            f" {self.run[2]:,} of them lie together in rows {self.run[0]:,} to {self.run[1]:,}." if self.run else ""
        )
        return Verdict(
            Level.WARNING,
            f"The labels of about {format_share(share)} of the examples look wrong ({self.count:,} of "
            f"{self.rows:,}; rows{place} {named(self.where, 5)}, the surest first): seen {self.looks} times each "
            "on average, the network was as sure of another answer there as it is of the label elsewhere, each "
            f"time before it learned from the row.{together}",
            advice="Look at these rows and correct or leave out their labels; stop before they are learned "
            "by heart.",
            source=SOURCE,
            confidence=Confidence.STRONG_EMPIRICAL,
            refutation="A person who sees these inputs agrees with their labels.",
            value=share,
            unit="share",
            threshold=self.setting("warn_at"),
            threshold_source=OUR_CHOICE,
            cause=Cause.LABELS_WRONG,
            explained_by=(Cause.LABELS_SHUFFLED, Cause.TARGETS_SHIFTED, Cause.TARGETS_CAST),
            examples=tuple(map(int, self.named[:200])),
            step=1,
        )

    def plot(self, ax: Any = None) -> Any:
        """The mean margins of all rows."""
        ax.stairs(self.counts, self.edges, fill=True)
        ax.axvline(0.0, color="black", linewidth=0.8, linestyle=":")
        ax.set(xlabel="mean margin of a row's label (nats)", ylabel="rows")

    def examples(self) -> Iterator[dict[str, Any]]:
        """The rows whose labels look most wrong, with label, the network's answer and, where at hand, the input."""
        for at, (row, label, answer) in enumerate(zip(self.named.tolist(), self.labels, self.answers, strict=True)):
            item = {"row": row, "group": "labels that look wrong", "label": f"{label} ({answer}?)"}
            yield item | (displayed(self.row_inputs[at]) if at < len(self.row_inputs) else {})


@dataclass(frozen=True)
class Margins:
    """Mean margins of some rows over some of their sights, and what follows from them."""

    area: NDArray[numpy.float64]
    sure: float
    looks: int

    @property
    def deep(self) -> int:
        """Rows that are as surely answered otherwise."""
        return int((self.area < -DEEP * self.sure).sum())

    @property
    def shallow(self) -> int:
        """Rows that are answered otherwise, and not surely."""
        return int(((self.area >= -DEEP * self.sure) & (self.area < 0)).sum())

    @property
    def named(self) -> NDArray[numpy.int64]:
        """The rows whose labels look wrong, the surest first."""
        rows = numpy.flatnonzero(self.area < -NAMED_FROM * self.sure)
        return rows[numpy.argsort(self.area[rows], kind="stable")]

    @property
    def plain(self) -> float:
        """By how many rows the very negative ones are more than hard rows would be."""
        return self.deep - FOR_EACH_SHALLOW * self.shallow - FEWEST


def _prefixes(facts: RowFacts, rows: NDArray[Any]) -> Iterator[Margins]:
    """The mean margins from the first sight on at which most were answered right, up to each later one."""
    margins = facts.margins[rows].astype(float)
    known = numpy.isfinite(margins)
    whole = known.mean(0) > 1 - FEWER
    columns = int(whole.argmin()) if not whole.all() else len(whole)
    right = (margins[:, :columns] > 0).sum(0) / numpy.maximum(known[:, :columns].sum(0), 1)
    learned = numpy.flatnonzero(right >= LEARNED)
    if not len(learned):
        return
    first = int(learned[0])
    margins, known = margins[:, first:columns], known[:, first:columns]
    # One moment at which the network blows up must not outweigh the others.
    sure = numpy.array([_median_of_positive(column[k]) for column, k in zip(margins.T, known.T, strict=True)])
    total = numpy.cumsum(numpy.where(known, (margins / sure).clip(-MOST_SURE, MOST_SURE), 0.0), 1)
    number = numpy.cumsum(known, 1)
    for k in range(columns - first):
        looks = (k + 1) * facts.width
        if looks < LOOKS:
            continue
        area = total[:, k] / numpy.maximum(number[:, k], 1)
        positive = area[area > 0]
        if len(positive) >= LEARNED * len(area):
            usual = float(numpy.median(sure[: k + 1]))
            yield Margins(area * usual, float(numpy.median(positive)) * usual, looks)


def _median_of_positive(margins: NDArray[Any]) -> float:
    positive = margins[margins > 0]
    return float(numpy.median(positive)) if len(positive) else math.inf


def _judged(facts: RowFacts, rows: NDArray[Any], share: float) -> tuple[Margins | None, bool, NDArray[numpy.int64]]:
    """(the moment when it was plainest, whether wrong labels were found, their rows). Of very many rows some
    decide, and then all are looked at."""
    some = rows[:: -(-len(rows) // DECIDE) or 1]
    judged = list(_prefixes(facts, some))
    wrong = [m for m in judged if _wrong(m, facts.labels[some], share)]
    best = max(wrong or judged, key=lambda m: m.plain, default=None)
    if best is None or not wrong:
        return best, False, rows[:0]
    if len(some) < len(rows):
        same = [m for m in _prefixes(facts, rows) if m.looks == best.looks]
        best = same[0] if same else best
    return best, True, (some if len(best.area) == len(some) else rows)[best.named]


def _wrong(m: Margins, labels: NDArray[Any], share: float) -> bool:
    """Whether wrong labels are told apart from rows that are hard, rare, or of a class not learned."""
    if not (m.sure >= SURE and m.plain >= 0 and m.deep >= share * len(m.area)):
        return False
    named = m.named
    shares = numpy.bincount(labels[named], minlength=int(labels.max()) + 1) / numpy.maximum(
        numpy.bincount(labels, minlength=int(labels.max()) + 1), 1
    )
    return bool(shares.max() <= CLASS)


@instrument(
    source=SOURCE,
    title="Labels of the training rows",
    kind="check",
    why="Wrong labels are usually learned by heart late in a training, at the cost of what carries over to "
    "new data; found early, they can be corrected.",
    formula="mean margin of a row over its batches, margin = z_y - ln sum_{k != y} exp z_k",
)
def row_labels(loop: Loop, *, warn_at: Share = SHARE_OF_WRONG) -> RowLabels:
    """Which rows' labels look wrong, by the margins that training's own batches gave them.

    Counted is a row's margin at each sight, before the step that learns from it, since 60 % were answered right.
    Its mean over three sights and more is set against the median S of the positive means, which must be 1 nat. It
    warns where rows below -S/2 are a share of `warn_at` of all and six more than three times those between -S/2
    and zero, so that they are a group of their own and no tail, and no class loses half of its rows; named are the
    rows below -S/4, at the moment when it was plainest. Rows are known by their place in a DataLoader's data set,
    else by their inputs. What is said depends on the training alone and not on the time that it takes.

    Raises nothing of its own. Source: Pleiss et al. 2020, arXiv:2001.10528 (whose threshold comes from an extra
    class instead).
    """
    facts = loop.rows
    met = facts.looks > 0
    enough = met & (facts.looks >= min(LOOKS, int(facts.looks.max(initial=0))))
    rows = numpy.flatnonzero(enough)
    labels = facts.labels[rows]
    preconditions = tuple(_preconditions(facts, labels))
    best, found, wrong = (
        _judged(facts, rows, warn_at) if all(p.holds for p in preconditions) else (None, False, rows)
    )
    kept = wrong[:ROWS_LISTED] if found else rows[:0]
    area = numpy.zeros(0) if best is None else best.area
    counts, edges = numpy.histogram(area, bins=40)
    return RowLabels(
        count=len(wrong) if found else 0,
        rows=len(rows),
        looks=0 if best is None else best.looks,
        sure=math.nan if best is None else best.sure,
        deep=0 if best is None else best.deep,
        shallow=0 if best is None else best.shallow,
        named=_numbers(facts, kept),
        labels=facts.labels[kept],
        answers=facts.answers[kept],
        where=tuple(facts.name(int(r)) for r in kept),
        counted_in=facts.counted_in,
        run=_run(_numbers(facts, wrong), _numbers(facts, rows)) if found and facts.counted_in else (),
        found=found,
        row_inputs=_row_inputs(facts, kept[:ROWS_PICTURED]),
        counts=counts.astype(numpy.int32),
        edges=edges.astype(numpy.float32),
        preconditions=preconditions,
    )


def _run(named: NDArray[Any], followed: NDArray[Any]) -> tuple[int, ...]:
    """The stretch of the data in which named rows outnumber the others the most, where half of all named rows lie
    in it: (first, last, how many of them)."""
    followed = numpy.sort(followed)
    is_named = numpy.isin(followed, named)
    score = numpy.concatenate([[0], numpy.cumsum(numpy.where(is_named, 1, -1))])
    gained = score - numpy.minimum.accumulate(score)
    end = int(gained.argmax())
    begin = int(score[: end + 1].argmin())
    inside = int(is_named[begin:end].sum())
    many = inside >= max(TOGETHER_AT_LEAST, len(named) / 2)
    return (int(followed[begin]), int(followed[end - 1]), inside) if many else ()


def _row_inputs(facts: RowFacts, rows: NDArray[Any]) -> NDArray[Any]:
    """The inputs of these rows; empty where they are not at hand, or large."""
    inputs = facts.inputs_at(facts.number[rows]) if facts.counted_in else None
    if inputs is None or inputs.dtype is torch.bfloat16 or inputs[0].numel() > LARGEST_INPUT_SHOWN:
        return numpy.zeros(0)
    return inputs.numpy()


def _numbers(facts: RowFacts, rows: NDArray[Any]) -> NDArray[numpy.int32]:
    return facts.number[rows] if facts.counted_in else rows.astype(numpy.int32)


def _preconditions(facts: RowFacts, labels: NDArray[Any]) -> Iterator[Precondition]:
    yield Precondition("rows", not facts.reason, f"{facts.reason}.")
    aside = sum(m.rows for m in facts.moved)
    aside = aside if aside <= STRETCHES_AT_MOST * facts.compared else 0  # a stretch of other labels is no habit
    stable = facts.changed - aside <= CHANGED * facts.compared
    yield Precondition("labels", stable, "the same row has another label at another time.")
    yield Precondition("several classes", len(numpy.unique(labels)) > 1, "all rows have one label.")
    looks = int(facts.looks.max(initial=0))
    yield Precondition("sights", looks >= LOOKS, f"no row was met {LOOKS} times.")
