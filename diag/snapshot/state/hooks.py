"""Hooks that are not ours do not fire while measuring, and are put back afterwards.

A user's hook counts, keeps activations or writes a log; another library's (Opacus) keeps what a training step
needs. A measurement calls the model many times, and each call would be taken for the training's own. So every
hook of a module, of a tensor and of all modules is taken out of its dict for the time of a measurement and put
back in its order, in the same dict, and those for saved tensors are put back on their stack. Ours stay, and so do
torch's own, without which the network is another one (the weight under the old `spectral_norm` and `weight_norm`,
pruning, FSDP).

A forward hook may change what the network gives. One that could, as far as its code tells (see `doubtful_hooks`),
is tried once, on the first examples (see `hook_check`): where the network gives something else without it, the
model is refused.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as all_modules

from diag.snapshot import pause

Hooks = MutableMapping[int, Callable[..., Any]]

FORWARD_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
BACKWARD_HOOKS = ("_backward_pre_hooks", "_backward_hooks")
OF_MODULES = (*FORWARD_HOOKS, *BACKWARD_HOOKS)
OF_TENSORS = ("_backward_hooks", "_post_accumulate_grad_hooks")
# Of torch's own hooks these only look on.
LOOKING_ON = ("torch.utils.", "torch.profiler", "torch.distributed._tools")
# What these collect is given back by the same call of the model, as its hidden states.
OF_THE_NETWORK = ("transformers.utils.output_capturing",)

NO_HOOKS: Mapping[str, frozenset[int]] = {}
# The attributes of each module, and the keys in its dicts of hooks when the measurement began.
Known = tuple[tuple[dict[str, Any], Mapping[str, frozenset[int]]], ...]
_known: ContextVar[Known] = ContextVar("diag_known_hooks", default=())
_silent: ContextVar[frozenset[int]] = ContextVar("diag_silent", default=frozenset())
_gates = threading.Lock()


@contextmanager
def silent(*modules: nn.Module) -> Iterator[None]:
    """Inside the context no hook of these modules, their tensors or of all modules fires that is not ours."""
    new = [m for m in modules if id(m) not in _silent.get()]
    if not new:
        yield
        return
    token = _silent.set(_silent.get() | {id(m) for m in new})
    known = _known.set((*_known.get(), *_hooks_now(new)))
    with ExitStack() as stack:
        stack.callback(_silent.reset, token)
        stack.callback(_known.reset, known)
        stack.callback(forget_new)
        # Without other threads these go too: a gate of backward hooks would still leave its mark on every graph.
        alone = _is_alone()
        if not alone:
            stack.enter_context(_gated())
        stack.enter_context(_saving_plainly())
        for hooks in (*_dicts(new), *(_of_all_modules() if alone else ())):
            stack.enter_context(_taken_out(hooks))
        yield


def forget_new() -> None:
    """Take off the hooks that the modules have hooked to themselves since the measurement began, as some do at
    their first call: what they keep of having done so is put back too, and they would do it again."""
    for part, before in _known.get():
        if any(part.get(name) for name in OF_MODULES):
            _forget_new(part, before)


def _forget_new(part: dict[str, Any], before: Mapping[str, frozenset[int]]) -> None:
    for name in OF_MODULES:
        hooks = part.get(name) or {}
        for key in [k for k in hooks if k not in before.get(name, ()) and not _is_ours(hooks[k])]:
            del hooks[key]
            for marks in (f"{name}_with_kwargs", f"{name}_always_called"):
                part.get(marks, {}).pop(key, None)


def _hooks_now(modules: Iterable[nn.Module]) -> Iterator[tuple[dict[str, Any], Mapping[str, frozenset[int]]]]:
    parts = {id(part): vars(part) for module in modules for part in module.modules()}
    for part in parts.values():
        hooked = {name: frozenset(hooks) for name in OF_MODULES if (hooks := part.get(name))}
        yield part, hooked or NO_HOOKS


@contextmanager
def _saving_plainly() -> Iterator[None]:
    """Inside the context no hook of this thread's fires for tensors that are saved for a backward pass."""
    autograd, taken = torch._C._autograd, []
    while (hooks := autograd._top_saved_tensors_default_hooks(True)) is not None:
        autograd._pop_saved_tensors_default_hooks()
        taken.append(hooks)
    try:
        yield
    finally:
        for pack, unpack in reversed(taken):
            autograd._push_saved_tensors_default_hooks(pack, unpack)


def is_silent(module: nn.Module) -> bool:
    """Whether its hooks are silent now."""
    return id(module) in _silent.get()


