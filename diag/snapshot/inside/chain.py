"""What signals and gradients do from one linear or convolutional layer to the next: kernels and susceptibilities.

Measured on at most 64 examples, by products with the transposed Jacobian between one layer's output z and the next
one's z': with random signs for the mean squared singular value, with z' itself for the response to a larger z.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diag.errors import MissingQuantity
from diag.linalg.reductions import length, mean_square
from diag.snapshot.explain import CALL_ERRORS, explained
from diag.snapshot.preserve import preserved
from diag.snapshot.snapshot import Snapshot

CHAIN_EXAMPLES, CHAIN_PROBES = 64, 8
CHAIN_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = "Conv1D"  # transformers' linear layer, whose weight is (inputs, outputs)
SAME_GRADIENT_WITHIN = 1e-3  # relative: a gradient that comes through the next layer alone


@dataclass(frozen=True)
class ChainLayer:
    """One call of a linear or convolutional layer at the moment of the snapshot.

    width: units (channels). kernel: mean square of its outputs z. correlation: mean over pairs of examples of <z,
    z'> over the kernel. weight_variance: fan-in times the variance of the weights (C_W); bias_variance: that of the
    biases (C_b). perpendicular, parallel: the susceptibilities of the step to the next layer, d K' for a small
    orthogonal change of z and for a larger z (NaN for the last). backward: |J^T v|^2 / |v|^2 of random signs v at
    the last layer's output. direct: whether everything goes on through the next layer alone.
    """

    name: str
    width: int
    kernel: float
    correlation: float
    weight_variance: float
    bias_variance: float
    perpendicular: float
    parallel: float
    backward: float
    direct: bool


@dataclass(frozen=True)
class LayerChain:
    """The layers in the order of their calls. normalised: whether the model has normalisation layers."""

    layers: tuple[ChainLayer, ...]
    normalised: bool


def layer_chain(snapshot: Snapshot) -> LayerChain:
    """Kernels, susceptibilities and gradients of the model's linear and convolutional layers.

    Raises MissingQuantity for a model that calls fewer than two.
    """
    model, (batch,) = snapshot.model, snapshot.cuttable(snapshot.batches[:1])
    calls: list[tuple[str, Any, Tensor]] = []

    def keep(name: str, module: nn.Module, output: Any) -> Tensor | None:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        if torch._C._current_graph_task_id() != -1:
            return output.clone()  # a checkpoint runs the layer again: the same operations, nothing to keep
        kept = output if output.requires_grad else output.detach().requires_grad_()
        calls.append((name, module, kept))
        return kept.clone()  # an activation that works in place changes the copy

    hooks = [
        m.register_forward_hook(lambda m, a, o, n=n: keep(n, m, o))
        for n, m in model.named_modules()
        if isinstance(m, CHAIN_LAYERS) or _is_transposed(m)
    ]
    try:
        with preserved(model), torch.enable_grad():
            batch.few(CHAIN_EXAMPLES).forward(model)
            if len(calls) < 2:
                raise MissingQuantity("the model calls fewer than two linear or convolutional layers.")
            return LayerChain(_measured(calls, snapshot), _is_normalised(model))
    except CALL_ERRORS as error:
        raise explained(model, snapshot.batches, error) from error
    finally:
        for hook in hooks:
            hook.remove()


def _measured(calls: list[tuple[str, Any, Tensor]], snapshot: Snapshot) -> tuple[ChainLayer, ...]:
    generator = torch.Generator().manual_seed(snapshot.seed)
    outputs = [z for _, _, z in calls]
    last = outputs[-1]
    v = _signs(last, generator)
    to_last = [*torch.autograd.grad(last, outputs[:-1], v, retain_graph=True, allow_unused=True), v]
    found = []
    for i, (name, module, z) in enumerate(calls):
        snapshot.deadline.check()
        after = outputs[i + 1] if i + 1 < len(calls) else None
        perpendicular, parallel = (math.nan, math.nan) if after is None else _susceptibilities(z, after, generator)
        weight = module.weight.detach().double()
        weight = weight.T if _is_transposed(module) else weight
        bias = module.bias
        found.append(
            ChainLayer(
                name=name,
                width=len(weight),
                kernel=mean_square(z),
                correlation=_correlation(z.detach().double().flatten(1)),
                weight_variance=mean_square(weight) * weight[0].numel(),
                bias_variance=mean_square(bias) if bias is not None else 0.0,
                perpendicular=perpendicular,
                parallel=parallel,
                backward=_share(to_last[i], v),
                direct=after is not None and _is_direct(z, after, to_last[i], to_last[i + 1]),
            )
        )
    return tuple(found)


def _is_transposed(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return type(module).__name__ == TRANSPOSED and isinstance(weight, Tensor) and weight.ndim == 2


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(2, like.shape, generator=generator).to(like).mul_(2).sub_(1)


def _product(after: Tensor, before: Tensor, v: Tensor) -> Tensor | None:
    """J^T v for the Jacobian of `after` by `before`; None where it does not depend on it."""
    return torch.autograd.grad(after, before, v, retain_graph=True, allow_unused=True)[0]


def _susceptibilities(z: Tensor, after: Tensor, generator: torch.Generator) -> tuple[float, float]:
    squares = []
    for _ in range(CHAIN_PROBES):
        v = _signs(after, generator)
        squares.append(_share(_product(after, z, v), v))
    back = _product(after, z, after.detach())
    if back is None:
        return math.nan, math.nan
    change = float((back.double() * z.detach().double()).sum()) / after.numel()
    kernel = mean_square(z)
    return sum(squares) / len(squares), change / kernel if kernel > 0 else math.nan


def _share(product: Tensor | None, v: Tensor) -> float:
    return math.nan if product is None else (length(product) / length(v)) ** 2


def _is_direct(z: Tensor, after: Tensor, total: Tensor | None, from_after: Tensor | None) -> bool:
    """Whether the gradient from the last layer comes through `after` alone, so that nothing skips it."""
    if total is None or from_after is None:
        return False
    through = _product(after, z, from_after)
    return through is not None and bool((total - through).norm() <= SAME_GRADIENT_WITHIN * total.norm())


def _correlation(z: Tensor) -> float:
    n, squares = len(z), z.square().sum()
    if n < 2 or float(squares) == 0:
        return math.nan
    return float((z.sum(0).square().sum() - squares) / ((n - 1) * squares))


def _is_normalised(model: nn.Module) -> bool:
    return any("norm" in type(m).__name__.lower() for m in model.modules())
