"""The one place that is hooked into torch, for every watcher of this process.

torch's optimizer hooks, its loss functions, `backward`, gradient clipping and the GradScaler belong to the
process and not to a model. They are hooked when the first watcher starts, put back when the last one ends, and
what they see is handed to every watcher, which picks what concerns its model. Nothing here raises on its own.
"""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from diag.watching.hooks.patches import Attribute, Body, Patch

LOSSES = (
    "cross_entropy",
    "nll_loss",
    "mse_loss",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "kl_div",
    "poisson_nll_loss",
    "soft_margin_loss",
    "multi_margin_loss",
    "multilabel_margin_loss",
    "multilabel_soft_margin_loss",
    "hinge_embedding_loss",
)


BACKWARD = ("tensors", "grad_tensors", "retain_graph", "create_graph", "grad_variables", "inputs")


class Listener(Protocol):
    """What a watcher hears of the process. None of these may raise."""

    def loss_called(self, function: Callable[..., Any], args: Any, kwargs: Any, value: Any) -> None: ...

    def backward_called(self, roots: Any, weight: Any, inputs: Any) -> None: ...

    def backward_done(self) -> None: ...

    def loss_scaled(self, losses: Any, scaled: Any) -> None: ...

    def zeroed(self, owner: Any) -> None: ...

    def before_clip(self, parameters: Any, max_norm: Any, total_norm: Any) -> Any: ...

    def after_clip(self, token: Any) -> None: ...

    def unscaling(self, optimizer: Optimizer, scaler: Any) -> None: ...

    def scaler_stepping(self, optimizer: Optimizer) -> None: ...

    def scaler_stepped(self, optimizer: Optimizer) -> None: ...

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any: ...

    def after_step(self, optimizer: Optimizer) -> None: ...

    def close(self) -> None: ...

    def abandon(self) -> None: ...


