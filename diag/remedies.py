"""Remedies for a softmax that rounds: an exact cross-entropy, StableMax, and gradients without their scaling part.

Each is a control to train with, not a recommendation: if training behaves as before, what it removes was not the
cause.

Cross-entropy by the log-odds margin is right in any floating type, where log_softmax loses its small terms. With
m_i = z_{i,y} - logsumexp_{k != y} z_{i,k} the cross-entropy of example i is exactly softplus(-m_i). This form
never adds a small number to 1, so a confident example keeps its gradient (Prieto et al. 2025, arXiv:2501.04697,
describe what is lost otherwise). StableMax replaces exp by a function that grows linearly (Definition 4), and
`perp_grad` takes from the gradient its part along the weights (Definition 7).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from diag.door import at_the_door
from diag.errors import InvalidInput, type_of
from diag.linalg.margins import margins

REDUCTIONS = ("mean", "sum", "none")
LOGITS_AT_ONCE = 1 << 24  # logits: 64 MB of float32
WIDE_TYPES = (torch.float32, torch.float64)  # products in narrower types are taken in float32
TINY, HUGE = 1e-12, 1e15  # lengths between which products in float32 keep their digits
PARALLEL_WITHIN = 4  # roundings of the gradient's length


def stable_cross_entropy(logits: Tensor, labels: Tensor, *, reduction: str = "mean") -> Tensor:
    """Cross-entropy softplus(-m) of logits (n, K) with labels (n,): a drop-in for `F.cross_entropy`.

    reduction: "mean" (a scalar), "sum" (a scalar) or "none" (n,). In float32 the gradient is right to about
    1e-6 up to a margin of 87, coarser beyond, and 0 from 104 on; by log_softmax it is lost from a margin of 16.6.
    Raises InvalidInput for shapes that do not match or an unknown reduction.

    >>> import torch
    >>> logits, labels = torch.tensor([[30.0, 0.0]], requires_grad=True), torch.tensor([0])
    >>> stable_cross_entropy(logits, labels).backward()
    >>> bool(logits.grad[0, 1] > 0)  # by log_softmax in float32 it is exactly zero
    True
    """
    _check_tensors(stable_cross_entropy=(logits, labels))
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or logits.shape[1] < 2:
        raise InvalidInput(
            f"stable_cross_entropy got logits of shape {tuple(logits.shape)} and labels of shape "
            f"{tuple(labels.shape)}; expected (examples, classes) with at least 2 classes, and (examples,)."
        )
    if reduction not in REDUCTIONS:
        raise InvalidInput(f"The reduction is {reduction!r}; expected one of {', '.join(REDUCTIONS)}.")
    # softplus(-m) = -logsigmoid(m); torch's softplus drops exp(-x) above its threshold, logsigmoid does not.
    losses = _in_chunks(lambda z, y: -F.logsigmoid(margins(z, y)), logits, labels)
    return losses if reduction == "none" else getattr(losses, reduction)()


def stable_binary_cross_entropy(logits: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
    """Binary cross-entropy of logits with targets 0 or 1 of the same shape, whose gradient never rounds away.

    The gradient of `F.binary_cross_entropy_with_logits` is sigmoid(z) - y: of a target 1 it is exactly 0 from z = b
    ln 2 on for b significand bits (16.6 in float32), while a target 0 keeps its gradient down to z = -103. Here
    both are -logsigmoid of a logit of their own sign, which keeps it. Multi-label targets are many binary ones.
    Raises InvalidInput for shapes that differ, targets other than 0 and 1, or an unknown reduction.
    """
    _check_tensors(stable_binary_cross_entropy=(logits, targets))
    if logits.shape != targets.shape or bool(((targets != 0) & (targets != 1)).any()):
        raise InvalidInput(
            f"stable_binary_cross_entropy got logits of shape {tuple(logits.shape)} and targets of shape "
            f"{tuple(targets.shape)}; expected one shape, and targets 0 or 1."
        )
    if reduction not in REDUCTIONS:
        raise InvalidInput(f"The reduction is {reduction!r}; expected one of {', '.join(REDUCTIONS)}.")
    losses = -F.logsigmoid(torch.where(targets == 1, logits, -logits))
    return losses if reduction == "none" else getattr(losses, reduction)()


def _check_tensors(**checked_tensors: tuple[Any, ...]) -> None:
    for name, values in checked_tensors.items():
        for value in values:
            if not isinstance(value, Tensor):
                raise InvalidInput(f"{name} got {type_of(value)}; expected tensors.")


def _in_chunks(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor) -> Tensor:
    """Losses (n,) of blocks of rows, each computed again in the backward pass where one block is not all."""
    rows = max(1, LOGITS_AT_ONCE // logits.shape[1])
    if len(logits) <= rows:
        return loss(logits, labels)
    blocks = zip(logits.split(rows), labels.split(rows), strict=True)
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return torch.cat([loss(z, y) for z, y in blocks])
    return torch.cat([checkpoint(loss, z, y, use_reentrant=False) for z, y in blocks])


def stablemax(logits: Tensor, dim: int = -1) -> Tensor:
    """Probabilities s(z_k) / sum s(z_j) with s(z) = z + 1 for z >= 0 and 1 / (1 - z) below (Definition 4).

    The same as a softmax of sign(z) log(1 + |z|) (Proposition 1), by which it is computed.
    """
    _check_tensors(stablemax=(logits,))
    return (logits.sign() * logits.abs().log1p()).softmax(dim)


def stablemax_cross_entropy(logits: Tensor, labels: Tensor, *, reduction: str = "mean") -> Tensor:
    """-log of the StableMax probability of the label: logits (n, K), labels (n,), for training as a control.

    The authors' code evaluates it in float64 and adds 1e-30 to the probabilities; here it is the exact
    cross-entropy of the transformed logits, in their own type. Raises InvalidInput as `stable_cross_entropy`.
    """
    _check_tensors(stablemax_cross_entropy=(logits, labels))
    return stable_cross_entropy(logits.sign() * logits.abs().log1p(), labels, reduction=reduction)


class Removable(Protocol):
    """What takes a hook away again."""

    def remove(self) -> None:
        """Take the hook away."""


@at_the_door
def perp_grad(optimizer: Optimizer, *, whole: bool = False) -> Removable:
    """From now on the optimizer's gradients lose their part along the weights before each step (perpGrad).

    whole=True: along the whole vector of its parameters, as Definition 7 of the paper says. By default each
    tensor's gradient loses its part along that tensor and is brought back to its old length, as the authors' code
    does; the two differ. Any torch optimizer: the gradients are changed in place by a hook before the step, so
    schedulers and scalers go on as they are; clip before. Returns a handle whose `remove()` ends it.

    It costs one pass over weights and gradients for the products and one to change the gradients, at least 20 bytes
    a float32 parameter where a tensor fits no cache and 12 where it does; Adam moves 28 in its fused form and
    several times as many in torch's default one (`scripts/bench_perp_grad.py` measures both).

    Raises InvalidInput, at the step, for a sparse gradient or for an optimizer that is given a closure, which
    computes gradients after the hook (LBFGS).
    """

    if not isinstance(optimizer, Optimizer):
        raise InvalidInput(f"optimizer is {type_of(optimizer)}; expected a torch.optim.Optimizer.")

    def before_step(_: Optimizer, args: Any, kwargs: Any) -> None:
        if any(callable(a) for a in (*args[1:], kwargs.get("closure"))):
            raise InvalidInput(
                "perp_grad cannot change gradients that a closure computes inside the step; use step()."
            )
        tensors = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if any(p.grad.layout != torch.strided for p in tensors):
            raise InvalidInput("perp_grad met a sparse gradient; expected dense ones.")
        if tensors:
            with torch.no_grad():
                _project_whole(tensors) if whole else _project_each(tensors)

    return optimizer.register_step_pre_hook(before_step)


def _project_each(tensors: list[Tensor]) -> None:
    """By products of one pass over each tensor: |g - c p|^2 = |g|^2 - c <p, g> with c = <p, g> / |p|^2."""
    along, lengths, before = _products(tensors)
    gradients, scales, parts = [], [], []
    for p, product, w, g in zip(tensors, along, lengths, before, strict=True):
        if w == 0 or g == 0 == product:
            continue
        left = g * g - (product / w) ** 2
        assert p.grad is not None
        fits = TINY < g < HUGE and left > g * g / 2
        if fits and p.grad.dtype in WIDE_TYPES:
            scale = g / math.sqrt(left)
            gradients.append(p.grad)
            scales.append(scale)
            parts.append((p, -scale * product / w**2))
        else:
            _project_wider(p, p.grad, torch.float32 if fits else torch.float64)
    if gradients:
        torch._foreach_mul_(gradients, scales)
    for gradient, (p, part) in zip(gradients, parts, strict=True):
        gradient.add_(p, alpha=part)


def _project_wider(p: Tensor, g: Tensor, dtype: torch.dtype) -> None:
    """The same in a wider type: where squares over- or underflow, the two are nearly parallel, or their own type
    would round the factors. What is left of parallel ones, as of a tensor with one entry, is rounding, which no
    length is given to."""
    weights, gradient = p.to(dtype).reshape(-1), g.to(dtype).reshape(-1)
    rest = gradient - torch.dot(weights, gradient) / torch.dot(weights, weights) * weights
    before, after = gradient.norm(), rest.norm()
    parallel = after <= PARALLEL_WITHIN * torch.finfo(g.dtype).eps * before  # no: a NaN goes on to be seen
    g.copy_(torch.where(parallel, 0.0, rest * (before / after)).view_as(g))


def _project_whole(tensors: list[Tensor]) -> None:
    along, lengths, _ = _products(tensors, of_gradients=False)
    length = math.hypot(*lengths)
    if length > 0:
        part = -sum(along) / length**2
        for p in tensors:
            assert p.grad is not None
            p.grad.add_(p, alpha=part)


def _products(tensors: list[Tensor], of_gradients: bool = True) -> tuple[list[float], list[float], list[float]]:
    """<p, g>, |p| and, where it is asked for, |g| of each tensor p and its gradient g."""
    weights = [_flat(p) for p in tensors]
    gradients = [_flat(p.grad) for p in tensors if p.grad is not None]
    along = [torch.dot(w, g) for w, g in zip(weights, gradients, strict=True)]
    values = _numbers([*along, *torch._foreach_norm([*weights, *gradients] if of_gradients else weights)])
    n = len(tensors)
    return values[:n], values[n : 2 * n], values[2 * n :]


def _flat(t: Tensor) -> Tensor:
    return t.reshape(-1) if t.dtype in WIDE_TYPES else t.float().reshape(-1)


def _numbers(scalars: list[Tensor]) -> list[float]:
    """Their values, fetched together: one by one each would wait for the accelerator."""
    if len({(s.device, s.dtype) for s in scalars}) > 1:
        scalars = [s.double().cpu() for s in scalars]
    return torch.stack(scalars).tolist() if scalars else []
