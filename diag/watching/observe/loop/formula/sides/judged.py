"""The calls of a network inside the graph of a loss: where its first operation got its input and its last one gave
its output, and how two batches of such inputs are compared."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diag.snapshot.autograd_graph import PASSING_ON, kind_of, parents_of
from diag.watching.observe.loop.losses import MADE_BY

LONGEST_CALL = 400
ROWS_OF_A_SIDE, NUMBERS_OF_A_ROW = 512, 4096
TURNED = ("T", "Transpose", "Permute", "View", "ReshapeAlias")
INPUT_OF = {
    "Addmm": "_saved_mat1",
    "Mm": "_saved_self",
    "Convolution": "_saved_input",
    "NativeBatchNorm": "_saved_input",
}
GENERATED_RANGES = {"tanh": (-1.0, 1.0), "sigmoid": (0.0, 1.0)}


@dataclass(frozen=True)
class JudgedCall:
    """One call of the network: the node that gave its output, the input (n, ...), and the node that made that, None
    where it has no graph."""

    last: Any
    inputs: Tensor
    maker: Any


@dataclass(frozen=True)
class RowsSeen:
    """What is compared of a batch, and nothing that keeps the batch alive: mean and deviation of each number of a
    row; of all numbers the root mean square, and the share beyond the range of each function that has one."""

    means: Tensor
    deviations: Tensor
    size: float
    outside: Mapping[str, float]


def rows_seen(inputs: Tensor) -> RowsSeen:
    """Of the first rows of a batch, and of the first numbers of each."""
    numbers = inputs.detach()[:ROWS_OF_A_SIDE].flatten(1)[:, :NUMBERS_OF_A_ROW].double()
    outside = {name: _share_outside(numbers, *ends) for name, ends in GENERATED_RANGES.items()}
    return RowsSeen(numbers.mean(0), numbers.std(0), float(numbers.square().mean().sqrt()), outside)


def _share_outside(numbers: Tensor, low: float, high: float) -> float:
    slack = (high - low) / 100
    return float(((numbers < low - slack) | (numbers > high + slack)).double().mean())


def distance_of_rows(a: RowsSeen, b: RowsSeen) -> float:
    """How far means and deviations of two batches are apart, over the deviations; infinite for other shapes, and
    for two batches of equal rows that are not the same."""
    if a.means.shape != b.means.shape:
        return math.inf
    apart = (a.means - b.means).square() + (a.deviations - b.deviations).square()
    wide = float((a.deviations.square() + b.deviations.square()).sum())
    if wide > 0:
        return float(apart.sum()) / wide
    return math.inf if bool(apart.any()) else 0.0


def calls_of(root: Any, parameters: Set[int]) -> list[JudgedCall]:
    """The calls of the network with these parameters, nearest to the loss, whose input can be read."""
    found = []
    for last in _last_operations(root, parameters):
        first, maker = _way(last, parameters)
        inputs = getattr(first, INPUT_OF.get(kind_of(first), ""), None)
        if isinstance(inputs, Tensor) and inputs.is_cpu and inputs.ndim > 1:
            found.append(JudgedCall(last, inputs.detach(), maker))
    return found


def _last_operations(root: Any, parameters: Set[int]) -> Iterator[Any]:
    waiting, seen = [root], set[Any]()
    while waiting and len(seen) < LONGEST_CALL:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if _weights(node) & parameters:
            yield node
        else:
            waiting += parents_of(node)


def _way(node: Any, parameters: Set[int]) -> tuple[Any, Any]:
    """From the last operation of a call back to its first, and what made that one's input."""
    first, maker = node, _before(node)
    node = maker
    for _ in range(LONGEST_CALL):
        if node is None:
            break
        weights = _weights(node)
        if weights & parameters:
            first, maker = node, _before(node)
        elif weights:
            break
        node = _before(node)
    return first, maker


def _weights(node: Any) -> frozenset[int]:
    """The parameters that an operation itself takes, by id."""
    return frozenset(id(leaf.variable) for parent in parents_of(node) if (leaf := _leaf(parent)) is not None)


def _leaf(node: Any) -> Any:
    for _ in range(3):
        if kind_of(node) == "AccumulateGrad":
            return node
        before = parents_of(node)
        if kind_of(node) not in TURNED or len(before) != 1:
            return None
        node = before[0]
    return None


def _before(node: Any) -> Any:
    """The node of an operation's data, its first argument that is no parameter."""
    return next((parent for parent in parents_of(node) if _leaf(parent) is None), None)


def range_made_by(maker: Any) -> str:
    """The function with a range that made something, "" for none."""
    for _ in range(8):
        if maker is None or kind_of(maker) not in PASSING_ON:
            break
        maker = next(iter(parents_of(maker)), None)
    name = "" if maker is None else {"Tanh": "tanh", **MADE_BY}.get(kind_of(maker), "")
    return name if name in GENERATED_RANGES else ""


def split_by_direction(inputs: Tensor, pull: Tensor) -> dict[str, Tensor]:
    """The rows whose output is to grow and those where it is to shrink, where each are one run of the batch."""
    n = len(inputs)
    if len(pull) != n or n < 2:
        return {}
    slope = pull.detach().reshape(n, -1).double().sum(1)
    up, down = slope < 0, slope > 0
    told = (up | down).nonzero().reshape(-1)
    if len(told) < n // 4 + 1 or int((up[told][1:] != up[told][:-1]).sum()) > 1:
        return {}
    return {name: inputs[rows] for name, rows in (("up", up), ("down", down)) if int(rows.sum()) > 1}


def direction_of_pull(pull: Tensor) -> tuple[str, float]:
    """In which direction a loss pulls the outputs of all rows, and the mean size of its slope, times the rows."""
    slope = pull.detach().reshape(len(pull), -1).double().sum(1)
    size = float(slope.abs().mean()) * len(slope)
    one = bool(torch.all(slope <= 0)), bool(torch.all(slope >= 0))
    return ("up" if one[0] and not one[1] else "down" if one[1] and not one[0] else ""), size
