"""Whether a mode only looks on, as far as its code tells: it hands on what each operation gives.

Most modes count, trace or log: what their `__torch_function__` or `__torch_dispatch__` returns is
`func(*args, **kwargs)`, and they write into nothing of these. Of any other mode it is not known.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

METHODS_OF_MODES = ("__torch_function__", "__torch_dispatch__")
ARGUMENTS = 5  # self, func, types, args, kwargs


@functools.cache
def looks_on(kind: Any) -> bool:
    """Whether modes of this class only look on; False where its code does not tell."""
    ways = [getattr(kind, name) for name in METHODS_OF_MODES if any(name in vars(k) for k in kind.__mro__[:-1])]
    ways = [way for way in ways if not way.__module__.startswith("torch.")]
    try:
        trees = [ast.parse(textwrap.dedent(inspect.getsource(way))).body[0] for way in ways]
    except (OSError, TypeError, SyntaxError):
        return False
    return bool(trees) and all(_hands_on(tree) for tree in trees)


def _hands_on(handler: Any) -> bool:
    names = [a.arg for a in handler.args.args]
    if len(names) != ARGUMENTS:
        return False
    _, func, _, args, kwargs = names
    empty = {"{}", f"{kwargs} or {{}}", f"{{}} if {kwargs} is None else {kwargs}"}
    plain = {ast.unparse(ast.parse(f"{func}(*{args}, **{k})")) for k in (kwargs, f"({kwargs} or {{}})")}
    results = {name for name, value in _assigned(handler) if value in plain}
    expected = {kwargs: empty} | dict.fromkeys(results, plain) | {name: set() for name in (func, args)}
    if any(value not in expected.get(name, {value}) for name, value in _assigned(handler)) or _writes(handler):
        return False
    returned = [ast.unparse(n.value) if n.value else "" for n in ast.walk(handler) if isinstance(n, ast.Return)]
    return bool(returned) and set(returned) <= plain | results


def _assigned(handler: Any) -> Iterator[tuple[str, str]]:
    """The names that are assigned to, or into, and what, as text."""
    for node in ast.walk(handler):
        value = getattr(node, "value", None)
        text = ast.unparse(value) if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)) and value else ""
        stored = [n for n in ast.walk(node) if isinstance(getattr(n, "ctx", None), ast.Store)] if text else []
        yield from ((root.id, text if root is n else "") for n in stored for root in _roots(n))
        if isinstance(node, (ast.AugAssign, ast.For)):
            yield from ((root.id, "") for root in _roots(node.target))


def _roots(node: Any) -> Iterable[ast.Name]:
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Starred)):
        node = node.value
    return [node] if isinstance(node, ast.Name) else []


def _writes(handler: Any) -> bool:
    """Whether it calls something that may write in place, or set what it is given."""
    names = [n.attr for n in ast.walk(handler) if isinstance(n, ast.Attribute)]
    names += [n.id for n in ast.walk(handler) if isinstance(n, ast.Name)]
    return any(n == "setattr" or (n.endswith("_") and not n.endswith("__")) for n in names)
