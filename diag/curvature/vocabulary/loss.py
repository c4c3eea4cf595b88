"""The cross-entropy of a last linear layer over many classes, with derivatives that keep no logits.

A language model's logits, one number for each token and word, are its largest tensor by far, and differentiating
torch's cross-entropy twice keeps several of their size. Here the layer and the loss are one function of the layer's
inputs, weight and bias. With z = W x + b, p = softmax(z), g = s (p - e_label) for the row's weight s, and for the
cotangents u, V, c of dx = W^T g, dW = g x^T, db = g,

    t = W u + V x + c,    h = s (p t - p <p, t>),
    d/dx = W^T h + V^T g,    d/dW = h x^T + g u^T,    d/db = h,    d/ds = <p - e_label, t>,

all in pieces of some rows, whose logits are computed again. So nothing is kept but x, W, b and the labels. With the
Jacobian of z held fixed, as in the Gauss-Newton matrix, the terms with g drop out of d/dx and d/dW.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diag.curvature.kernels import plain
from diag.snapshot.objective.comparison import IGNORED_LABEL

LEAST = 1 << 22  # logits, below which torch's own way is kept: recomputing them costs a tenth of a product
PIECE = 1 << 23  # logits that are computed at once; some five times as much is held for a moment


class MovedLayer(NamedTuple):
    """By how much x, W and b are moved; to first order in them, the logits by W dx + dW x + db."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def logits(self, x: Tensor, w: Tensor, rows: slice) -> Tensor:
        """What that is for some rows of x."""
        found = x.new_zeros(len(x[rows]), len(w))
        found = found if self.x is None else found.addmm_(self.x[rows], w.T)
        found = found if self.weight is None else found.addmm_(x[rows], self.weight.T)
        return found if self.bias is None else found.add_(self.bias)


class PieceForm(NamedTuple):
    """jacobian_fixed: whether derivatives take that of the logits as constant. moved: whether the loss and its
    derivative are those of other logits."""

    jacobian_fixed: bool = False
    moved: MovedLayer | None = None


ALL_DERIVATIVES = PieceForm()


class Projected(NamedTuple):
    """What logits were made of, and their version at the time."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    version: int
    form: PieceForm = ALL_DERIVATIVES


class Vocabulary(torch.autograd.Function):
    """The loss of each row (n,): x (n, d), w (classes, d), b (classes) or None, labels (n); 0 where not `counted`.

    logits: of this x, w and b, in this form; not kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        labels: Tensor,
        counted: Tensor,
        logits: Tensor,
        form: PieceForm = ALL_DERIVATIVES,
    ) -> Tensor:
        """-log p of the label."""
        ctx.form = form
        ctx.save_for_backward(x, w, b, labels, counted)
        rows = torch.arange(len(labels), device=labels.device)
        losses = torch.cat([logits[i].logsumexp(1) for i in _pieces(len(x), len(w))]) - logits[rows, labels]
        return losses * counted

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """dx, dw and db."""
        return *VocabularyBackward.apply(grads[0], *ctx.saved_tensors, ctx.form), None, None, None, None


