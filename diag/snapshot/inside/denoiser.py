"""A model that maps noisy inputs to clean ones of the same shape: its outputs, and products with its Jacobian."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diag.errors import MissingQuantity
from diag.snapshot.explain import CALL_ERRORS, explained
from diag.snapshot.parameters import copy_with
from diag.snapshot.preserve import preserved
from diag.snapshot.snapshot import Snapshot

DENOISED_EXAMPLES = 32


@dataclass(frozen=True)
class DenoiserAt:
    """A denoiser f at noisy inputs y (n, ...), with their clean targets x (n, ...) or None.

    outputs: f(y). jvp(v), vjp(v): J v and J^T v of each example's own Jacobian, (n, ...) each. other_outputs: what
    another network makes of the same inputs, or None.
    """

    noisy: Tensor
    clean: Tensor | None
    outputs: Tensor
    jvp: Callable[[Tensor], Tensor]
    vjp: Callable[[Tensor], Tensor]
    other_outputs: Tensor | None = None


def denoiser(snapshot: Snapshot) -> DenoiserAt:
    """The model as a denoiser on at most 32 examples of the first batch.

    Raises MissingQuantity where inputs and outputs are not floating tensors of one shape.
    """
    model, (batch,) = snapshot.model, snapshot.cuttable(snapshot.batches[:1])
    batch = batch.few(DENOISED_EXAMPLES)
    y = batch.args[0] if len(batch.args) == 1 and not batch.kwargs else None
    if not isinstance(y, Tensor) or not y.is_floating_point():
        raise MissingQuantity(
            "the inputs are not one floating tensor; give data= with (noisy inputs, clean targets)."
        )

    def called(which: nn.Module, noised: Tensor) -> Tensor:
        try:
            with preserved(which):
                return which(noised)
        except CALL_ERRORS as error:
            raise explained(model, snapshot.batches, error) from error

    with torch.no_grad():
        outputs = called(model, y)
    if not isinstance(outputs, Tensor) or outputs.shape != y.shape:
        raise MissingQuantity("the model does not give outputs of its inputs' shape, as a denoiser does.")

    def vjp(v: Tensor) -> Tensor:
        with torch.enable_grad():
            noised = y.detach().requires_grad_()
            return torch.autograd.grad(called(model, noised), noised, v)[0]

    def jvp(v: Tensor) -> Tensor:
        # Twice backward: the product J^T u is linear in u, and its derivative by u times v is J v.
        with torch.enable_grad():
            noised, u = y.detach().requires_grad_(), torch.zeros_like(y).requires_grad_()
            back = torch.autograd.grad(called(model, noised), noised, u, create_graph=True)[0]
            return torch.autograd.grad(back, u, v)[0]

    clean = batch.targets if isinstance(batch.targets, Tensor) and batch.targets.shape == y.shape else None
    return DenoiserAt(y, clean, outputs, jvp, vjp, _others(snapshot, called, y))


def _others(snapshot: Snapshot, called: Callable[[nn.Module, Tensor], Tensor], y: Tensor) -> Tensor | None:
    state = snapshot.other
    if state is None:
        return None
    other = copy_with(snapshot.model, state, "other")
    with torch.no_grad():
        return called(other, y)
