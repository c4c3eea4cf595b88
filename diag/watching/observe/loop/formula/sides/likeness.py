"""Softmax over likenesses of embeddings (InfoNCE, NT-Xent, two towers) among the parts of a loss: the scores of
each row, which of them is asked for, and the embeddings that they are products of.

Cross-entropy of torch, one entry of each row of a log-softmax, and an entry less the row's logsumexp are read
alike. The scores are known up to a number added to each row. A parameter, as the weight of classes, is no
embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diag.snapshot.autograd_graph import PASSING_ON, kind_of, parents_of, signed
from diag.watching.observe.loop.formula.parts import Summand, given_shape

ROWS_READ = 256
LONGEST_WAY = 24  # nodes between the scores and the product
REARRANGED = ("T", "Transpose", "Permute", "Expand", *PASSING_ON)
WITH_CONSTANTS = ("Add", "Sub", "MaskedFill", "Where", "Index", "IndexPut", "CopySlices", "Fill", "Scatter")


@dataclass(frozen=True)
class Likeness:
    """Of the first rows: values (n, K) up to a number a row, and the answer that is asked for, (n,). node: the one
    that gave the scores; count: of all rows."""

    values: Tensor
    targets: Tensor
    node: Any
    count: int


@dataclass(frozen=True)
class Product:
    """What scores are a multiple of: rows (n, d) and answers (K, d), and the factor, NaN where it is not known;
    the nodes that gave the two sides, with the number of their output."""

    rows: Tensor
    answers: Tensor
    factor: float
    sides: tuple[tuple[Any, int], tuple[Any, int]]

    @property
    def own(self) -> bool:
        """Whether rows and answers are one set of embeddings, from one place of the graph."""
        return _origin(*self.sides[0]) == _origin(*self.sides[1])


def likenesses_of(parts: list[Summand]) -> Iterator[Likeness]:
    """The scores of each softmax whose log-probabilities the parts hold."""
    normalisers = {id(p.node.next_functions[0][0]): p for p in parts if p.kind == "Logsumexp"}
    for p in parts:
        before = next(iter(parents_of(p.node)), None)
        if before is None:
            continue
        found = None
        if p.kind == "NllLoss" and kind_of(before) == "LogSoftmax":
            found = p.node._saved_self, p.node._saved_target, parents_of(before)[0]
        elif p.kind == "LogSoftmax" and p.factors:
            found = p.node._saved_result, _single(p.weights), before
        elif kind_of(before) == "LogSoftmax":
            found = before._saved_result, picked_answers(p), parents_of(before)[0]
        elif id(before) in normalisers:
            found = getattr(normalisers[id(before)].node, "_saved_self", None), picked_answers(p), before
        if found is not None and (kept := _kept(*found)) is not None:
            yield kept


def _kept(values: Any, targets: Any, node: Any) -> Likeness | None:
    if not isinstance(values, Tensor) or not isinstance(targets, Tensor) or values.ndim != 2 or not values.is_cpu:
        return None
    if targets.shape != values.shape[:1] or len(values) < 2 or values.shape[1] < 2:
        return None
    some, asked = values.detach()[:ROWS_READ].double(), targets[:ROWS_READ]
    inside = (asked >= 0) & (asked < values.shape[1])
    return Likeness(some, asked, node, len(values)) if bool(inside.all()) else None


def picked_answers(p: Summand) -> Tensor | None:
    """Which entry of each row an operation takes, where it takes one of each, in order."""
    shape = given_shape(*p.node.next_functions[0])
    if shape is None or len(shape) != 2:
        return None
    if p.kind.startswith("Diagonal"):
        same = shape[0] <= shape[1] and not signed(p.node._saved_offset)
        return torch.arange(shape[0]) if same else None
    if p.kind == "Gather" and signed(p.node._saved_dim) % 2 == 1 and p.shape == (shape[0], 1):
        picked: Tensor = p.node._saved_index[:, 0]
        return picked
    return _indexed(list(p.node._saved_indices), shape) if p.kind == "Index" else None


def _indexed(indices: list[Tensor | None], shape: tuple[int, ...]) -> Tensor | None:
    if len(indices) == 1 and indices[0] is not None and indices[0].dtype == torch.bool and indices[0].ndim == 2:
        indices = list(indices[0].nonzero().unbind(1))
    if len(indices) != 2 or any(i is None or i.ndim != 1 or not i.is_cpu for i in indices):
        return None
    rows, columns = indices
    every = rows is not None and len(rows) == shape[0] and bool((rows == torch.arange(shape[0])).all())
    return columns if every else None


def _single(weights: Tensor) -> Tensor | None:
    """The one entry of each row that counts."""
    counted = weights != 0
    return counted.double().argmax(1) if weights.ndim == 2 and bool((counted.sum(1) == 1).all()) else None


# What the scores are made of


def product_behind(scores: Likeness) -> Product | None:
    """The product of two sets of embeddings that the scores are a multiple of, but for what is masked."""
    node, factor, turned = scores.node, 1.0, False
    for _ in range(LONGEST_WAY):
        kind = kind_of(node)
        if kind in ("Mm", "Bmm", "Sum"):
            return _sides(node, kind, factor, turned, scores)
        shape = given_shape(node, 0) or ()
        around = [side for side in node.next_functions if len(given_shape(*side) or ()) >= 2]
        if not around:
            return None
        if kind in ("Mul", "Div"):
            factor *= _number(node, kind)
        elif kind in ("T", "Transpose", "Permute") and len(shape) == 2:
            turned = not turned
        elif kind not in REARRANGED and kind not in WITH_CONSTANTS and kind != "Neg":
            return None
        node = around[0][0]
    return None


def _number(node: Any, kind: str) -> float:
    """The number that the first argument is multiplied with; NaN where it is learned."""
    other = getattr(node, "_saved_other", None)
    if not isinstance(other, Tensor) or other.numel() != 1 or not other.is_cpu or len(parents_of(node)) > 1:
        return float("nan")
    number = float(other)
    return number if kind == "Mul" else 1 / number if number else float("nan")


def _sides(node: Any, kind: str, factor: float, turned: bool, scores: Likeness) -> Product | None:
    if kind == "Sum":  # of a product in which each row meets each answer
        node = next(iter(parents_of(node)), None)
        if node is None or kind_of(node) != "Mul":
            return None
        rows, answers = _of_each(node)
    else:
        rows, answers = getattr(node, "_saved_self", None), getattr(node, "_saved_mat2", None)
        if kind == "Bmm" and isinstance(rows, Tensor) and isinstance(answers, Tensor) and len(rows) == 1:
            rows, answers = rows[0], answers[0]
        answers = answers.mT if isinstance(answers, Tensor) else None
    sides = list(node.next_functions)
    if len(sides) != 2 or any(s is None or _is_parameter(s) for s, _ in sides):
        return None
    if not isinstance(rows, Tensor) or not isinstance(answers, Tensor) or rows.ndim != 2 or answers.ndim != 2:
        return None
    if turned:
        rows, answers, sides = answers, rows, sides[::-1]
    if not rows.is_cpu or len(rows) != scores.count:
        return None
    return Product(rows.detach()[:ROWS_READ].double(), answers.detach().double(), factor, (sides[0], sides[1]))


def _of_each(node: Any) -> tuple[Tensor | None, Tensor | None]:
    a, b = getattr(node, "_saved_self", None), getattr(node, "_saved_other", None)
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.ndim != 3 or b.ndim != 3:
        return None, None
    return a[:, 0], b[0]


def _is_parameter(node: Any) -> bool:
    """Whether a node gives a parameter, which may be turned or divided by its length: weights of classes."""
    for _ in range(LONGEST_WAY):
        before = parents_of(node)
        if not before:
            return kind_of(node) == "AccumulateGrad"
        if kind_of(node) not in (*REARRANGED, "Div", "Mul"):
            return False
        node = before[0]
    return False


def _origin(node: Any, index: int) -> tuple[Any, int]:
    """The node that made the numbers, which may be turned or divided by their length since, and which output."""
    for _ in range(LONGEST_WAY):
        if kind_of(node) not in (*REARRANGED, "Div") or node.next_functions[0][0] is None:
            break
        node, index = node.next_functions[0]
    return node, index
