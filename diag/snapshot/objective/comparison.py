"""What a loss compares with the labels: for each of them a row of logits, as the user's own loss does it.

Three ways, in this order. A call of a loss function of torch shows it (see `loss_spy`). Else outputs and targets
are tried: where all outputs are equal a loss of classes pulls one entry of each row up, the label's own, and treats
all others alike; on random logits a loss of the softmax pulls the label's own up and all else down, by as much.
Without a loss, shapes that fit in one way only are taken. Where none of this gives an answer there is none, with
the reason is returned instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from diag.errors import DiagError, MissingQuantity, type_of
from diag.snapshot.objective.loss_spy import LossFunctionCall

IGNORED_LABEL = -100  # the convention of torch's cross_entropy and of Hugging Face
SAME_VALUE_WITHIN = 1e-4  # relative: a loss is a call's value where they agree so far
NO_CLASSES = "the targets are not class numbers (integers); this needs a classification task."
OTHER_LOSS = (
    "the loss is {}, which compares the outputs with other things than class numbers; this needs a classification "
    "task."
)
SEVERAL_COMPARISONS = (
    "the loss is made of several comparisons with labels ({}), so which tensor holds the logits is not known; pass "
    "logits= and labels= yourself."
)
UNREPRODUCED = (
    "the loss does not behave like a loss of classes in any tensor that the model returns, so which holds the "
    "logits is not known; pass logits= and labels= yourself."
)
AMBIGUOUS = (
    "the outputs of shape {} and the targets of shape {} do not tell along which axis the classes lie; give "
    "loss_fn=."
)
COMPARES_EXAMPLES = (
    "the loss compares the examples with each other and not with classes; this needs a classification task."
)

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Comparison:
    """The rows that a loss compares in one batch.

    logits (R, K) as they enter the loss, labels (R,), counted (R,): which are not ignored, weights (R,): by what a
    row weighs in the mean, 0 where it is ignored; None where that is not known. call: what it was seen in. exact:
    the loss is `factor` times that call's mean.
    """

    logits: Tensor
    labels: Tensor
    counted: Tensor
    weights: Tensor | None = None
    call: LossFunctionCall | None = None
    exact: bool = False
    factor: float = 1.0

    def row_losses(self, logits: Tensor) -> Tensor:
        """Each row's own loss (R,), times its weight, from logits (R, K); of an ignored row zero."""
        assert self.call is not None
        return self.factor * _row_losses(self.call, logits, self.labels)


def compared(
    calls: Sequence[LossFunctionCall], value: Tensor | None, factor: float = 1.0
) -> Comparison | str | None:
    """The comparison that calls of loss functions show; why they show none; None where there was no call.

    value: of the loss that they belong to.
    """
    of_classes = [c for c in calls if c.is_of_classes]
    if not of_classes:
        return OTHER_LOSS.format(calls[-1].name) if calls else None
    if len(of_classes) > 1:
        whole = [c for c in of_classes if is_whole(c, value, factor)]
        if len(whole) != 1:
            names = ", ".join(dict.fromkeys(c.name for c in of_classes))
            return SEVERAL_COMPARISONS.format(names)
        of_classes = whole
    return _of_call(of_classes[0], is_whole(of_classes[0], value, factor), factor)


def tried(outputs: Any, targets: Any, loss: Loss) -> Comparison | str:
    """The comparison that `loss(outputs, targets)` makes of random logits, one tensor of the outputs in turn.

    Raises nothing; gives the reason where no tensor of the outputs, or more than one, behaves like logits.
    """
    labels = [t for t in pytree.tree_leaves(targets) if _is_whole_number(t)]
    if not labels:
        return NO_CLASSES
    leaves, spec = pytree.tree_flatten(outputs)
    found: list[Comparison] = []
    for place, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.ndim < 2:
            continue

        def of(z: Tensor, place: int = place) -> Tensor:
            filled = [*leaves[:place], z, *leaves[place + 1 :]]
            return loss(pytree.tree_unflatten(filled, spec), targets).mean()

        found += _behaves(leaf, of, labels)
    return found[0] if len(found) == 1 else UNREPRODUCED


def by_shape(outputs: Any, targets: Any) -> Comparison | str:
    """The comparison that shapes alone leave open, without a loss."""
    if not _is_whole_number(targets):
        return NO_CLASSES
    try:
        z = output_tensor(outputs)
    except MissingQuantity as error:
        return str(error)
    axes = _axes(z, targets)
    if len(axes) != 1 or not z.is_floating_point():
        return AMBIGUOUS.format(tuple(z.shape), tuple(targets.shape))
    labels = targets.reshape(-1)
    return Comparison(_rows(z, axes[0]), labels.long(), labels != IGNORED_LABEL)


def output_tensor(outputs: Any) -> Tensor:
    """The tensor of logits in whatever a model returns: a tensor, the only one of a tuple, or `.logits`."""
    if isinstance(outputs, Tensor):
        return outputs
    found = outputs.get("logits") if isinstance(outputs, dict) else getattr(outputs, "logits", None)
    if found is None and isinstance(outputs, (tuple, list)):
        tensors = [t for t in outputs if isinstance(t, Tensor) and t.ndim > 1]
        found = tensors[0] if len(tensors) == 1 else None
    if not isinstance(found, Tensor):
        raise MissingQuantity(
            f"the model returns {type_of(outputs)} without logits; wrap it so that it returns a tensor."
        )
    return found


