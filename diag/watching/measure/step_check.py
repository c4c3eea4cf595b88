"""Whether the gradients that were read of a training step are the step's own.

They count where backward() was called on a multiple of one known loss function's value, the same as that function
gives on the model's outputs and the targets, and where the examples' gradients add up to the gradient that the step
has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from diag.errors import DiagError
from diag.gradients import StepGradients
from diag.watching.observe.capture import SeenBackward, observed_loss
from diag.watching.observe.norms import HALF_PRECISION

SAME_GRADIENT = 1e-3
LOW_TOLERANCE = 3e-2  # where the step computes in half precision


def why_not_the_steps(
    step: StepGradients, seen: SeenBackward | None, loss_fn: Any, clean: bool, parameters: Sequence[nn.Parameter]
) -> str:
    """Why what was read cannot be used; empty where every check holds.

    clean: no gradient was there before the backward pass. parameters: those of the step, with its gradient.
    """
    if not clean:
        return "gradients were left over from an earlier backward pass"
    if seen is None:
        return "backward() was not called on a multiple of one loss function's value"
    found = observed_loss(seen.forward, seen.call)
    if isinstance(found, str):
        return found
    if loss_fn is None:
        return "the loss is the model's own"
    try:
        return _disagreement(step, parameters, seen)
    except DiagError as error:
        return as_clause(error)


def _disagreement(step: StepGradients, parameters: Sequence[nn.Parameter], seen: SeenBackward) -> str:
    """Why the examples' gradients are not those of the step; empty where they add up to its gradient."""
    expected = torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad.to_dense()).reshape(-1) for p in parameters]
    )
    if not bool(torch.isfinite(expected).all()):
        return "its gradient is not finite"
    low = seen.call.prediction.dtype in HALF_PRECISION or any(
        torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")
    )
    gap = torch.linalg.vector_norm(step.mean().to(expected) - expected)
    if not bool(gap <= (LOW_TOLERANCE if low else SAME_GRADIENT) * torch.linalg.vector_norm(expected)):
        return "its examples' gradients do not add up to its gradient (an added term, or several processes)"
    return ""


def as_clause(error: DiagError) -> str:
    """What was found and what to do about it, as the end of a sentence."""
    text = str(error).rstrip(".")
    return text[0].lower() + text[1:]
