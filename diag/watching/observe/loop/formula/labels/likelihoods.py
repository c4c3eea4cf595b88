"""Log-probabilities among the parts of a loss: with which sign they stand there, which of them are missing, and
softmax functions that cannot give anything but one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from diag.snapshot.autograd_graph import PASSING_ON, kind_of, nodes_before, signed
from diag.snapshot.loop.arithmetic import Odd
from diag.watching.observe.loop.formula.chains import OddFound, argument_of, behind_views, sides_of, sign_of
from diag.watching.observe.loop.formula.parts import Summand, given_shape

FEWEST_IN_A_LIKELIHOOD = 8
LONGEST_LOGARITHM = 6  # nodes between a logarithm and its sigmoid
NODES_AFTER_LAYERS = 128
# Operations of a layer: what stands before them is not the end of the network.
OF_LAYERS = ("Addmm", "Mm", "Bmm", "Convolution", "Linear", "Baddbmm", "NativeBatchNorm", "NativeLayerNorm")


def likelihood(parts: list[Summand]) -> Iterator[OddFound]:
    """Log-probabilities of what was observed that the loss adds instead of subtracting, or takes of one target
    alone."""
    logs = [p for p in parts if p.kind in ("Log", "LogSigmoid") and p.factors]
    others = [p for p in parts if not any(p is q for q in logs)]
    if len(logs) == 2 and not others:
        yield from _two_halves(*logs)
    if len(logs) == 1 and not others:
        yield from _one_half(logs[0])
    picked = [p for p in parts if p.kind in ("Gather", "Index") and not p.factors and _of_log_softmax(p.node)]
    if picked and len(picked) == len(parts) and all(p.number > 0 for p in picked):
        yield OddFound(Odd.LIKELIHOOD_DESCENDED, {"entries": float(math.prod(picked[0].shape))})


def _two_halves(one: Summand, other: Summand) -> Iterator[OddFound]:
    """The two halves of a binary cross-entropy, y log(p) and (1 - y) log(1 - p)."""
    signs = {sign_of(p.number, p.factors) for p in (one, other)}
    shared = one.shape == other.shape and one.weights.numel() >= FEWEST_IN_A_LIKELIHOOD
    if not shared or not _complementary(one.weights.abs(), other.weights.abs()):
        return
    if not all(map(_of_probabilities, (one, other))):
        return
    if signs == {1}:
        yield OddFound(Odd.LIKELIHOOD_DESCENDED, {"entries": float(one.weights.numel())})
    if signs == {1, -1} and {_sigmoid_behind(one), _sigmoid_behind(other)} == {True, False}:
        wrong = one if sign_of(one.number, one.factors) > 0 else other
        yield OddFound(Odd.HALF_DESCENDED, {"target": float(not _sigmoid_behind(wrong))})


def _one_half(half: Summand) -> Iterator[OddFound]:
    """The logarithm of a sigmoid's probabilities where a mask of zeros and ones is one, and nothing else."""
    weights, turned = half.weights, _sigmoid_behind(half)
    chosen = weights != 0
    if turned is None or sign_of(half.number, half.factors) >= 0 or len(weights[chosen].unique()) != 1:
        return
    if FEWEST_IN_A_LIKELIHOOD <= int(chosen.sum()) < chosen.numel():
        left = 1 - float(chosen.double().mean())
        yield OddFound(Odd.ONE_TARGET, {"target": float(not turned), "left": left, "classes": 0.0})


def _sigmoid_behind(p: Summand) -> bool | None:
    """Whether a logarithm is of one less a sigmoid; None where it is of no sigmoid."""
    turned, node = False, p.node
    if p.kind == "LogSigmoid":
        return None
    for _ in range(LONGEST_LOGARITHM):
        node, _index = argument_of(node)
        kind = "" if node is None else kind_of(node)
        if kind == "Sigmoid":
            return turned
        turned ^= kind == "Rsub"
        if kind not in ("Rsub", "Add", "Clamp", "ClampMin", *PASSING_ON) or len(sides_of(node)) != 1:
            return None
    return None


def _complementary(one: Tensor, other: Tensor) -> bool:
    """Whether the two are y and 1 - y times one number, of labels that differ."""
    whole = one + other
    return bool(torch.allclose(whole, whole.reshape(-1)[0].expand_as(whole), rtol=1e-4)) and bool(
        ((one == 0) | (other == 0)).all() and (one > 0).any() and (other > 0).any()
    )


def _of_probabilities(p: Summand) -> bool:
    kept = getattr(p.node, "_saved_self", None)
    if p.kind == "LogSigmoid":
        return True
    return isinstance(kept, Tensor) and kept.is_cpu and bool(((kept > 0) & (kept <= 1)).all())


def _of_log_softmax(node: Any) -> bool:
    made = behind_views(argument_of(node)[0])
    return made is not None and kind_of(made) == "LogSoftmax"


def softmax_of_one(root: Tensor) -> Iterator[OddFound]:
    """A softmax after the last layer over an axis of length one."""
    for node in nodes_before([root.grad_fn], NODES_AFTER_LAYERS, lambda node: kind_of(node) in OF_LAYERS):
        kind = kind_of(node)
        if kind not in ("Softmax", "LogSoftmax"):
            continue
        shape, axis = given_shape(node, 0), signed(node._saved_dim)
        if shape and shape[axis] == 1 and math.prod(shape) > 1:
            result = 1.0 if kind == "Softmax" else 0.0
            yield OddFound(Odd.SOFTMAX_OF_ONE, {"axis": float(axis % len(shape)), "result": result})
            return
