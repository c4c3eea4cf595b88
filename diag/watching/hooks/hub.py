"""The one place that is hooked into torch, for every watcher of this process.

torch's optimizer hooks, its loss functions, `backward`, gradient clipping and the GradScaler belong to the
process and not to a model. They are hooked when the first watcher starts, put back when the last one ends, and
what they see is handed to every watcher, which picks what concerns its model. Nothing here raises on its own.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.optim import lr_scheduler
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

from diag.snapshot.objective.loss_spy import FURTHER_LOSSES, LOSSES
from diag.snapshot.state.modes import unseen
from diag.watching.guard import safely, shielded
from diag.watching.hooks.events import Listener
from diag.watching.hooks.patches import Attribute, Body, Changed, Look, Patch, plain_copy, read_twice

BACKWARD_ARGUMENTS = ("tensors", "grad_tensors", "retain_graph", "create_graph", "grad_variables", "inputs")


class Hub:
    """Passes the events of the process on to the listeners; holds them weakly, so that a forgotten one is freed."""

    def __init__(self) -> None:
        self._listeners: list[weakref.ref[Listener]] = []
        self._patches: list[Patch] = []
        self._handles: list[Any] = []
        self._here = threading.local()  # how deep inside losses this thread is
        self._lock = threading.RLock()
        self._registered = False

    def add(self, listener: Listener) -> None:
        """Start passing events on to it."""
        with self._lock:
            self._listeners = [*self._listeners, weakref.ref(listener, shielded(self._gone))]
            if not self._handles:
                self._install()

    def remove(self, listener: Listener) -> None:
        """Stop; with the last listener torch is as it was."""
        with self._lock:
            self._listeners = [r for r in self._listeners if r() is not None and r() is not listener]
            if not self._listeners:
                self._uninstall()

    @property
    def listeners(self) -> list[Listener]:
        """Those that are alive; what comes at every step asks each reference itself, which is a call less."""
        return [alive for r in self._listeners if (alive := r()) is not None]

    def _gone(self, reference: Any) -> None:
        with self._lock:
            self._listeners = [r for r in self._listeners if r is not reference]
            if not self._listeners:
                self._uninstall()

    def _install(self) -> None:
        self._uninstall()
        self._here = threading.local()  # a depth that a broken end left would keep every later loss from being seen
        self._handles = [
            register_optimizer_step_pre_hook(shielded(self._before_step, self._broke)),
            register_optimizer_step_post_hook(shielded(self._after_step, self._broke)),
        ]
        self._patches = self._make_patches()
        for patch in self._patches:
            patch.apply()
        if not self._registered:
            self._registered = True
            atexit.register(shielded(self._at_exit))
            if hasattr(os, "register_at_fork"):
                os.register_at_fork(after_in_child=shielded(self._in_child))

    def _uninstall(self) -> None:
        handles, self._handles = self._handles, []
        patches, self._patches = self._patches, []
        for handle in handles:
            safely(handle.remove)
        # What could not be taken away stays known and is tried again, or it would be patched a second time.
        self._patches = [patch for patch in patches if not safely(_taken_away, patch)]

    def _make_patches(self) -> list[Patch]:
        clip, scaler = torch.nn.utils.clip_grad, torch.amp.grad_scaler.GradScaler
        utils: Any = torch.nn.utils
        # clip_grad_norm_ calls the first name through its module, however it was itself imported.
        scaling = [(clip, "_clip_grads_with_norm_"), (utils, "clip_grads_with_norm_")]
        clamping = [(clip, "clip_grad_value_"), (utils, "clip_grad_value_")]
        zeroing: list[tuple[Any, str]] = [(Optimizer, "zero_grad"), (torch.nn.Module, "zero_grad")]
        return [
            *(Body(f, self._loss_look(f)) for name in LOSSES if (f := getattr(F, name, None)) is not None),
            *(Body(f, self._further_look(f)) for n in FURTHER_LOSSES if (f := getattr(F, n, None)) is not None),
            Attribute([(torch.autograd, "backward")], self._look(self._backward_begins, self._backward_done)),
            Attribute(zeroing, self._look(self._zeroing, self._zeroed)),
            *(Attribute([(k, "step")], self._scheduler_look()) for k in _with_own_step(lr_scheduler)),
            Attribute([(torch, "manual_seed"), (torch.random, "manual_seed")], self._look(None, self._seeded)),
            Attribute([(DataLoader, "__iter__")], self._look(None, self._epoch_begun)),
            Attribute([(_BaseDataLoaderIter, "_next_index")], self._look(None, self._indices_drawn)),
            Attribute([(_BaseDataLoaderIter, "__next__")], self._look(None, self._batch_fetched)),
            Attribute(scaling, self._look(self._scaling_gradients, self._clipped)),
            Attribute(clamping, self._look(self._clamping_gradients, self._clipped)),
            Attribute([(scaler, "scale")], self._look(None, self._scaled)),
            Attribute([(scaler, "unscale_")], self._look(self._unscaling)),
            Attribute([(scaler, "step")], self._look(self._scaler_steps, self._scaler_stepped)),
        ]

    def _look(self, before: Any, after: Any = None) -> Look:
        return Look(before, after, broke=self._broke)

    def _loss_look(self, function: Callable[..., Any]) -> Look:
        # The listeners get a copy of the function that is not patched.
        plain = plain_copy(function)
        return Look(self._loss_begins, partial(self._loss_returned, plain), self._loss_over, self._broke)

    def _further_look(self, function: Callable[..., Any]) -> Look:
        return self._look(None, partial(self._further_returned, plain_copy(function)))

    def _scheduler_look(self) -> Look:
        return Look(self._schedule_begins, self._scheduled, self._schedule_over, self._broke)

    def _broke(self, error: Exception) -> None:
        """Something here failed: report it to every listener."""
        for listener in self.listeners:
            listener.broke(error)

    # What is seen, before and after the original.

    def _loss_begins(self, args: Any, kwargs: Any) -> Any:
        depth = getattr(self._here, "losses", 0)
        self._here.losses = depth + 1
        return depth

    def _loss_over(self, depth: Any) -> None:
        self._here.losses = depth

    def _loss_returned(self, plain: Any, depth: Any, args: Any, kwargs: Any, value: Any) -> None:
        if depth > 0 or not self._listeners:  # a loss that is made of other losses counts once
            return
        with unseen():
            self._tell_of_loss(plain, args, kwargs, value)

    def _further_returned(self, plain: Any, token: Any, args: Any, kwargs: Any, value: Any) -> None:
        with unseen():
            if type(value) is torch.Tensor and value.requires_grad and not is_functorch_wrapped_tensor(value):
                for listener in self.listeners:
                    listener.further_loss_called(plain, args, kwargs)

    def _tell_of_loss(self, plain: Any, args: Any, kwargs: Any, value: Any) -> None:
        if type(value) is torch.Tensor and value.requires_grad and not is_functorch_wrapped_tensor(value):
            for reference in self._listeners:
                if (listener := reference()) is not None:
                    listener.loss_called(plain, args, kwargs, value)
        elif isinstance(value, torch.Tensor) and not value.requires_grad:
            for listener in self.listeners:
                listener.loss_evaluated(plain, args, kwargs, value)

    def _backward_begins(self, args: Any, kwargs: Any) -> bool:
        if torch._C._current_graph_task_id() != -1:  # a reentrant checkpoint's, inside the loop's own
            return False
        bound = dict(zip(BACKWARD_ARGUMENTS, args, strict=False)) | kwargs
        for reference in self._listeners:
            if (listener := reference()) is not None:
                listener.backward_called(bound.get("tensors"), bound.get("grad_tensors"), bound.get("inputs"))
        return True

    def _backward_done(self, seen: bool, args: Any, kwargs: Any, value: Any) -> None:
        for reference in self._listeners if seen else ():
            if (listener := reference()) is not None:
                listener.backward_done()

    def _zeroing(self, args: Any, kwargs: Any) -> None:
        if torch._C._current_graph_task_id() == -1:  # an optimizer that steps inside a pass clears what it has used
            for reference in self._listeners:
                if (listener := reference()) is not None:
                    listener.zeroed(args[0])

    def _zeroed(self, token: Any, args: Any, kwargs: Any, value: Any) -> None:
        for reference in self._listeners:
            if (listener := reference()) is not None:
                listener.has_zeroed(args[0])

    def _schedule_begins(self, args: Any, kwargs: Any) -> Any:
        depth = getattr(self._here, "schedulers", 0)
        self._here.schedulers = depth + 1
        return depth

    def _schedule_over(self, depth: Any) -> None:
        self._here.schedulers = depth

    def _scheduled(self, depth: Any, args: Any, kwargs: Any, value: Any) -> None:
        for listener in self.listeners if depth == 0 else ():  # one that is made of others counts once
            listener.scheduler_stepped(args[0])

    def _seeded(self, token: Any, args: Any, kwargs: Any, value: Any) -> None:
        for listener in self.listeners:
            listener.seeded(args[0] if args else kwargs.get("seed"))

    def _epoch_begun(self, token: Any, args: Any, kwargs: Any, value: Any) -> None:
        for listener in self.listeners:
            listener.loader_started(args[0])

    def _batch_fetched(self, token: Any, args: Any, kwargs: Any, batch: Any) -> None:
        for reference in self._listeners:
            if (listener := reference()) is not None:
                listener.batch_fetched(batch, args[0])

    def _indices_drawn(self, token: Any, args: Any, kwargs: Any, indices: Any) -> None:
        for reference in self._listeners:
            if (listener := reference()) is not None:
                listener.indices_drawn(args[0], indices)

    def _scaling_gradients(self, args: Any, kwargs: Any) -> Changed:
        bound = dict(zip(("parameters", "max_norm", "total_norm", "foreach"), args, strict=False)) | kwargs
        return self._clipping(args, kwargs, bound.get("max_norm"), bound.get("total_norm"))

    def _clamping_gradients(self, args: Any, kwargs: Any) -> Changed:
        return self._clipping(args, kwargs, None, None)

    def _clipping(self, args: Any, kwargs: Any, max_norm: Any, total: Any) -> Changed:
        parameters = args[0] if args else kwargs.get("parameters")
        if isinstance(parameters, Iterator):
            # A generator can be read once, and both the listeners and the original read it.
            parameters, again = read_twice(parameters)
            args, kwargs = ((again, *args[1:]), kwargs) if args else (args, kwargs | {"parameters": again})
        try:
            tokens = [(one, one.before_clip(parameters, max_norm, total)) for one in self.listeners]
        except Exception as error:
            self._broke(error)
            tokens = []
        return Changed(args, kwargs, tokens)

    def _clipped(self, tokens: Any, args: Any, kwargs: Any, value: Any) -> None:
        for listener, token in tokens:
            listener.after_clip(token)

    def _scaled(self, token: Any, args: Any, kwargs: Any, scaled: Any) -> None:
        losses = args[1] if len(args) > 1 else kwargs.get("outputs")
        for listener in self.listeners:
            listener.loss_scaled(losses, scaled)

    def _unscaling(self, args: Any, kwargs: Any) -> None:
        for listener in self.listeners:
            listener.unscaling(_optimizer(args, kwargs), args[0])

    def _scaler_steps(self, args: Any, kwargs: Any) -> None:
        for listener in self.listeners:
            listener.scaler_stepping(_optimizer(args, kwargs))

    def _scaler_stepped(self, token: Any, args: Any, kwargs: Any, value: Any) -> None:
        for listener in self.listeners:
            listener.scaler_stepped(_optimizer(args, kwargs))

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        changed = None
        for reference in self._listeners:
            listener = reference()
            ours = None if listener is None else listener.before_step(optimizer, args, kwargs)
            if ours is not None:
                args, kwargs = changed = ours
        return changed

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for reference in self._listeners:
            if (listener := reference()) is not None:
                listener.after_step(optimizer)

    # The ends of a process.

    def _at_exit(self) -> None:
        for listener in self.listeners:
            listener.close()

    def _in_child(self) -> None:
        # A forked worker (a DataLoader's) is not the training: it must neither record nor close the record.
        self._lock = threading.RLock()  # another thread of the parent may hold it
        for listener in self.listeners:
            listener.abandon()
        self._listeners = []
        self._uninstall()


def _optimizer(args: Any, kwargs: Any) -> Any:
    return args[1] if len(args) > 1 else kwargs.get("optimizer")


def _with_own_step(module: Any) -> list[type]:
    """The schedulers of torch that define `step` themselves."""
    kinds = [k for k in vars(module).values() if isinstance(k, type) and issubclass(k, lr_scheduler.LRScheduler)]
    return [kind for kind in kinds if "step" in vars(kind)]


def _taken_away(patch: Patch) -> bool:
    patch.undo()
    return True


HUB = Hub()
