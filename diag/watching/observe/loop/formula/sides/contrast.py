"""Contrastive losses: what a softmax over likenesses asks for (see `likeness`), and losses that hold nothing but
the likeness of outputs of the same layers, which constant outputs satisfy best.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from diag.snapshot.autograd_graph import COPYING, kind_of, leaves_before, parents_of
from diag.snapshot.loop.contrast import ContrastFacts, ContrastLook
from diag.watching.observe.loop.formula.parts import Summand
from diag.watching.observe.loop.formula.reader import Reader
from diag.watching.observe.loop.formula.sides.likeness import (
    Likeness,
    Product,
    likenesses_of,
    product_behind,
)

ROUNDING_OF_ROWS = 1e-5
OF_LENGTH_ONE = 1e-3
BELOW_LARGEST = -5000.0  # a score below the largest of its row by more
TIMES_APART = 100.0  # times the distance of a pair: that of other rows
NODES_BETWEEN, NODES_TO_LEAVES = 256, 4000
# Operations after which outputs that are equal are equal still, whatever they are.
OF_OUTPUTS = frozenset(
    ("Slice", "Split", "SplitWithSizes", "Unbind", "Select", "Index", "Cat", "Stack", "Div", "Mul", "Sum", "Mean",
     "Expand", "ClampMin", "LinalgVectorNorm", "Norm", "Sqrt", "Pow", "Relu", "Tanh", "T", "Transpose", "Permute",
     "View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", *COPYING)
)  # fmt: skip
OF_DIFFERENCES = ("MseLoss", "L1Loss", "SmoothL1Loss", "HuberLoss")


class Contrasts(Reader[ContrastLook]):
    """Reads the softmax over likenesses, and whether anything keeps outputs apart."""

    NAME, EVERY = "contrast", 32

    def __init__(self, moment: Any) -> None:
        super().__init__(moment)
        self._read = self._drawn = self._first = 0
        self._alike = math.nan

    def read(self, parts: list[Summand]) -> None:
        """Look at the parts of the loss of a pass that is to be read."""
        super().read(parts)
        self._read += 1
        if not self.looks and self._drawn == self._read - 1 and parts and all(map(draws_together, parts)):
            self._drawn += 1
            self._first = self._first or self._moment.step
            self._alike = mean_likeness(parts)
            if self._drawn == self._read in (3, 6):
                self._moment.news((self.NAME, "drawn", self._drawn), self.NAME)

    def _look(self, parts: list[Summand]) -> ContrastLook | None:
        for scores in likenesses_of(parts):
            product = product_behind(scores)
            if product is not None:
                return contrast_look(self._moment.step, scores, product)
        return None

    def facts(self) -> ContrastFacts:
        """As plain data."""
        return ContrastFacts(tuple(self.looks), self._read, self._drawn, self._first, self._alike)


def contrast_look(step: int, scores: Likeness, product: Product) -> ContrastLook:
    """What one backward pass says of the rows, their answers and which of them is asked for."""
    values, asked = scores.values, scores.targets
    n, answers = values.shape
    rows = torch.arange(n)
    own = len(product.answers) == scores.count == answers and product.own
    largest = values.amax(1, keepdim=True)
    masked = ~(values - largest > BELOW_LARGEST)
    right, hidden = values[rows, asked], masked[rows, asked]
    one_mask = bool(hidden.any()) and _one_number(right[hidden])
    wrong = ~masked
    wrong[rows, asked] = False
    diagonal = torch.zeros_like(masked)
    if own:
        diagonal[rows, rows] = True
    return ContrastLook(
        step=step,
        rows=scores.count,
        answers=answers,
        own=own,
        shared=_shared(product),
        unit=all(bool(((t.norm(dim=1) - 1).abs() < OF_LENGTH_ONE).all()) for t in (product.rows, product.answers)),
        factor=abs(product.factor),
        masked=float(hidden.double().mean()) if one_mask else 0.0,
        itself=float((asked == rows).double().mean()) if own else 0.0,
        among=float((wrong & diagonal).sum() / n),
        free=float((~masked).sum(1).double().median()),
        equal=_equal(product, asked, scores.count),
        rank=_rank(values, right, wrong & ~diagonal),
        loss=float((values.logsumexp(1) - right).mean()),
    )


def _one_number(values: Tensor) -> bool:
    low, high = float(values.min()), float(values.max())
    return low == high or abs(high - low) <= OF_LENGTH_ONE * abs(low)


def _shared(product: Product) -> bool | None:
    one, other = (leaves_before(side, NODES_TO_LEAVES) for side, _ in product.sides)
    return one == other if one and other else None


def _equal(product: Product, asked: Tensor, count: int) -> bool:
    """Whether each row's right answer is its own embedding, and the next row's is not."""
    if len(product.answers) != count or int(asked.max()) >= len(product.answers):
        return False
    pair = (product.rows - product.answers[asked]).abs().amax(1)
    other = (product.rows - product.answers[asked.roll(1)]).abs().amax(1)
    size = float(product.rows.abs().max())
    return (
        bool((pair <= ROUNDING_OF_ROWS * size).all())
        and float(other.median()) > TIMES_APART * ROUNDING_OF_ROWS * size
    )


def _rank(values: Tensor, right: Tensor, wrong: Tensor) -> float:
    """The mean share of wrong answers below the right one, ties counted half."""
    counted = wrong.sum(1)
    some = counted > 0
    spread = torch.where(wrong, values, right[:, None])
    if not bool(some.any()) or float((spread - right[:, None]).abs().max()) <= ROUNDING_OF_ROWS:
        return math.nan
    below = ((values < right[:, None]) & wrong).sum(1) + ((values == right[:, None]) & wrong).sum(1) / 2
    return float((below[some] / counted[some]).mean())


# Losses that draw outputs together, and nothing else


def draws_together(p: Summand) -> bool:
    """Whether a part is smallest where two outputs of the same layers are equal, whatever they are."""
    if p.weight < 0:
        sides = _product_sides(p)
    else:
        sides = _difference_sides(p)
    if len(sides) != 2 or sides[0] == sides[1]:
        return False
    ends = [_layers(side) for side, _ in sides]
    return bool(ends[0]) and ends[0] == ends[1]


def _product_sides(p: Summand) -> list[tuple[Any, int]]:
    """The sides of a product of embeddings of length one, which is largest where they are equal."""
    saved = getattr(p.node, "_saved_self", None), getattr(p.node, "_saved_other", None)
    kept = [t for t in saved if isinstance(t, Tensor) and t.ndim > 1 and t.is_cpu]
    if p.kind != "Mul" or p.factors or len(kept) != len(saved):
        return []
    unit = all(bool(((t.detach().norm(dim=-1) - 1).abs() < OF_LENGTH_ONE).all()) for t in kept)
    return _sides(p.node) if unit else []


def _sides(node: Any) -> list[tuple[Any, int]]:
    return [side for side in node.next_functions if side[0] is not None]


def _difference_sides(p: Summand) -> list[tuple[Any, int]]:
    node = p.node
    if p.kind in OF_DIFFERENCES:
        return _sides(node)
    if p.is_square or p.kind in ("Abs", "Norm", "LinalgVectorNorm"):
        node = parents_of(node)[0]
        if (
            kind_of(node) == "Add" and len(parents_of(node)) == 1 and p.kind == "Norm"
        ):  # pairwise_distance adds 1e-6
            node = parents_of(node)[0]
        return _sides(node) if kind_of(node) == "Sub" and float(node._saved_alpha) == 1 else []
    return []


def _layers(start: Any) -> frozenset[int]:
    """The parameters of the last layers before a node; empty where anything lies between that may tell constant
    outputs apart."""
    found, waiting, seen = set[int](), [start], set[Any]()
    while waiting and len(seen) < NODES_BETWEEN:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        before = parents_of(node)
        own = [w for b in before for w in (b, *parents_of(b)) if kind_of(w) == "AccumulateGrad"]
        if own and kind_of(node) != "AccumulateGrad":
            found |= {id(w.variable) for w in own}
        elif kind_of(node) in OF_OUTPUTS:
            waiting += before
        else:
            return frozenset()
    return frozenset(found) if not waiting else frozenset()


def mean_likeness(parts: list[Summand]) -> float:
    """The mean cosine of different rows of what is drawn together; NaN where the graph keeps differences only."""
    p = parts[0]
    whole = p.kind in OF_DIFFERENCES or (p.kind == "Mul" and not p.is_square)
    rows = getattr(p.node, "_saved_self", None) if whole else None
    if not isinstance(rows, Tensor) or rows.ndim != 2 or len(rows) < 2 or not rows.is_cpu:
        return math.nan
    unit = torch.nn.functional.normalize(rows.detach().double(), dim=1)
    n = len(unit)
    return float((unit.sum(0).square().sum() - unit.square().sum()) / (n * (n - 1)))
