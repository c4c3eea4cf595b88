"""Models that cannot be measured as they are: without values, or not plain Python modules."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from diag.errors import Unsupported, first_line

LAZY = (
    "{} has no shape yet, and a measurement must not be what gives it one; call the model once on a batch before "
    "it is measured."
)
NO_VALUES = (
    "{} is on the meta device, which holds no numbers; load the weights, or where accelerate has moved them away, "
    "take its hooks off first: accelerate.hooks.remove_hook_from_module(model, recurse=True)."
)


SCRIPTED = (
    "{} is compiled to TorchScript, whose parameters cannot be moved and whose calls cannot be followed; measure "
    "the Python module that it was made from."
)
COMPLEX = (
    "Parameter {} has dtype {}; this is defined here for real parameters: split it into its real and imaginary "
    "parts."
)
CONVERTING = (
    "The model holds {} values and cannot be run in a wider type, in which this is computed ({}), as where its "
    "forward converts to {} itself; measure a copy, model.float(), whose forward leaves the type to its weights."
)
REENTRANT = (
    "The model recomputes activations with reentrant checkpoints, which allow no gradients but the parameters'; "
    "use torch.utils.checkpoint with use_reentrant=False."
)


def is_reentrant(error: Exception) -> bool:
    """Whether a reentrant checkpoint refused to be differentiated."""
    return isinstance(error, RuntimeError) and "use_reentrant" in str(error)


def refuse_unmade(model: nn.Module) -> None:
    """Raises Unsupported where a parameter or buffer has no shape or no values, or a part is no Python module."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise Unsupported(SCRIPTED.format(name or "The model"))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise Unsupported(LAZY.format(name))
        if tensor.is_meta:
            raise Unsupported(NO_VALUES.format(name))


def refuse_unusual(model: nn.Module, error: Exception) -> None:
    """After `error`: raises Unsupported where the model's parameters are complex, or of half precision and bound
    to it by its forward, or where its checkpoints allow no such derivative."""
    if is_reentrant(error):
        raise Unsupported(REENTRANT) from error
    parameters = list(model.named_parameters())
    for name, p in parameters:
        if p.is_complex():
            raise Unsupported(COMPLEX.format(name, p.dtype)) from error
    low = [p.dtype for _, p in parameters if p.is_floating_point() and p.dtype.itemsize < 4]
    if low and isinstance(error, RuntimeError):
        kind = str(low[0]).removeprefix("torch.")
        raise Unsupported(CONVERTING.format(kind, first_line(error), kind)) from error
