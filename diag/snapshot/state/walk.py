"""Everything in Python that a model's code can change when it is called: found, and kept.

That is what its modules hold besides parameters and buffers, deeply: attributes, lists, dicts, sets, deques,
arrays, tensors, generators of random numbers, helper objects, the variables of functions; the attributes of the
classes that it is made of; and of the user's own code the globals that its functions name. Code of installed
packages is taken to keep nothing in its globals. The search goes from near to far and ends at `MOST_OBJECTS`
objects, or a few for each module, so that a model that holds its trainer does not cost more than it is worth.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import random
import sys
import sysconfig
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from diag.snapshot.state import kinds, number_kinds
from diag.snapshot.state.kinds import Kept
from diag.snapshot.state.standins import LruCache, entries_of

MOST_OBJECTS = 5_000  # objects (our choice), or more where the model has many modules
OBJECTS_OF_MODULE = 8  # itself, what torch keeps in it, and some lists, dicts or sets of its own
LONG_LIST = 10_000  # items of a list (our choice), from which on the types are looked at first
COPIED_BYTES = 1 << 26  # of tensors and arrays (our choice)
ATOMS = (
    type(None), bool, int, float, complex, str, bytes, range, slice, type, types.ModuleType,
    types.BuiltinFunctionType, types.CodeType, types.FrameType, enum.Enum, weakref.ReferenceType, BaseException,
    property, torch.dtype,
    torch.device, torch.Size, torch.layout, torch.memory_format, numpy.generic, numpy.dtype,
)  # fmt: skip
# What these keep is not a part of what a network computes, and there is much of it: they are not entered.
CLOSED = (
    "torch.optim", "torch.utils", "torch.distributed", "torch.fx", "torch.cuda", "torch.autograd",
    "torch.jit", "logging", "threading", "_thread", "asyncio", "concurrent", "multiprocessing", "diag", "importlib",
    "lightning", "pytorch_lightning", "accelerate", "wandb", "tensorboard", "typing", "abc", "re", "inspect",
)  # fmt: skip
# Of a module these are seen to elsewhere: tensors by place, hooks, modes, a replaced `forward`.
RESTORED_ELSEWHERE = frozenset({
    "_parameters", "_buffers", "training", "forward", "_backward_pre_hooks", "_backward_hooks", "_forward_hooks",
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
})  # fmt: skip
_DESCRIBING = (
    types.FunctionType, property, functools.cached_property, types.MemberDescriptorType,
    types.GetSetDescriptorType,
)  # fmt: skip
_DRAWS = (
    random.Random, torch.Generator, numpy.random.Generator, numpy.random.RandomState, numpy.random.BitGenerator,
)  # fmt: skip
_LIBRARIES = tuple({sysconfig.get_path(p) for p in ("stdlib", "platstdlib", "purelib", "platlib")})


class Walk:
    """Finds and keeps what can be reached from a model, its own tensors left out, and from others."""

    def __init__(self, model: nn.Module, others: Iterable[Any] = ()) -> None:
        self.kept: list[tuple[str, Kept]] = []
        self._own = {id(part): part for part in model.modules()}
        self._held = {id(t) for m in self._own.values() for t in (*m._parameters.values(), *m._buffers.values())}
        self._seen: dict[int, Any] = {}
        self._types: dict[type, Traits] = {}
        self._bytes = 0
        self._queue: deque[tuple[str, Any]] = deque()
        self._empty: list[Any] = []
        self._most = max(MOST_OBJECTS, OBJECTS_OF_MODULE * len(self._own))
        for part in self._own.values():
            self._meet(type(part).__name__, part)
        for other in others:
            self._meet(getattr(other, "__name__", type(other).__name__), other)
        for _ in range(self._most - 1):  # the empty ones are one more
            if not self._queue:
                break
            with contextlib.suppress(Exception):  # what does not let itself be looked at is left alone
                self._enter(*self._queue.popleft())
        if self._empty:
            self.kept.append(("a list, dict or set that was empty", kinds.Empty(self._empty)))

    def _traits(self, kind: type) -> Traits:
        if kind not in self._types:
            self._types[kind] = Traits(kind)
        return self._types[kind]

    def _meet(self, name: str, value: Any, place: Any = None) -> None:
        if not self._traits(type(value)).atom and id(value) not in self._seen:
            self._seen[id(value)] = value
            if type(value) in kinds.EMPTIED and not value:
                self._empty.append(value)
                return
            at = f".{place}" if isinstance(place, str) else f"[{place!r:.20}]" if place is not None else ""
            self._queue.append((name + at, value))

    def _keep(self, name: str, kept: Kept) -> None:
        self.kept.append((name, kept))
        long = isinstance(kept.saved, list) and len(kept.saved) > LONG_LIST
        if long and all(self._traits(kind).atom for kind in set(map(type, kept.saved))):
            return
        for place, item in kept.items():
            if len(self._queue) < self._most:
                self._meet(name, item, place)

    def _enter(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            self._tensor(name, value)
        elif isinstance(value, numpy.ndarray):
            self._array(name, value)
        elif isinstance(value, nn.Module):
            self._module(name, value)
        elif isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
            self._function(name, value)
        elif isinstance(value, LruCache):
            self._meet(name, getattr(value, "__wrapped__", None))
            for item in (entries_of(value) or {}).values():
                self._meet(name, item)
        elif isinstance(value, (staticmethod, classmethod)):
            self._meet(name, value.__func__)
        else:
            self._object(name, value, self._traits(type(value)))

    def _tensor(self, name: str, value: Tensor) -> None:
        if id(value) not in self._held and not torch.nn.parameter.is_lazy(value):
            small = self._afford(value.numel() * value.element_size())
            self._keep(name, number_kinds.TensorValue(value) if small else number_kinds.TensorVersion(value))
        if vars(value):
            self._keep(name, kinds.Attributes(vars(value)))

    def _array(self, name: str, value: numpy.ndarray) -> None:
        if value.dtype == object:
            for item in value.flat:
                self._meet(name, item)
        elif value.flags.writeable and self._afford(value.nbytes):
            self._keep(name, number_kinds.Numbers(value))

    def _afford(self, size: int) -> bool:
        self._bytes += size
        return self._bytes <= COPIED_BYTES

    def _module(self, name: str, value: nn.Module) -> None:
        if isinstance(value, torch.jit.ScriptModule):
            return
        skip = (
            RESTORED_ELSEWHERE
            if id(value) in self._own
            else RESTORED_ELSEWHERE - {"_parameters", "_buffers", "training"}
        )
        self._keep(name, kinds.Attributes(vars(value), skip))
        self._meet(name, vars(value).get("forward"), "forward")
        for tensor in (*value._parameters.values(), *value._buffers.values()):
            if tensor is not None and vars(tensor):  # attributes that were set on a parameter
                self._meet(name, tensor)
        self._class(type(value))

    def _class(self, kind: type) -> None:
        for base in kind.__mro__:
            if id(base) in self._seen or base in (object, nn.Module) or _is_library(base):
                continue
            self._seen[id(base)] = base
            plain = [n for n, v in vars(base).items() if not n.startswith("__") and not isinstance(v, _DESCRIBING)]
            self._keep(base.__name__, kinds.Names(base, plain))
            for item in vars(base).values():
                for function in _functions_in(item):
                    self._meet(base.__name__, function)

    def _function(self, name: str, value: Any) -> None:
        if isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self._meet(name, part)
        elif isinstance(value, types.MethodType):
            self._meet(name, value.__self__)
            self._meet(name, value.__func__)
        elif not _is_closed(value):
            for cell in value.__closure__ or ():
                self._meet(name, cell)
            for part in (value.__defaults__, value.__kwdefaults__, vars(value)):
                self._meet(name, part)
            if not _is_library(value):
                self._globals(value)

    def _globals(self, function: Any) -> None:
        space, names = function.__globals__, set(_names_in(function.__code__))
        used = {n: space[n] for n in names if n in space}
        self._keep(function.__module__ or "globals", kinds.Names(space, used))
        for module in [m for m in used.values() if isinstance(m, types.ModuleType) and not _is_library(m)]:
            self._keep(module.__name__, kinds.Names(vars(module), [n for n in names if n in vars(module)]))
        for kind in [k for k in used.values() if isinstance(k, type)]:
            self._class(kind)

    def _object(self, name: str, value: Any, traits: Traits) -> None:
        if traits.kind is not None:
            self._keep(name, traits.kind(value))
        if traits.closed:
            return
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            self._keep(name, kinds.Attributes(attributes))
        if traits.slots:
            self._keep(name, kinds.Slots(value, traits.slots))
        if not traits.library:
            self._class(type(value))


class Traits:
    """What is asked of a type again and again."""

    def __init__(self, kind: type) -> None:
        self.atom = issubclass(kind, ATOMS)
        if self.atom:
            return
        self.library, self.closed = _is_library(kind), _is_closed(kind)
        self.slots = [name for base in kind.__mro__ for name in _slots(base)]
        of = next((kept for contents, kept in kinds.CONTENTS if issubclass(kind, contents)), None)
        draws = issubclass(kind, _DRAWS) and not issubclass(kind, random.SystemRandom)
        self.kind = number_kinds.Draws if draws else None if self.closed else of


def _functions_in(item: Any) -> Iterator[Any]:
    """The functions of the user that a class's attribute runs."""
    if isinstance(item, (types.FunctionType, staticmethod, classmethod, LruCache)):
        yield item
    elif isinstance(item, property):
        yield from (f for f in (item.fget, item.fset) if f is not None)
    elif isinstance(item, functools.cached_property):
        yield item.func


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            yield from _names_in(part)


def _slots(kind: type) -> Iterator[str]:
    slots = vars(kind).get("__slots__", ())
    for name in (slots,) if isinstance(slots, str) else slots:
        private = name.startswith("__") and not name.endswith("__")
        if name not in ("__dict__", "__weakref__"):
            yield f"_{kind.__name__.lstrip('_')}{name}" if private else name


def _is_closed(value: Any) -> bool:
    home = getattr(value, "__module__", None) or ""
    return home.startswith("torch._") or any(home == closed or home.startswith(f"{closed}.") for closed in CLOSED)


def _is_library(value: Any) -> bool:
    """Whether code comes with Python or an installed package."""
    if isinstance(value, types.FunctionType):
        file: str | None = value.__code__.co_filename
    else:
        module = value if isinstance(value, types.ModuleType) else sys.modules.get(getattr(value, "__module__", ""))
        if module is None or module.__name__ == "builtins":
            return module is not None
        file = getattr(module, "__file__", None)
        if file is None:  # a notebook's or the interpreter's own names, or a part of Python itself
            return module.__name__ != "__main__"
    return file is not None and file.startswith(("<frozen", *_LIBRARIES))