@contextmanager
def firing() -> Iterator[None]:
    """Inside the context `silent` leaves all hooks as they are (to see what they do)."""
    token = _silent.set(_Everything())
    try:
        yield
    finally:
        _silent.reset(token)


class _Everything(frozenset[int]):
    def __contains__(self, item: object) -> bool:
        return True


def _dicts(modules: Iterable[nn.Module]) -> Iterator[Hooks]:
    """Every dict of hooks that is not empty, once."""
    seen: set[int] = set()
    for module in modules:
        for part in module.modules():
            attributes = vars(part)
            for name in OF_MODULES:
                if hooks := attributes.get(name):
                    yield from _once(hooks, seen)
        for tensor in (*module.parameters(), *module.buffers()):
            for name in OF_TENSORS:
                if hooks := getattr(tensor, name, None):
                    yield from _once(hooks, seen)


def _once(hooks: Hooks, seen: set[int]) -> Iterator[Hooks]:
    if id(hooks) not in seen:
        seen.add(id(hooks))
        yield hooks


@contextmanager
def _taken_out(hooks: Hooks) -> Iterator[None]:
    before = dict(hooks)
    foreign = {key for key, hook in before.items() if not stays(hook)}
    for key in foreign:
        del hooks[key]
    try:
        yield
    finally:
        # Ours may have come and gone meanwhile; what the network has hooked to itself goes.
        now = {key: hook for key, hook in hooks.items() if key in before or _is_ours(hook)}
        after = {key: hook for key, hook in before.items() if key in foreign or key in now} | now
        if list(after) != list(hooks):
            hooks.clear()
            hooks.update(after)


def stays(hook: Callable[..., Any]) -> bool:
    """Whether a hook fires while measuring: ours, and those of torch that are a part of the network."""
    home = home_of(hook)
    torchs = home.split(".")[0] == "torch" and not home.startswith(LOOKING_ON)
    return _is_ours(hook) or torchs or home.startswith(OF_THE_NETWORK)


def _is_ours(hook: Callable[..., Any]) -> bool:
    return home_of(hook).split(".")[0] == "diag"


def home_of(hook: Callable[..., Any]) -> str:
    """The module that a hook's code is in."""
    hook = unbound(hook)
    home = getattr(hook, "__module__", None) if hasattr(hook, "__code__") else type(hook).__module__
    return home or ""


def unbound(hook: Any) -> Any:
    """The function behind partial functions and bound methods."""
    while True:
        if isinstance(hook, functools.partial):
            hook = hook.func
        elif hasattr(hook, "__func__"):
            hook = hook.__func__
        else:
            return hook


# ---- hooks of all modules, where other threads may be training: each looks who is calling


class _Gate:
    """Stands in for one hook of all modules: passes on what no measurement calls."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook, self.users = hook, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A backward pass on a device runs in threads of autograd's own, which know of no measurement.
        autograd = isinstance(threading.current_thread(), threading._DummyThread)
        return None if pause.is_measuring() or autograd else self.hook(*args, **kwargs)


@contextmanager
def _gated() -> Iterator[None]:
    held: list[tuple[Hooks, int, _Gate]] = []
    with _gates:
        for hooks in _of_all_modules():
            for key, hook in list(hooks.items()):
                if isinstance(hook, _Gate) or not stays(hook):
                    gate = hook if isinstance(hook, _Gate) else _Gate(hook)
                    gate.users += 1
                    hooks[key] = gate
                    held.append((hooks, key, gate))
    try:
        yield
    finally:
        with _gates:
            for hooks, key, gate in held:
                gate.users -= 1
                if not gate.users and hooks.get(key) is gate:
                    hooks[key] = gate.hook


def _of_all_modules() -> list[Hooks]:
    return [getattr(all_modules, f"_global{name}", {}) for name in OF_MODULES]


def _is_alone() -> bool:
    others = [t for t in threading.enumerate() if t is not threading.current_thread()]
    return all(isinstance(t, threading._DummyThread) for t in others)


def foreign_forward_hooks(model: nn.Module) -> list[tuple[str, Callable[..., Any]]]:
    """The forward hooks that `silent` silences, with the names of their modules."""
    named = [(name, vars(part).get(kind)) for name, part in model.named_modules() for kind in FORWARD_HOOKS]
    named += [("all modules", getattr(all_modules, f"_global{kind}", None)) for kind in FORWARD_HOOKS]
    every = [
        (name, hook.hook if isinstance(hook, _Gate) else hook)
        for name, hooks in named
        for hook in (hooks or {}).values()
    ]
    return [(name, hook) for name, hook in every if not stays(hook)]
