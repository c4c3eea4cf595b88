"""Weights that a layer quantises on the way: what it holds, what it computes with, and the gradients of both.

Found by intercepting the linear and convolutional functions: a weight that is not a parameter, has the shape of a
parameter of the module that makes the call, and takes few values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diag.errors import MissingQuantity
from diag.snapshot.explain import CALL_ERRORS, explained
from diag.snapshot.inside.names import module_names
from diag.snapshot.preserve import preserved
from diag.snapshot.snapshot import Snapshot

FUNCTIONS = {F.linear, F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d}
MOST_LEVELS = 256


@dataclass(frozen=True)
class QuantisedWeight:
    """One quantised layer. latent: the parameter w. used: Q(w), what enters the product. levels: different values
    in it. upstream: dL / dQ(w). gradient: dL / dw, as the layer's own backward pass gives it. scales: the
    gradients of the module's single numbers that are trained (learned scales), by name.
    """

    name: str
    latent: Tensor
    used: Tensor
    levels: int
    upstream: Tensor
    gradient: Tensor
    scales: dict[str, float]


def quantised_weights(snapshot: Snapshot) -> tuple[QuantisedWeight, ...]:
    """The quantised layers of the model with the gradients of the mean loss.

    Raises MissingQuantity where no layer quantises its weight.
    """
    model, batches = snapshot.model, snapshot.batches
    modules = dict(model.named_modules())
    sums: dict[str, list[Tensor]] = {}
    scales: dict[str, dict[str, float]] = {}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    try:
        with preserved(model), torch.enable_grad(), module_names(model) as inside:
            for batch in batches:
                snapshot.deadline.check()
                heard: dict[str, tuple[nn.Parameter, Tensor]] = {}
                with _Weights(heard, inside, modules):
                    outputs = batch.forward(model)
                if not heard:
                    break
                loss = snapshot.batch_loss(outputs, batch.targets) * (batch.size / snapshot.num_examples)
                for name, (latent, used) in heard.items():
                    found[name] = latent.detach(), used.detach()
                    _add(sums.setdefault(name, []), loss, [used, latent])
                    _add_scales(scales.setdefault(name, {}), loss, modules[name])
    except CALL_ERRORS as error:
        raise explained(model, snapshot.batches, error) from error
    if not found:
        raise MissingQuantity(
            "no layer of the model computes with a quantised copy of its weight (of the same shape, with at most "
            f"{MOST_LEVELS} different values)."
        )
    return tuple(
        QuantisedWeight(n, latent, used, len(used.unique()), sums[n][0], sums[n][1], scales[n])
        for n, (latent, used) in found.items()
    )


def _add(totals: list[Tensor], loss: Tensor, tensors: list[Tensor]) -> None:
    grads = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
    parts = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, tensors, strict=True)]
    totals[:] = [a + b for a, b in zip(totals, parts, strict=True)] if totals else parts


def _add_scales(totals: dict[str, float], loss: Tensor, module: nn.Module) -> None:
    single = {n: p for n, p in module.named_parameters() if p.numel() == 1 and p.requires_grad}
    if single:
        grads = torch.autograd.grad(loss, list(single.values()), retain_graph=True, allow_unused=True)
        for name, g in zip(single, grads, strict=True):
            totals[name] = totals.get(name, 0.0) + (0.0 if g is None else float(g.sum()))


class _Weights(TorchFunctionMode):
    """Records which weights the layers compute with."""

    def __init__(
        self,
        heard: dict[str, tuple[nn.Parameter, Tensor]],
        inside: Callable[[], str],
        modules: dict[str, nn.Module],
    ) -> None:
        super().__init__()
        self._heard, self._inside, self._modules = heard, inside, modules

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FUNCTIONS:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            name = self._inside()
            if isinstance(weight, Tensor) and not isinstance(weight, nn.Parameter) and name not in self._heard:
                latent = self._latent(weight, name)
                if latent is not None and weight.requires_grad and _is_quantised(weight.detach()):
                    self._heard[name] = latent, weight
        return func(*args, **kwargs)

    def _latent(self, weight: Tensor, name: str) -> nn.Parameter | None:
        module = self._modules.get(name)
        own = (
            []
            if module is None
            else [p for p in module.parameters() if p.shape == weight.shape and p.requires_grad]
        )
        return own[0] if len(own) == 1 else None


def _is_quantised(weight: Tensor) -> bool:
    """Few values for the numbers that there are; scales that are one a row are taken out."""
    rows = weight.flatten(1)
    unscaled = rows / rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    levels = min(len(weight.unique()), len((unscaled * 2**12).round().unique()))
    return levels <= MOST_LEVELS and levels <= max(2, weight.numel() // 4)