class VocabularyBackward(torch.autograd.Function):
    """dx = W^T g, dw = sum g x^T and db = sum g over the rows, for the cotangents s of their losses."""

    @staticmethod
    def forward(
        ctx: Any,
        s: Tensor,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        labels: Tensor,
        counted: Tensor,
        form: PieceForm = ALL_DERIVATIVES,
    ) -> Any:
        """The first derivatives, piece by piece."""
        ctx.form = form
        ctx.save_for_backward(s, x, w, b, labels, counted)
        ctx.set_materialize_grads(False)
        dx, dw, db = torch.empty_like(x), torch.zeros_like(w), None if b is None else torch.zeros_like(b)
        for i in _pieces(len(x), len(w)):
            g = _errors(i, x, w, b, labels, form.moved)[1] * (s[i] * counted[i])[:, None]
            dx[i] = g @ w
            dw.addmm_(g.T, x[i])
            if db is not None:
                db += g.sum(0)
        return dx, dw, db

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The derivatives of <dx, u> + <dw, v> + <db, c> in s, x, w and b."""
        s, x, w, b, labels, counted = ctx.saved_tensors
        if all(grad is None for grad in grads):
            return (None,) * 7
        of_rows, total_w, total_b = [], torch.zeros_like(w), w.new_zeros(len(w))
        for i in _pieces(len(x), len(w)):
            *own, in_w, in_b = _second(i, grads, s, x, w, b, labels, counted, ctx.form)
            of_rows.append(own)
            total_w, total_b = _added(total_w, in_w), _added(total_b, in_b)
        in_s, in_x = (torch.cat(parts) for parts in zip(*of_rows, strict=True))
        return in_s, in_x, total_w, None if b is None else total_b, None, None, None


def _second(
    i: slice, grads: Any, s: Tensor, x: Tensor, w: Tensor, b: Any, labels: Tensor, counted: Tensor, form: PieceForm
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows' part of the second derivatives: for s and x theirs, for w and b what they add."""
    u, v, c = grads[0] if grads[0] is None else grads[0][i], grads[1], grads[2]
    p, error = _errors(i, x, w, b, labels, form.moved)
    x, weights = x[i], (s[i] * counted[i])[:, None]
    t = torch.zeros_like(p)
    t = t if u is None else t + u @ w.T
    t = t if v is None else t + x @ v.T
    t = t if c is None else t + c
    in_s = (error * t).sum(1) * counted[i]
    h = p * (t - (p * t).sum(1, keepdim=True)) * weights
    in_x, in_w = h @ w, h.T @ x
    if not form.jacobian_fixed:
        g = error * weights
        in_x = in_x if v is None else in_x + g @ v
        in_w = in_w if u is None else in_w + g.T @ u
    return in_s, in_x, in_w, h.sum(0)


def _added(total: Tensor, part: Tensor) -> Tensor:
    return total + part if torch.is_grad_enabled() else total.add_(part)


def _pieces(rows: int, classes: int) -> Iterator[slice]:
    step = max(PIECE // classes, 1)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _errors(
    i: slice, x: Tensor, w: Tensor, b: Tensor | None, labels: Tensor, moved: MovedLayer | None
) -> tuple[Tensor, Tensor]:
    """p, and p less one at the label, of some rows."""
    z = F.linear(x[i], w, b)
    p = (z if moved is None else z + moved.logits(x, w, i)).softmax(1)
    return p, p.scatter_add(1, labels[i][:, None], p.new_full((len(p), 1), -1.0))


# ---- what stands in for torch's functions


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, whose outputs remember what they were made of where they are many."""
    output = F.linear(input, weight, bias)
    if output.numel() >= LEAST and output.ndim > 1 and plain(input, weight, output):
        base = unviewed(output)  # torch may have made a matrix and given a view of it
        base.projected = Projected(input, weight, bias, base._version)  # type: ignore[attr-defined]
    return output


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = IGNORED_LABEL,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """`F.cross_entropy`; of a linear layer's outputs by `Vocabulary`, where nothing but labels counts."""
    made = (
        None
        if weight is not None or label_smoothing or size_average is not None or reduce is not None
        else _made(input)
    )
    if made is None or target.ndim != 1 or target.is_floating_point() or reduction not in ("mean", "sum", "none"):
        return F.cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    counted = target != ignore_index
    labels = target.masked_fill(~counted, 0)
    x = made.x.reshape(-1, made.x.shape[-1])
    losses = Vocabulary.apply(x, made.weight, made.bias, labels, counted.to(x.dtype), input.detach(), made.form)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / counted.sum()


def unviewed(tensor: Tensor) -> Tensor:
    """The tensor, or what it is a view of."""
    return tensor if tensor._base is None else tensor._base


def _made(logits: Tensor) -> Projected | None:
    """What rows of logits were made of: they or what they are a view of, row by row, is a linear layer's output."""
    base = unviewed(logits)
    made: Projected | None = getattr(base, "projected", None)
    if made is None or logits.ndim != 2 or made.version != base._version or logits.numel() != base.numel():
        return None
    whole = logits.is_contiguous() and base.is_contiguous() and logits.shape[1] == len(made.weight)
    return made if whole and logits.dtype == made.x.dtype else None
