"""What the source of a model's classes says: whether a part that was not called is named anywhere in it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

from torch import nn

# With these a class may reach its parts without naming them.
DYNAMIC = frozenset(
    {
        "getattr", "children", "named_children", "modules", "named_modules", "_modules", "__dict__", "vars",
        "get_submodule", "eval", "exec",
    }
)  # fmt: skip


def is_forgotten(model: nn.Module, name: str) -> bool:
    """Whether the module with this name, or one that it lies in, is named in no method of the module around it, so
    that no call can come to it: certain, where True."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        try:
            parent = model.get_submodule(".".join(parts[:i]))
        except AttributeError:
            return False
        if not may_reach(parent, part):
            return True
    return False


def may_reach(parent: nn.Module, part: str) -> bool:
    """Whether the code of `parent` may use its part with this name; True where that is not certain."""
    if (own := vars(parent).get("forward")) is not None:  # put in its place on this one object
        return _may(own, part)
    kinds = [k for k in type(parent).__mro__ if k is not nn.Module and issubclass(k, nn.Module)]
    if type(parent).forward is nn.Module.forward or any(k.__module__.startswith("torch.") for k in kinds):
        return True
    return any(_may(kind, part) for kind in kinds)


def tree_of(code: Any) -> ast.Module | None:
    """The syntax tree of a class or function; None where there is no source to read."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):
        return None


def _may(code: Any, part: str) -> bool:
    if (tree := tree_of(code)) is None:
        return True
    return any(_names(node, part) for node in ast.walk(tree)) or any(
        isinstance(node, (ast.Name, ast.Attribute)) and _text(node) in DYNAMIC
        for body in _used(tree)
        for node in ast.walk(body)
    )


def _names(node: ast.AST, part: str) -> bool:
    """`self.part` that is read, or "part" as a text."""
    if isinstance(node, ast.Attribute):
        return node.attr == part and isinstance(node.ctx, ast.Load)
    return isinstance(node, ast.Constant) and node.value == part


def _used(tree: ast.AST) -> list[ast.AST]:
    """What runs in a call: all functions but those that begin something, which go through all parts to give them
    their first values."""
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.Lambda))]
    return [
        f for f in functions if not (isinstance(f, ast.FunctionDef) and ("init" in f.name or "reset" in f.name))
    ]


def _text(node: ast.Name | ast.Attribute) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr
