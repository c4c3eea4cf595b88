"""What views, slices, concatenations and indexing do to the axes of their operands.

The same kind of table as in `rules`, for the operations that rearrange units or distinguish them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor

from diag.connectivity.symmetries.axes import Labels, Mismatch
from diag.connectivity.symmetries.labelling import Labelling
from diag.connectivity.symmetries.rules import POSITION, UNDER_A_WINDOW, broadcast, rule
from diag.snapshot.batch import tensors_in

# ---- views


@rule("view", "_unsafe_view", "_reshape_alias", "reshape")
def reshape(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """The same entries in row-major order under another shape."""
    flat = [symbol for axis in trace.labels(args["self"]) for symbol in axis]
    try:
        trace.label(outputs[0], tuple(trace.algebra.regroup(flat, outputs[0].shape)))
    except Mismatch:
        trace.algebra.freeze(flat, "a reshape that cuts through a block of units")


@rule("as_strided_")
def restride(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """Pooling restrides its result without moving anything: the row-major strides, but on axes of size 1."""
    x, stride, compact = outputs[0], 1, True
    for size, found in zip(reversed(x.shape), reversed(x.stride()), strict=True):
        compact, stride = compact and (size == 1 or found == stride), stride * size
    if compact and len(trace.labels(args["self"])) == x.ndim:
        trace.label(x, trace.labels(args["self"]))
    else:
        trace.freeze_axes((trace.labels(args["self"]),), "laid out again by strides")


@rule("permute")
def permute(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """The axes in another order."""
    labels = trace.labels(args["self"])
    trace.label(outputs[0], tuple(labels[d] for d in args["dims"]))


@rule("transpose", "t", "numpy_T", "transpose_")
def transpose(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """Two axes change places."""
    labels = list(trace.labels(args["self"]))
    i, j = (args["dim0"], args["dim1"]) if "dim0" in args else (0, -1)
    if labels:
        labels[i], labels[j] = labels[j], labels[i]
    trace.label(outputs[0], tuple(labels))


@rule("unsqueeze")
def unsqueeze(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """A new axis of size 1."""
    labels = list(trace.labels(args["self"]))
    labels.insert(args["dim"] % outputs[0].ndim, ())
    trace.label(outputs[0], tuple(labels))


@rule("squeeze")
def squeeze(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """Axes of size 1 are removed."""
    x, dims = args["self"], args.get("dim")
    dims = range(x.ndim) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {d % x.ndim for d in dims if x.ndim and x.shape[d] == 1}
    trace.label(outputs[0], tuple(a for i, a in enumerate(trace.labels(x)) if i not in gone))


@rule("expand", "broadcast_to")
def expand(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """A copied axis: its entries are all alike until something tells them apart."""
    labels, shape = trace.labels(args["self"]), outputs[0].shape
    labels = ((),) * (len(shape) - len(labels)) + labels
    new = (a if a or n == 1 else trace.algebra.axis(n) for a, n in zip(labels, shape, strict=True))
    trace.label(outputs[0], tuple(new))


@rule("repeat")
def repeat(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """Each axis is repeated: the repetitions are an axis in front of it."""
    labels, repeats = trace.labels(args["self"]), args["repeats"]
    labels = ((),) * (len(repeats) - len(labels)) + labels
    new = (trace.algebra.axis(r) + a for a, r in zip(labels, repeats, strict=True))
    trace.label(outputs[0], tuple(new))


@rule("select")
def select(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """One position along an axis."""
    trace.label(outputs[0], selected(trace, args["self"], args["dim"], args["index"]))


@rule("unbind")
def unbind(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """Each position along an axis by itself."""
    for j, output in enumerate(tensors_in(outputs)):
        trace.label(output, selected(trace, args["self"], args.get("dim", 0), j))


def selected(trace: Labelling, x: Tensor, dim: int, position: int) -> Labels:
    """The axes of one position along `dim`: an instance of every symbol of the others."""
    labels, algebra = list(trace.labels(x)), trace.algebra
    along = algebra.expand(labels.pop(dim % x.ndim))
    algebra.freeze(along, "single positions are selected")
    if len(along) != 1 or along[0].kind != "atom":
        trace.occur(tuple(labels))
        return tuple(labels)
    j = position % along[0].size
    return tuple(tuple(algebra.instance(s, along[0], j) for s in algebra.expand(axis)) for axis in labels)


@rule("slice", "narrow")
def slice_(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """Positions from `start` to `end`."""
    size = args["self"].shape[args.get("dim", 0)]
    start, stop, step = args.get("start") or 0, args.get("end"), args.get("step", 1)
    start = max(start + size, 0) if start < 0 else min(start, size)
    if step != 1:
        stop = None
    else:
        stop = start + outputs[0].shape[args.get("dim", 0)]
    trace.label(outputs[0], sliced(trace, args["self"], args.get("dim", 0), start, stop, outputs[0]))


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "unsafe_chunk",
      "tensor_split")  # fmt: skip
def split(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """An axis cut into pieces."""
    start, dim = 0, args.get("dim", 0)
    for output in tensors_in(outputs):
        stop = start + output.shape[dim]
        trace.label(output, sliced(trace, args["self"], dim, start, stop, output))
        start = stop


def sliced(trace: Labelling, x: Tensor, dim: int, start: int, stop: int | None, output: Tensor) -> Labels:
    """The axes of the positions [start, stop) along `dim`; None where they are not next to each other."""
    labels = list(trace.labels(x))
    try:
        if stop is None:
            raise Mismatch
        labels[dim] = trace.algebra.slice(labels[dim], start, stop)
    except Mismatch:
        trace.algebra.freeze(labels[dim], "sliced through a block of units")
        trace.mixed(tuple(labels), [dim])
        labels[dim] = trace.algebra.axis(output.shape[dim], "sliced through a block of units")
    return tuple(labels)


@rule("cat", "concatenate")
def concatenate(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """Pieces one after another along `dim`."""
    pieces = [trace.labels(t) for t in args["tensors"] if t.numel() or t.ndim > 1]
    dim = args.get("dim", 0) % outputs[0].ndim
    joined = trace.algebra.concatenate([p[dim] or trace.one() for p in pieces])
    rest = broadcast(trace, [(*p[:dim], (), *p[dim + 1 :]) for p in pieces], outputs[0].ndim)
    trace.label(outputs[0], (*rest[:dim], joined, *rest[dim + 1 :]))


@rule("stack")
def stack(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """The pieces become instances of new symbols along the new axis: they need not move together."""
    pieces = [trace.labels(t) for t in args["tensors"]]
    dim = args.get("dim", 0) % outputs[0].ndim
    along = trace.algebra.axis(len(pieces), "the parts of a stack")
    axes = [trace.algebra.stack(axis, along) for axis in zip(*pieces, strict=True)]
    trace.label(outputs[0], (*axes[:dim], along, *axes[dim:]))


@rule("glu")
def gated(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """One half gates the other: unit i of each half moves together."""
    x, dim = args["self"], args["dim"]
    half = x.shape[dim] // 2
    first, second = (sliced(trace, x, dim, a, a + half, outputs[0]) for a in (0, half))
    trace.label(outputs[0], broadcast(trace, [first, second], x.ndim))


@rule("view_as_complex")
def as_complex(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """Pairs along the last axis become complex numbers."""
    labels = trace.labels(args["self"])
    trace.algebra.freeze(labels[-1], "real and imaginary parts")
    trace.label(outputs[0], labels[:-1])


@rule("view_as_real")
def as_real(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """Complex numbers become pairs along a new last axis."""
    labels = trace.labels(args["self"])
    trace.label(outputs[0], (*labels, trace.algebra.axis(2, "real and imaginary parts")))


# ---- axes that are sorted, indexed or read in order


@rule("cumsum", "cumprod", "flip", "roll", "sort", "topk", "cumsum_", "logcumsumexp")
def ordered(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """What depends on the order along `dim`."""
    labels = trace.labels(args["self"])
    dims = args.get("dims", args.get("dim", -1))
    dims = [dims] if isinstance(dims, int) else (dims or range(len(labels)))
    trace.freeze_axes(([labels[d] for d in dims],), POSITION)
    trace.mixed(labels, dims)
    for output in tensors_in(outputs):
        axes = zip(labels, output.shape, strict=True)
        new = (a if prod(s.size for s in a) == n else trace.algebra.axis(n, POSITION) for a, n in axes)
        trace.label(output, tuple(new))


@rule("tril", "triu", "tril_", "triu_")
def triangle(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """Entries on one side of the diagonal."""
    labels = trace.labels(args["self"])
    trace.freeze_axes((labels[-2:],), POSITION)
    trace.label(outputs[0], labels)


@rule("embedding")
def embedding(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """The table's rows, looked up."""
    weight = trace.labels(args["weight"])
    trace.algebra.freeze(weight[0], "rows are looked up by index")
    trace.label(outputs[0], trace.labels(args["indices"]) + weight[1:])


@rule("_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """Sums or means of the table's rows."""
    weight = trace.labels(args["weight"])
    trace.algebra.freeze(weight[0], "rows are looked up by index")
    trace.label(outputs[0], (trace.algebra.axis(outputs[0].shape[0], "one bag each"), weight[1]))


@rule("im2col")
def unfold(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """Patches: (batch, channels, height, width) to (batch, channels x window, places)."""
    labels = trace.labels(args["self"])
    trace.freeze_axes((labels[2:],), UNDER_A_WINDOW)
    window = outputs[0].shape[1] // args["self"].shape[1]
    channels = (*labels[1], *trace.algebra.axis(window, UNDER_A_WINDOW))
    trace.label(outputs[0], (labels[0], channels, trace.algebra.axis(outputs[0].shape[2], UNDER_A_WINDOW)))


@rule("pixel_shuffle")
def pixel_shuffle(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """Channels x r x r become channels and finer places."""
    labels, r = trace.labels(args["self"]), args["upscale_factor"]
    split = trace.grouped(labels[1], outputs[0].shape[1])
    trace.freeze_axes((labels[2:],), UNDER_A_WINDOW)
    if split is None:
        trace.algebra.freeze(labels[1], UNDER_A_WINDOW)
        return
    trace.algebra.freeze(split[1], f"the {r * r} places of a pixel shuffle")
    spatial = (trace.algebra.axis(n, UNDER_A_WINDOW) for n in outputs[0].shape[2:])
    trace.label(outputs[0], (labels[0], split[0], *spatial))


@rule("index")
def index(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """Axes that are indexed by a tensor freeze; whole axes behind or before them pass."""
    labels, indices = trace.labels(args["self"]), list(args["indices"])
    indices += [None] * (len(labels) - len(indices))
    taken = [i for i, index in enumerate(indices) if index is not None]
    trace.freeze_axes(([labels[i] for i in taken],), "looked up by index")
    trace.mixed(labels, taken)
    kept = [a for a, index in zip(labels, indices, strict=True) if index is None]
    if taken and taken == list(range(taken[0], taken[-1] + 1)):
        count = outputs[0].ndim - len(kept)
        shape = outputs[0].shape[taken[0] : taken[0] + count]
        new = [trace.algebra.axis(n, "looked up by index") for n in shape]
        trace.label(outputs[0], (*kept[: taken[0]], *new, *kept[taken[0] :]))


@rule("index_select")
def index_select(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """Positions along `dim`, looked up."""
    labels, dim = list(trace.labels(args["self"])), args["dim"]
    trace.algebra.freeze(labels[dim], "looked up by index")
    trace.mixed(tuple(labels), [dim])
    labels[dim] = trace.algebra.axis(outputs[0].shape[dim], "looked up by index")
    trace.label(outputs[0], tuple(labels))


def windowed(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any], spatial: int) -> None:
    """Pooling and resampling: the last `spatial` axes are read through windows, all others pass."""
    labels = trace.labels(args["self"])
    trace.freeze_axes((labels[-spatial:],), UNDER_A_WINDOW)
    trace.mixed(labels, range(-spatial, 0))
    for output in tensors_in(outputs):
        new = (trace.algebra.axis(n, UNDER_A_WINDOW) for n in output.shape[-spatial:])
        trace.label(output, (*labels[:-spatial], *new))


@rule("constant_pad_nd")
def constant_pad(trace: Labelling, args: dict[str, Any], outputs: Sequence[Any]) -> None:
    """Padding with one value adds units that are all alike: on channels, a concatenation."""
    labels, pads = list(trace.labels(args["self"])), args["pad"]
    for i in range(len(pads) // 2):
        before, after = pads[2 * i : 2 * i + 2]
        axis = labels[-1 - i]
        if before < 0 or after < 0:
            trace.algebra.freeze(axis, POSITION)
            labels[-1 - i] = trace.algebra.axis(outputs[0].shape[-1 - i], POSITION)
        elif before or after:
            pieces = [(trace.algebra.new(n),) for n in (before,) if n] + [axis]
            pieces += [(trace.algebra.new(n),) for n in (after,) if n]
            labels[-1 - i] = trace.algebra.concatenate(pieces)
    trace.label(outputs[0], tuple(labels))