# ---- from a call


def _of_call(call: LossFunctionCall, whole: bool, factor: float) -> Comparison:
    entered = call.input if call.logits is None else call.logits
    # Torch's losses have the classes on the second axis, or on the only one.
    logits, labels = _rows(entered if entered.ndim > 1 else entered[None], 1), call.target.reshape(-1).long()
    counted = labels != call.settings.get("ignore_index", IGNORED_LABEL)
    return Comparison(
        logits, labels, counted, _weights(call, labels, counted), call, whole and call.is_mean, factor
    )


def _weights(call: LossFunctionCall, labels: Tensor, counted: Tensor) -> Tensor:
    """What the mean divides by, row by row."""
    weight = call.settings.get("weight")
    if weight is None or call.name == "multi_margin_loss":  # which divides by the number of rows
        return counted.double()
    return weight.double()[torch.where(counted, labels, 0)] * counted


def _row_losses(call: LossFunctionCall, logits: Tensor, labels: Tensor) -> Tensor:
    settings = call.settings | {"reduction": "none"}
    if (weight := settings.get("weight")) is not None:
        settings["weight"] = weight.to(logits.dtype)
    if call.name == "nll_loss" and call.logits is not None:
        logits = logits.log_softmax(1)
    return getattr(F, call.name)(logits, labels, **settings)


def is_whole(call: LossFunctionCall, value: Tensor | None, factor: float = 1.0) -> bool:
    """Whether a loss is `factor` times what this call returned."""
    if value is None or call.value.numel() != 1 or value.numel() != 1:
        return False
    a, b = factor * call.value.detach().double().reshape(()), value.detach().double().reshape(())
    return bool(torch.isclose(a, b.to(a.device), rtol=SAME_VALUE_WITHIN, atol=1e-12, equal_nan=True))


# ---- by trying


def _behaves(z: Tensor, of: Callable[[Tensor], Tensor], labels: Sequence[Tensor]) -> list[Comparison]:
    """The comparisons of z with labels that `of(z)` behaves like."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z)
    equal, random = _gradient(of, torch.zeros_like(z)), _gradient(of, noise)
    pairs = [(y, axis) for y in labels for axis in _axes(z, y) if z.shape[axis] > 1]
    found = [_pulled(z, equal, y, a, _alike) or _pulled(z, random, y, a, _balanced) for y, a in pairs]
    return [comparison for comparison in found if comparison is not None]


def _gradient(of: Callable[[Tensor], Tensor], at: Tensor) -> Tensor | None:
    z = at.detach().requires_grad_()
    try:
        with torch.enable_grad():
            value = of(z)
            if not value.requires_grad:
                return None
            return torch.autograd.grad(value, z, allow_unused=True)[0]
    except (DiagError, RuntimeError, ValueError, IndexError, TypeError):
        return None


def _pulled(
    z: Tensor, gradient: Tensor | None, labels: Tensor, axis: int, fits: Callable[[Tensor, Tensor], bool]
) -> Comparison | None:
    """The comparison of the rows of z with the labels, if the gradient pulls each row's own up, and fits."""
    if gradient is None or not bool(torch.isfinite(gradient).all()):
        return None
    rows, y = _rows(gradient, axis).double(), labels.reshape(-1).long()
    size = rows.abs().sum(1)
    counted = size > 1e-9 * size.max().clamp_min(1e-300)
    here, own = rows[counted], y[counted]
    if not len(here) or int(own.min()) < 0 or int(own.max()) >= rows.shape[1]:
        return None
    if not bool((here.argmin(1) == own).all()) or not fits(here, own):
        return None
    return Comparison(_rows(z, axis), y, counted)


def _balanced(rows: Tensor, labels: Tensor) -> bool:
    """Whether each row pulls the other classes down by as much as it pulls its own up: a softmax's gradient."""
    return bool((rows.sum(1).abs() <= 1e-3 * rows.abs().sum(1)).all())


def _alike(rows: Tensor, labels: Tensor) -> bool:
    """Whether each row treats all classes but its own alike."""
    own = F.one_hot(labels, rows.shape[1]).bool()
    others = rows[~own].view(len(rows), -1)
    return bool(((others - others[:, :1]).abs() <= 1e-3 * rows.abs().amax(1, keepdim=True)).all())


def _axes(z: Tensor, labels: Tensor) -> list[int]:
    """The axes along which the classes may lie: what is left of z has the labels' shape."""
    if z.ndim < 2:
        return []
    last = [-1] if z.shape[:-1] == labels.shape else []
    return last + ([1] if z.ndim > 2 and (z.shape[0], *z.shape[2:]) == tuple(labels.shape) else [])


def _rows(z: Tensor, axis: int) -> Tensor:
    return z.movedim(axis, -1).reshape(-1, z.shape[axis])


def _is_whole_number(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and not value.is_floating_point()
        and not value.is_complex()
        and value.dtype is not torch.bool
    )
