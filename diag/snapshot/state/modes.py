"""Modes of others do not see what diag computes, and are put back afterwards.

A `TorchFunctionMode` or `TorchDispatchMode` that the program has entered (a `FlopCounterMode`, a tracer, a logger)
sees every operation of its thread, so also those of a measurement and of what is read at each step. They are taken
off torch's stacks for that time and put back in their order. What stays: diag's own, the default device, and those
of torch without which the network is another one (as context parallelism); its counters and profilers go.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch
from torch.utils._device import DeviceContext

from diag.snapshot.state.hooks import LOOKING_ON
from diag.snapshot.state.looking_on import looks_on

functions_seen = torch._C._len_torch_function_stack
"""How many modes of torch functions there are; a default device is one."""
operations_seen = torch._C._len_torch_dispatch_stack
"""How many modes of operations there are."""


P = ParamSpec("P")
R = TypeVar("R")

_hidden: ContextVar[tuple[Any, ...]] = ContextVar("diag_hidden_modes", default=())
_visible: ContextVar[bool] = ContextVar("diag_shown_modes", default=False)


class unseen:
    """Inside the context, or the decorated function, no mode of others sees what is computed in this thread.

    Where there is no mode at all, as nearly always, entering it asks for their number and nothing else.
    """

    _hidden: AbstractContextManager[None] | None = None

    def __enter__(self) -> None:
        if functions_seen() or operations_seen():
            self._hidden = _others_hidden()
            self._hidden.__enter__()

    def __exit__(self, *error: Any) -> None:
        if (hidden := self._hidden) is not None:
            self._hidden = None
            hidden.__exit__(*error)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            with unseen():
                return function(*args, **kwargs)

        return call


@contextmanager
def _others_hidden() -> Iterator[None]:
    functions, operations = _functions(), _operations()
    foreign = [mode for mode in (*functions, *operations) if is_foreign(mode)]
    if not foreign or _visible.get():
        yield
        return
    kept_functions, kept_operations = _ours(functions), _ours(operations)
    token = _hidden.set((*_hidden.get(), *foreign))
    _exchange_functions(functions, kept_functions)
    _exchange_operations(operations, kept_operations)
    try:
        yield
    finally:
        _exchange_operations(now := _operations(), _together(operations, kept_operations, now))
        _exchange_functions(now := _functions(), _together(functions, kept_functions, now))
        _hidden.reset(token)


@contextmanager
def seen_again() -> Iterator[None]:
    """Inside the context those of `doubtful_modes` see what is computed (to see what they do)."""
    token = _visible.set(True)
    with ExitStack() as stack:
        stack.callback(_visible.reset, token)
        for mode in doubtful_modes():
            stack.enter_context(mode)
        yield


def doubtful_modes() -> list[Any]:
    """The modes that are hidden now and may change what operations give; those of torch only look on."""
    return [mode for mode in _hidden.get() if not _is_torchs(mode) and not looks_on(mode.__class__)]


def is_foreign(mode: Any) -> bool:
    """Whether a mode is none of diag's and none without which the network is another one."""
    home = type(mode).__module__
    if isinstance(mode, DeviceContext) or home.partition(".")[0] == "diag":
        return False
    return not _is_torchs(mode) or home.startswith(LOOKING_ON)


def _is_torchs(mode: Any) -> bool:
    return type(mode).__module__.partition(".")[0] == "torch"


def _ours(modes: list[Any]) -> list[Any]:
    return [mode for mode in modes if not is_foreign(mode)]


def _together(before: list[Any], kept: list[Any], now: list[Any]) -> list[Any]:
    """The stack as it was, with what has been changed of it meanwhile (another default device, say)."""
    same = len(now) == len(kept) and all(a is b for a, b in zip(now, kept, strict=True))
    return before if same else [*now, *filter(is_foreign, before)]


# The stacks, the mode that sees an operation first at the end. Those of torch that have a place of their own (fake
# tensors, tracing proxies) lie below all others and are left there.


def _functions() -> list[Any]:
    return [torch._C._get_function_stack_at(i) for i in range(functions_seen())]


def _operations() -> list[Any]:
    modes = [torch._C._get_dispatch_stack_at(i) for i in range(operations_seen())]
    return [mode for mode in modes if getattr(mode, "_mode_key", None) is None]


def _exchange_functions(now: list[Any], new: list[Any]) -> None:
    _exchange(now, new, torch._C._pop_torch_function_stack, torch._C._push_on_torch_function_stack)


def _exchange_operations(now: list[Any], new: list[Any]) -> None:
    _exchange(now, new, _pop_operation, torch._C._push_on_torch_dispatch_stack)


def _pop_operation() -> None:
    torch._C._pop_torch_dispatch_stack(None)


def _exchange(now: list[Any], new: list[Any], pop: Callable[[], Any], push: Callable[[Any], Any]) -> None:
    for _ in now:
        pop()
    for mode in new:
        push(mode)
