"""What each ATen operation does to the axes of its operands.

`AXIS_RULES` maps an operation's name to a function `(trace, args, outputs) -> None` that labels the outputs and
unifies or freezes symbols. Pointwise operations are recognised by PyTorch's own tag. An operation without a
rule freezes every axis it touches: the symmetry found is then smaller than it could be, never wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diag.connectivity.symmetries.axes import AxisFactors, Labels
from diag.connectivity.symmetries.labelling import Labelling
from diag.snapshot.batch import tensors_in

AxisRule = Callable[[Labelling, dict[str, Any], Sequence[Any]], None]
AXIS_RULES: dict[str, AxisRule] = {}

GENERAL_LINEAR = (
    "contracted between two activations (query and key): the symmetry there is general linear, not a permutation"
)
UNDER_A_WINDOW = "a window slides over this axis"
POSITION = "the operation depends on the position along this axis"


def rule(*names: str) -> Callable[[AxisRule], AxisRule]:
    """Decorate the rule of the operations with these names."""

    def register(function: AxisRule) -> AxisRule:
        AXIS_RULES.update(dict.fromkeys(names, function))
        return function

    return register


# ---- pointwise


def pointwise(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """Operands broadcast from the right; axes that meet carry the same units."""
    operands = [trace.labels(t) for t in tensors_in(args)]
    for output in tensors_in(outputs):
        trace.label(output, broadcast(trace, operands, output.ndim))


def broadcast(trace: Labelling, operands: Sequence[Labels], ndim: int) -> Labels:
    """The axes of what the operands broadcast to; those that meet carry the same units."""
    axes: list[AxisFactors] = []
    for i in range(1, ndim + 1):
        meeting = [labels[-i] for labels in operands if len(labels) >= i and labels[-i]]
        for other in meeting[1:]:
            trace.algebra.unify(meeting[0], other)
        axes.append(meeting[0] if meeting else ())
    return tuple(reversed(axes))


@rule("clone", "detach", "alias", "_to_copy", "lift_fresh", "contiguous", "dropout", "native_dropout", "copy_",
      "bernoulli", "zeros_like", "ones_like", "full_like", "empty_like", "to", "masked_fill", "masked_fill_",
      "where", "fill_", "zero_", "nan_to_num", "_conj", "prelu", "_prelu_kernel", "hardswish", "hardswish_",
      "log_sigmoid_forward", "rrelu_with_noise", "rrelu_with_noise_functional")  # fmt: skip
def same_axes(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """One tensor in, one of the same axes out."""
    pointwise(trace, args, outputs)


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "scalar_tensor",
      "empty_strided", "new_empty_strided")  # fmt: skip
def uniform(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """All entries are equal, so any permutation leaves the tensor as it is."""
    for output in tensors_in(outputs):
        trace.label(output, tuple(trace.algebra.axis(n) for n in output.shape))


@rule("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax")
def mixes_along(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """Equivariant along `dim`, but each output depends on all inputs along it."""
    labels = trace.labels(args["self"])
    trace.mixed(labels, [args["dim"]])
    trace.label(outputs[0], labels)


# ---- contractions

OPERANDS = ("mat1", "mat", "mat2", "vec", "tensor", "other")


def contract(trace: Labelling, a: Tensor, a_axis: AxisFactors, b: Tensor, b_axis: AxisFactors) -> None:
    """Two axes are summed over together. Between two tensors of data any linear map could stand there."""
    trace.algebra.unify(a_axis, b_axis)
    if trace.is_data(a) and trace.is_data(b):
        trace.algebra.freeze(a_axis, GENERAL_LINEAR)


@rule("mm", "addmm", "mv", "addmv", "dot", "vdot", "addmm_", "_addmm_activation")
def matrix_product(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """Rows of the first, columns of the second."""
    names = [n for n in OPERANDS if n in args]
    a, b = (args["self"], args[names[0]]) if len(names) == 1 else (args[n] for n in _operand_order(names))
    left, right = trace.labels(a), trace.labels(b)
    contract(trace, a, left[-1], b, right[0])
    labels = left[:-1] + right[1:]
    if len(names) == 2:
        labels = broadcast(trace, [labels, trace.labels(args["self"])], len(labels))
    trace.label(outputs[0], labels)


def _operand_order(names: Sequence[str]) -> Sequence[str]:
    return sorted(names, key=OPERANDS.index)


@rule("bmm", "baddbmm")
def batched_matrix_product(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """The same for each matrix of a batch."""
    a, b = (args["batch1"], args["batch2"]) if "batch1" in args else (args["self"], args["mat2"])
    left, right = trace.labels(a), trace.labels(b)
    trace.algebra.unify(left[0], right[0])
    contract(trace, a, left[2], b, right[1])
    labels: Labels = (left[0], left[1], right[2])
    if "batch1" in args:
        labels = broadcast(trace, [labels, trace.labels(args["self"])], 3)
    trace.label(outputs[0], labels)


@rule("convolution")
def convolved(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """Channels are contracted, by groups; a window slides over the rest."""
    algebra, groups, transposed = trace.algebra, args["groups"], args["transposed"]
    x, w = trace.labels(args["input"]), trace.labels(args["weight"])
    inside, outside = (w[0], w[1]) if transposed else (w[1], w[0])
    channels_in, channels_out = x[1], outside
    if groups > 1:
        grouped = trace.grouped(x[1], groups)
        by_group = trace.grouped(inside if transposed else outside, groups)
        if grouped is None or by_group is None:
            algebra.freeze([*x[1], *w[0], *w[1]], "groups cut through a block of channels")
            channels_out = algebra.axis(outputs[0].shape[1], "groups cut through a block of channels")
        else:
            algebra.unify(grouped[0], by_group[0])
            algebra.unify(grouped[1], by_group[1] if transposed else inside)
            channels_out = by_group[0] + (outside if transposed else by_group[1])
    else:
        algebra.unify(channels_in, inside)
    if args["bias"] is not None:
        algebra.unify(channels_out, trace.labels(args["bias"])[0])
    trace.freeze_axes((x[2:], w[2:]), UNDER_A_WINDOW)
    spatial = tuple(algebra.axis(n, UNDER_A_WINDOW) for n in outputs[0].shape[2:])
    trace.label(outputs[0], (x[0], channels_out, *spatial))


# ---- normalisation and reduction


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
      "batch_norm", "_batch_norm_with_update", "_batch_norm_no_update")  # fmt: skip
def batch_norm(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """Statistics of each channel."""
    labels = trace.labels(args["input"])
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(args.get(name), Tensor):
            trace.algebra.unify(labels[1], trace.labels(args[name])[0])
    trace.label(outputs[0], labels)


@rule("native_layer_norm", "_fused_rms_norm")
def layer_norm(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """Statistics over the last axes."""
    labels = trace.labels(args["input"])
    operands = [labels] + [trace.labels(args[n]) for n in ("weight", "bias") if args.get(n) is not None]
    trace.label(outputs[0], broadcast(trace, operands, len(labels)))
    trace.mixed(labels, range(-len(args["normalized_shape"]), 0))


@rule("_weight_norm_interface")
def weight_norm(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """A direction v with a size g for each slice along `dim` (Salimans & Kingma 2016)."""
    v, g = trace.labels(args["v"]), trace.labels(args["g"])
    dim = args.get("dim", 0) % len(v)
    trace.algebra.unify(v[dim], g[dim])
    trace.mixed(v, [i for i in range(len(v)) if i != dim])
    trace.label(outputs[0], v)
    trace.label(outputs[1], g)


@rule("native_group_norm")
def group_norm(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """Statistics of each group: whole groups move, and units within one."""
    labels = trace.labels(args["input"])
    grouped = trace.grouped(labels[1], args["group"])
    if grouped is None:
        trace.algebra.freeze(labels[1], "groups cut through a block of channels")
    else:
        trace.occur((labels[0], grouped[0]))
        trace.mixed((labels[0], *grouped, *labels[2:]), range(2, len(labels) + 1))
    for name in ("weight", "bias"):
        if args.get(name) is not None:
            trace.algebra.unify(labels[1], trace.labels(args[name])[0])
    trace.label(outputs[0], labels)


@rule("sum", "mean", "amax", "amin", "prod", "var", "std", "var_mean", "std_mean", "logsumexp", "any", "all",
      "linalg_vector_norm", "norm", "max", "min", "aminmax", "count_nonzero")  # fmt: skip
def reduction(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """Sums and the like: the axes `dim` go."""
    labels = trace.labels(args["self"])
    if args.get("other") is not None:  # the two-operand form of max and min
        pointwise(trace, args, outputs)
        return
    dims = args.get("dim")
    dims = range(len(labels)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {d % max(len(labels), 1) for d in dims}
    for output in tensors_in(outputs):
        if output.is_floating_point() or output.dtype == torch.bool:
            keep = output.ndim == len(labels)
            kept = (() if i in gone else axis for i, axis in enumerate(labels) if keep or i not in gone)
            trace.label(output, tuple(kept))
