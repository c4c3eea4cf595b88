"""What takes the place of an object that cannot be put back, for the time of a measurement.

An iterator goes one way: a copy of it is advanced instead, and where there is none the model is refused when it
asks for the next item. A `functools.lru_cache` cannot be told to forget one entry: what it holds is read, and what
is new is kept apart. A tensor that training computed, with its graph, is a constant: a backward pass of ours
through that graph would free it before training's own.
"""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable, Iterator, Mapping
from operator import is_
from typing import Any

from torch import Tensor

from diag.errors import Unsupported

LruCache = type(functools.lru_cache(lambda: None))
ONE_WAY = (
    "The model takes the next item of a {} that it holds, which measuring could not put back; keep in the model "
    "what can be copied (a counter, a list, a torch.Generator)."
)


def may_have_stand_in(kind: type) -> bool:
    """Whether `stand_in` looks at values of this type at all."""
    return _is_iterator(kind) or issubclass(kind, (tuple, Tensor, LruCache, staticmethod, classmethod))


def stand_in(value: Any) -> Any:
    """What to use in place of `value` while measuring; `value` itself where it can stay."""
    if isinstance(value, Tensor):
        return value.detach() if _was_computed(value) else value
    if isinstance(value, (LruCache, staticmethod, classmethod)):
        return _cache(value)
    if type(value) is tuple:
        parts = tuple(map(stand_in, value))
        return value if all(map(is_, parts, value)) else parts
    return _iterator(value) if _is_iterator(type(value)) else value


def _is_iterator(kind: type) -> bool:
    return issubclass(kind, Iterator) and not issubclass(kind, tuple) and not kind.__dictoffset__


def _was_computed(value: Tensor) -> bool:
    """Whether a tensor has a graph that is more than a view of a leaf: of such a view no backward pass is lost."""
    if value.grad_fn is None:
        return False
    base = value._base if value._is_view() else None
    return base is None or base.grad_fn is not None


def _iterator(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception:  # a generator, an open file, any iterator from Python 3.14 on
        return OneWay(type(value).__name__)


class OneWay:
    """Stands in for an iterator of which there is no copy."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __iter__(self) -> OneWay:
        return self

    def __next__(self) -> Any:
        raise Unsupported(ONE_WAY.format(self.kind))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise Unsupported(ONE_WAY.format(self.kind))


def _cache(value: Any) -> Any:
    function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
    if not isinstance(function, LruCache) or (held := entries_of(function)) is None:
        return value
    apart = CacheApart(function, held)
    return type(value)(apart) if isinstance(value, (staticmethod, classmethod)) else apart


class CacheApart:
    """A function with what its `lru_cache` holds already; what it computes itself it keeps for itself."""

    def __init__(self, original: Any, held: Mapping[Any, Any]) -> None:
        functools.update_wrapper(self, original.__wrapped__)
        self._original, self._held = original, dict(held)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = _key(args, kwargs)
        for known in (key, _hidden(key, self._held)):
            if known is not None and known in self._held:
                return self._held[known]
        result = self._original.__wrapped__(*args, **kwargs)
        self._held[key] = result
        return result

    def __get__(self, instance: Any, owner: Any = None) -> Callable[..., Any]:
        return self if instance is None else functools.partial(self, instance)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_original"], name)


def _key(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The key under which lru_cache keeps a call; with keyword arguments they follow a mark of its own."""
    if kwargs:
        return (*args, _MARK, *(x for pair in kwargs.items() for x in pair))
    return args[0] if len(args) == 1 and type(args[0]) in (int, str) else args


_MARK = object()


def _hidden(key: Any, held: Mapping[Any, Any]) -> Any:
    """The key in `held` that differs from `key` in the mark alone."""
    if not isinstance(key, tuple) or _MARK not in key:
        return None
    at = key.index(_MARK)
    rest = (*key[:at], *key[at + 1 :])
    alike = (k for k in held if isinstance(k, tuple) and len(k) == len(key) and (*k[:at], *k[at + 1 :]) == rest)
    return next(alike, None)


def entries_of(function: Any) -> dict[Any, Any] | None:
    """What a `functools.lru_cache` holds, by key; None where it does not show it."""
    info, seen = function.cache_info(), gc.get_referents(function)
    if info.maxsize is None:
        found = [r for r in seen if type(r) is dict and r is not vars(function) and len(r) == info.currsize]
        return dict(found[0]) if found else {} if not info.currsize else None
    # A bounded one shows a key, its result and the type of the link that holds them, from the oldest on.
    links = [i for i, r in enumerate(seen) if isinstance(r, type) and r.__name__.endswith("lru_list_elem")]
    links = links[: info.currsize]
    pairs = {seen[i - 2]: seen[i - 1] for i in links if i >= 2 and _is_hashable(seen[i - 2])}
    return pairs if len(pairs) == info.currsize else None


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
