"""Run a model so that its loss can be differentiated twice, and refuse models for which nothing can.

Several fused or stateful operations have no second derivative, or a wrong one that raises no error. Inside
`twice_differentiable(model)` each of those that has an exact plain form uses it:

- attention uses the math kernel, also under an inner `sdpa_kernel`, and the encoder fast path is off;
- compiled code runs eagerly; checkpointed segments keep their graph (the reentrant kind forbids `autograd.grad`,
  and both run again with the module's own parameters instead of those given to `call_at`);
- weight norm is v * (g / ||v||) (the fused form's second derivative is wrong);
- embeddings give dense gradients and are not renormalised or rescaled on the way;
- an autocast region that the model enters by itself stays in the precision asked for;
- recurrent layers do not use cuDNN on CUDA.

Others are replaced by ones with a shorter second derivative (`shorter.py`). The self-test
(`selftest.py`) catches what is not on this list, and a model that does not work with the replacements.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from diag.curvature.shorter import SHORTER
from diag.errors import Unsupported
from diag.snapshot import pause
from diag.snapshot.preserve import exact_arithmetic, preserved
from diag.snapshot.state.hooks import silent

SHARDING = ("FullyShardedDataParallel", "DeepSpeedEngine")


def refuse_impossible(model: nn.Module) -> None:
    """Raises Unsupported where the loss is not a mean over examples in evaluation mode, or is sharded."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise Unsupported(
                "The model is compiled to TorchScript, whose parameters cannot be moved; measure the Python module "
                "that it was made from."
            )
        if type(module).__name__ in SHARDING or hasattr(module, "_get_fsdp_state"):
            raise Unsupported(
                f"The model is sharded ({type(module).__name__}); gather the parameters into an unsharded copy "
                "of the model and measure that."
            )
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise Unsupported(
                f"{type(module).__name__} {name!r} keeps no running statistics, so its batches couple the examples "
                "and the loss is not a mean over them; build it with track_running_stats=True."
            )


@contextmanager
def measured_model(model: nn.Module, shorter: bool = True) -> Iterator[None]:
    """Evaluation mode and twice-differentiable kernels, in exact arithmetic; afterwards no trace is left.

    `shorter` allows the stand-ins of `shorter.py`, which only save time.
    """
    with preserved(model), twice_differentiable(model, shorter):
        yield


@contextmanager
def replayed_model(model: nn.Module) -> Iterator[None]:
    """`measured_model` for backward passes over a kept graph: nothing is copied, so nothing waits for a device.

    A backward pass may run the model's code again (a checkpoint of another library), so modes and kernels matter
    here too; each is inside `PlainKernels`, which would slow down what is computed between two passes.
    """
    modes = [(m, m.training) for m in model.modules() if m.training]
    for module, _ in modes:
        module.training = False
    try:
        with pause.measuring(), exact_arithmetic(), silent(model), _plain_backends(model):
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def twice_differentiable(model: nn.Module, shorter: bool = True) -> Iterator[None]:
    """The contexts named in the module's text, around a forward or a backward pass."""
    with _plain_backends(model), PlainKernels(shorter):
        yield


@contextmanager
def _plain_backends(model: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if "torch._dynamo" in sys.modules:  # importing it costs a second, and without it nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if any(isinstance(m, nn.RNNBase) for m in model.modules()):
            stack.enter_context(_set(torch.backends.cudnn, "enabled", False))
        stack.enter_context(_set(torch.utils.checkpoint, "CheckpointFunction", _CallNow))
        stack.enter_context(
            _set(torch.utils.checkpoint, "_checkpoint_without_reentrant_generator", _nothing_around)
        )
        stack.enter_context(_fast_path_off())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


class PlainKernels(TorchFunctionMode):
    """Replaces torch functions whose second derivative is missing, wrong or expensive, one call at a time."""

    def __init__(self, shorter: bool = True):
        super().__init__()
        self.replacements = _REPLACEMENTS | SHORTER if shorter else _REPLACEMENTS

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        replacement = self.replacements.get(func, func)
        device = _autocast_device()
        if device is None:
            return replacement(*args, **(kwargs or {}))
        with torch.autocast(device, enabled=False):  # a region that the model entered by itself
            return replacement(*args, **(kwargs or {}))


def _autocast_device() -> str | None:
    """The device type of an autocast region that is in force, if any."""
    return next((device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)), None)


def _attention(*args: Any, **kwargs: Any) -> Any:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **kwargs)


def _multi_head_attention(*args: Any, **kwargs: Any) -> Any:
    with sdpa_kernel(SDPBackend.MATH):
        return F.multi_head_attention_forward(*args, **kwargs)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _plain_embedding(function: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(function)

    def lookup(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        settings = call.arguments
        if settings["max_norm"] is not None:
            _refuse_long_rows(settings["weight"], settings["max_norm"], settings["norm_type"])
        settings.update(max_norm=None, scale_grad_by_freq=False, sparse=False)
        return function(*call.args, **call.kwargs)

    return lookup


def _refuse_long_rows(weight: Tensor, max_norm: float, norm_type: float) -> None:
    if bool((weight.detach().norm(norm_type, dim=1) > max_norm * (1 + 1e-5)).any()):
        raise Unsupported(
            f"An embedding with max_norm={max_norm} has longer rows, which its forward pass would shorten in "
            "place, so the loss is not a function of the parameters; shorten them first with "
            "weight.copy_(torch.renorm(weight, norm_type, 0, max_norm)) under torch.no_grad()."
        )


_REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head_attention,
    torch._weight_norm: _weight_norm,
    F.embedding: _plain_embedding(F.embedding),
    F.embedding_bag: _plain_embedding(F.embedding_bag),
}


class _CallNow:
    """Stands in for the reentrant checkpoint: calls the function and keeps its graph."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


def _nothing_around(*args: Any, **kwargs: Any) -> Iterator[None]:
    """Stands in for what the non-reentrant checkpoint does before and after calling the function."""
    yield


@contextmanager
def _fast_path_off() -> Iterator[None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _set(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name, None)
    if before is None:  # another torch version: what this would have prevented is left to the self-test
        yield
        return
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