class Hub:
    """Hands what happens in the process to the listeners; holds them weakly, so a forgotten one can go."""

    def __init__(self) -> None:
        self._listeners: list[weakref.ref[Listener]] = []
        self._patches: list[Patch] = []
        self._handles: list[Any] = []
        self._inside_loss = False
        self._registered = False

    def add(self, listener: Listener) -> None:
        """Start handing on what happens."""
        self._listeners.append(weakref.ref(listener, self._gone))
        if not self._handles:
            self._install()

    def remove(self, listener: Listener) -> None:
        """Stop; with the last listener torch is as it was."""
        self._listeners = [r for r in self._listeners if r() is not None and r() is not listener]
        if not self._listeners:
            self._uninstall()

    @property
    def listeners(self) -> list[Listener]:
        """Those that are alive."""
        return [alive for r in self._listeners if (alive := r()) is not None]

    def _gone(self, reference: Any) -> None:
        self._listeners = [r for r in self._listeners if r is not reference]
        if not self._listeners:
            self._uninstall()

    def _install(self) -> None:
        self._handles = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        self._patches = self._make_patches()
        for patch in self._patches:
            patch.apply()
        if not self._registered:
            self._registered = True
            atexit.register(self._at_exit)
            if hasattr(os, "register_at_fork"):
                os.register_at_fork(after_in_child=self._in_child)

    def _uninstall(self) -> None:
        handles, self._handles = self._handles, []
        patches, self._patches = self._patches, []
        for handle in handles:
            handle.remove()
        for patch in patches:
            patch.undo()

    def _make_patches(self) -> list[Patch]:
        clip, scaler = torch.nn.utils.clip_grad, torch.amp.grad_scaler.GradScaler
        utils: Any = torch.nn.utils
        # clip_grad_norm_ calls the first name through its module, however it was itself imported.
        scaling = [(clip, "_clip_grads_with_norm_"), (utils, "clip_grads_with_norm_")]
        clamping = [(clip, "clip_grad_value_"), (utils, "clip_grad_value_")]
        return [
            *(Body(f, self._around_loss) for name in LOSSES if (f := getattr(F, name, None)) is not None),
            Attribute([(torch.autograd, "backward")], self._around_backward),
            Attribute([(Optimizer, "zero_grad"), (torch.nn.Module, "zero_grad")], self._around_zero),
            Attribute(scaling, self._around_clip),
            Attribute(clamping, self._around_clamp),
            Attribute([(scaler, "scale")], self._around_scale),
            Attribute([(scaler, "unscale_")], self._around_unscale),
            Attribute([(scaler, "step")], self._around_scaler_step),
        ]

    # What is seen. Each calls the original exactly once, with the arguments that it was given.

    def _around_loss(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._inside_loss or not self._listeners:
            return original(*args, **kwargs)
        self._inside_loss = True  # a loss that is made of other losses counts once
        try:
            value = original(*args, **kwargs)
        finally:
            self._inside_loss = False
        if type(value) is torch.Tensor and value.requires_grad and not is_functorch_wrapped_tensor(value):
            for listener in self.listeners:
                listener.loss_called(original, args, kwargs, value)
        return value

    def _around_backward(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if torch._C._current_graph_task_id() != -1:  # a reentrant checkpoint's, inside the loop's own
            return original(*args, **kwargs)
        given = dict(zip(BACKWARD, args, strict=False)) | kwargs
        for listener in self.listeners:
            listener.backward_called(given.get("tensors"), given.get("grad_tensors"), given.get("inputs"))
        result = original(*args, **kwargs)
        for listener in self.listeners:
            listener.backward_done()
        return result

    def _around_zero(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if torch._C._current_graph_task_id() == -1:  # an optimizer that steps inside a pass clears what it has used
            for listener in self.listeners:
                listener.zeroed(args[0])
        return original(*args, **kwargs)

    def _around_clip(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        given = dict(zip(("parameters", "max_norm", "total_norm", "foreach"), args, strict=False)) | kwargs
        return self._clipping(original, given, given.get("max_norm"), given.get("total_norm"))

    def _around_clamp(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        given = dict(zip(("parameters", "clip_value", "foreach"), args, strict=False)) | kwargs
        return self._clipping(original, given, None, None)

    def _clipping(self, original: Callable[..., Any], given: dict[str, Any], max_norm: Any, total: Any) -> Any:
        if isinstance(given.get("parameters"), Iterator):
            # A generator can be read once, and both the listeners and the original read it.
            given["parameters"] = list(given["parameters"])
        tokens = [
            (listener, listener.before_clip(given.get("parameters"), max_norm, total))
            for listener in self.listeners
        ]
        result = original(**given)
        for listener, token in tokens:
            listener.after_clip(token)
        return result

    def _around_scale(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        scaled = original(*args, **kwargs)
        losses = args[1] if len(args) > 1 else kwargs.get("outputs")
        for listener in self.listeners:
            listener.loss_scaled(losses, scaled)
        return scaled

    def _around_unscale(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        optimizer = args[1] if len(args) > 1 else kwargs.get("optimizer")
        for listener in self.listeners:
            listener.unscaling(optimizer, args[0])
        return original(*args, **kwargs)

    def _around_scaler_step(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        optimizer = args[1] if len(args) > 1 else kwargs.get("optimizer")
        for listener in self.listeners:
            listener.scaler_stepping(optimizer)
        result = original(*args, **kwargs)
        for listener in self.listeners:
            listener.scaler_stepped(optimizer)
        return result

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        changed = None
        for listener in self.listeners:
            ours = listener.before_step(optimizer, args, kwargs)
            if ours is not None:
                args, kwargs = changed = ours
        return changed

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for listener in self.listeners:
            listener.after_step(optimizer)

    # The ends of a process.

    def _at_exit(self) -> None:
        for listener in self.listeners:
            listener.close()

    def _in_child(self) -> None:
        # A forked worker (a DataLoader's) is not the training: it must neither record nor close the record.
        for listener in self.listeners:
            listener.abandon()
        self._listeners = []
        self._uninstall()


HUB = Hub()
