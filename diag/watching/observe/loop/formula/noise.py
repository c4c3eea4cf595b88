"""Noise that a network scales itself: mean + exp(s) * noise, as a variational code or a policy is drawn.

The product of a network's output with a tensor of standard normal numbers that has no graph is told from its
entries. Whether anything but the noise depends on the scale is told from the edges of the graph, past terms whose
weight is zero.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from diag.snapshot.autograd_graph import constant_of, kind_of
from diag.snapshot.loop.arithmetic import Odd
from diag.watching.observe.loop.formula.chains import (
    OddFound,
    argument_of,
    behind_views,
    bottom_of,
    one_view,
    sides_of,
)
from diag.watching.observe.loop.formula.scales import RAW_OUTPUTS

NODES_WITH_NOISE = 1500
FEWEST_OF_NOISE = 64
STANDARD_ERRORS_OF_NOISE = 6.0


def noise(root: Tensor, inputs: set[int]) -> Iterator[OddFound]:
    """A scale of noise that no term of the loss but the noise depends on. inputs: where the tensors lie that the
    model was given, which are no noise."""
    nodes, without = _living(root.grad_fn)
    if len(nodes) >= NODES_WITH_NOISE:
        return
    for node in nodes:
        scale, index = _scale_of_noise(node, inputs)
        if scale is None:
            continue
        bottom, place, _ = bottom_of(*argument_of(scale))
        maker = behind_views(bottom)
        if kind_of(maker) not in RAW_OUTPUTS or kind_of(maker) == "AccumulateGrad":
            continue
        users = [n for n in nodes for p, i in n.next_functions if p is bottom and i == place]
        of_scale = [n for n in nodes for p, i in n.next_functions if p is scale and i == index]
        if len(users) == len(of_scale) == 1 and one_view(nodes, bottom, maker):
            yield OddFound(Odd.NOISE_UNPAID, {"weightless": float(without)})
            return


def _living(start: Any) -> tuple[list[Any], bool]:
    """The nodes that the value depends on, past products with zero; whether there are such products."""
    front, seen, without = deque([start]), dict[Any, None](), False
    while front and len(seen) < NODES_WITH_NOISE:
        node = front.popleft()
        if node is None or node in seen:
            continue
        if kind_of(node) == "Mul" and _is_zero(node):
            without = True
            continue
        seen[node] = None
        front.extend(p for p, _ in node.next_functions)
    return list(seen), without


def _is_zero(node: Any) -> bool:
    if len(sides_of(node)) != 1:
        return False
    other = constant_of(node)
    return isinstance(other, Tensor) and other.numel() == 1 and other.is_cpu and float(other) == 0


def _scale_of_noise(node: Any, inputs: set[int]) -> tuple[Any, int]:
    """The exponential that is multiplied by standard normal numbers; (None, 0) for anything else."""
    if kind_of(node) != "Mul" or len(sides_of(node)) != 1:
        return None, 0
    other = constant_of(node)
    side, index = sides_of(node)[0]
    if kind_of(side) != "Exp" or not isinstance(other, Tensor) or other.untyped_storage().data_ptr() in inputs:
        return None, 0
    if not is_standard_noise(other):
        return None, 0
    return side, index


def is_standard_noise(numbers: Tensor) -> bool:
    """Whether the numbers could have been drawn from the standard normal distribution, and their mean, their mean
    square and the correlation of neighbours are within six standard errors."""
    count = numbers.numel()
    if count < FEWEST_OF_NOISE or not numbers.is_cpu or not numbers.is_floating_point():
        return False
    z = numbers.detach().double().reshape(-1)
    moments = torch.stack([z.mean(), (z.square().mean() - 1) / 2**0.5, (z[1:] * z[:-1]).mean()])
    fourth = (z**4).mean() - 3  # its standard error is that of 96 / n
    within = bool((moments.abs() * count**0.5 < STANDARD_ERRORS_OF_NOISE).all())
    return within and bool(fourth.abs() < STANDARD_ERRORS_OF_NOISE * (96 / count) ** 0.5)
