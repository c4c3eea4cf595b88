"""The one hook that a watched model carries, and where else its calls must be looked for.

The hook is invisible to torch.compile (it does nothing while tracing, so the graph is that of the unwatched
model) and to copies: a deep copy or a pickle of the model carries a function of the standard library that does
nothing. A compiled model runs its own hooks only on the wrapper that torch.compile returned, so wrappers are
found and hooked too.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from diag.checkpoints.unwrap import bare_model
from diag.snapshot.batch import tensors_in
from diag.watching.guard import safely, tell

# What our hooks become in a copy: `nullcontext().__exit__` takes anything, returns None, and needs no diag.
INERT = (getattr, (contextlib.nullcontext(), "__exit__"))

SeenCall = Callable[[Any, Any, Any, nn.Module], None]
Evaluated = Callable[[Any, Any, Any, nn.Module], None]
Broke = Callable[[Exception], None]


class ForwardHook:
    """Calls `seen(args, kwargs, outputs, model)` at each call of `model` that training makes, `evaluated(args,
    kwargs, outputs, model)` at each without gradients, and `broke(error)` where that fails."""

    def __init__(self, model: nn.Module, seen: SeenCall, evaluated: Evaluated, broke: Broke) -> None:
        self.model, self.seen, self.evaluated, self.broke = model, seen, evaluated, broke

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if torch.is_grad_enabled():
            try:  # as `safely`, which is a call more at every step
                self._called(module, args, kwargs, outputs)
            except Exception as error:
                tell(self.broke, error)
        elif module is self.model and torch._C._current_graph_task_id() == -1:
            safely(self.evaluated, args, kwargs, outputs, module, broke=self.broke)

    def _called(self, module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        # A module that data-parallel replicas share hooks with is not the model; a pass inside backward is a
        # checkpoint's recomputation; inside torch.func the tensors are wrappers.
        if module is not self.model or torch._C._current_graph_task_id() != -1 or is_transformed(outputs):
            return
        self.seen(args, kwargs, outputs, module)

    def __reduce__(self) -> Any:
        return INERT


class ModelHooks:
    """Every hook on the model and on its compiled wrappers; `remove` leaves none behind."""

    def __init__(self, models: tuple[nn.Module, ...], seen: SeenCall, evaluated: Evaluated, broke: Broke) -> None:
        self._bare, self._tell = models[-1], (seen, evaluated, broke)
        self._handles: list[Any] = []
        self._hooked: list[nn.Module] = []
        self._in_place: tuple[Any, Any] | None = None
        for model in models:
            self._hook(model)
        self.find_compiled()

    def _hook(self, model: nn.Module) -> None:
        if not any(m is model for m in self._hooked):
            self._hooked.append(model)
            hook = ForwardHook(model, *self._tell)
            self._handles.append(model.register_forward_hook(hook, with_kwargs=True))

    @property
    def single(self) -> bool:
        """Whether one module alone is listened to, so that each call is seen once."""
        return len(self._hooked) == 1 and self._in_place is None

    def find_compiled(self) -> None:
        """Hook the wrappers that torch.compile has made of the model; it may do so after the watch starts."""
        compiled = getattr(self._bare, "_compiled_call_impl", None)
        if compiled is not None and self._in_place is None:
            ours = _observed(compiled, ForwardHook(self._bare, *self._tell))
            self._bare._compiled_call_impl = ours
            self._in_place = (compiled, ours)
        for wrapper in compiled_wrappers(self._bare):
            self._hook(wrapper)

    def put_back(self) -> bool:
        """Hook again where other code has removed the hook, as by clearing all; whether there was any."""
        gone = [i for i, (m, h) in enumerate(zip(self._hooked, self._handles, strict=True)) if not _holds(m, h)]
        for i in gone:
            hook = ForwardHook(self._hooked[i], *self._tell)
            self._handles[i].remove()
            self._handles[i] = self._hooked[i].register_forward_hook(hook, with_kwargs=True)
        return bool(gone)

    def remove(self) -> None:
        """Take every hook off again."""
        for handle in self._handles:
            handle.remove()
        if self._in_place is not None and self._bare._compiled_call_impl is self._in_place[1]:
            self._bare._compiled_call_impl = self._in_place[0]
        self._handles, self._hooked, self._in_place = [], [], None


def _holds(model: nn.Module, handle: Any) -> bool:
    return handle.id in model._forward_hooks


def _observed(compiled: Callable[..., Any], hook: ForwardHook) -> Callable[..., Any]:
    @functools.wraps(compiled)
    def call(*args: Any, **kwargs: Any) -> Any:
        outputs = compiled(*args, **kwargs)
        hook(hook.model, args, kwargs, outputs)
        return outputs

    return call


def compiled_wrappers(model: nn.Module) -> list[nn.Module]:
    """What torch.compile has made of the model; a data-parallel wrapper may lie between them."""
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")
    if eval_frame is None:
        return []
    return [o for o in instances_of(eval_frame.OptimizedModule) if bare_model(o) is model]


def instances_of(kind: type, exactly: bool = False) -> list[Any]:
    """All objects of this class that exist, and of its subclasses unless `exactly` this one is meant. Each refers
    to its class, and a search for that is several times as fast as a walk through the objects of the process here,
    and slower with each further class."""
    kinds = [kind]
    for each in kinds:
        kinds += [] if exactly else each.__subclasses__()
    return [o for o in gc.get_referrers(*kinds) if type(o) in kinds]


def frames_compiled() -> int:
    """How many pieces of code torch.compile has compiled so far in this process."""
    return getattr(sys.modules.get("torch._dynamo.convert_frame"), "FRAME_COUNTER", 0)


def is_transformed(outputs: Any) -> bool:
    """Whether the first tensor is a wrapper of torch.func, so that this is not a plain call."""
    if isinstance(outputs, Tensor):
        return is_functorch_wrapped_tensor(outputs)
    return any(is_functorch_wrapped_tensor(t) for t in tensors_in(outputs)[:1])
