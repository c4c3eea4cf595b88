"""Whether a forward hook may change what the network gives, as far as its code tells."""

from __future__ import annotations

import dis
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import CellType
from typing import Any

from torch import nn

from diag.snapshot.state.hooks import foreign_forward_hooks, unbound

KEEPING = ("append", "appendleft", "extend", "add")


def doubtful_hooks(model: nn.Module) -> list[tuple[str, Callable[..., Any]]]:
    """The forward hooks that `silent` silences and that may change the outputs, with the names of their modules."""
    kept = _kept_by(model)
    return [(n, hook) for n, hook in foreign_forward_hooks(model) if may_change(hook) or _keeps_among(hook, kept)]


def _kept_by(model: nn.Module) -> set[int]:
    """What the parts of a model are and hold, by identity: what a hook writes there the model may read."""
    parts = list(model.modules())
    held = (value for part in parts for value in vars(part).values())
    return {id(part) for part in parts} | {id(v) for v in held if isinstance(v, (list, dict, set, deque))}


def _keeps_among(hook: Any, kept: set[int]) -> bool:
    """Whether a hook appends to something of these."""
    holds: list[Any] = []
    while isinstance(hook, functools.partial) or hasattr(hook, "__func__"):
        if isinstance(hook, functools.partial):
            holds += [*hook.args, *hook.keywords.values()]
            hook = hook.func
        else:  # a bound method
            holds.append(hook.__self__)
            hook = hook.__func__
    if not hasattr(hook, "__code__"):
        return id(hook) in kept
    cells = [cell.cell_contents for cell in hook.__closure__ or () if cell != CellType()]
    holds += [*cells, *(hook.__defaults__ or ()), *(hook.__kwdefaults__ or {}).values()]
    return any(n in KEEPING for n in hook.__code__.co_names) and any(id(value) in kept for value in holds)


def may_change(hook: Callable[..., Any]) -> bool:
    """Whether a hook can return something, or write into a tensor or an attribute, as far as its code tells."""
    hook = unbound(hook)
    call = hook if hasattr(hook, "__code__") else vars(type(hook)).get("__call__")
    code = getattr(call, "__code__", None)
    if code is None or code.co_flags & 0x20:  # nothing in Python, or a generator
        return True
    instructions = list(dis.get_instructions(code))
    if _only_keeps(instructions):
        return False
    writing = any(n == "setattr" or (n.endswith("_") and not n.endswith("__")) for n in code.co_names)
    return writing or any(_writes(i, before) for before, i in _with_previous(instructions))


def _only_keeps(instructions: list[Any]) -> bool:
    """Whether the code is one call `something.append(...)` whose None is returned, as many lambdas are."""
    steps = [
        i for i in instructions if i.opname not in ("RESUME", "COPY_FREE_VARS", "PUSH_NULL", "PRECALL", "CACHE")
    ]
    names = [i for i in steps[1:] if i.opname not in ("LOAD_ATTR", "LOAD_METHOD")]
    chain = steps[1 : steps.index(names[0])] if names else []
    straight = not any(i.is_jump_target or "JUMP" in i.opname or i.opname.startswith("STORE") for i in steps)
    kept = bool(chain) and steps[0].opname.startswith("LOAD_") and chain[-1].argval in KEEPING
    return straight and kept and [i.opname for i in steps[-2:]] == ["CALL", "RETURN_VALUE"]


def _with_previous(instructions: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    before = None
    for instruction in instructions:
        yield before, instruction
        before = instruction


def _writes(instruction: Any, before: Any) -> bool:
    name = instruction.opname
    if name == "RETURN_CONST":
        return instruction.argval is not None
    if name == "RETURN_VALUE":
        known = before is not None and before.opname == "LOAD_CONST" and before.argval is None
        return not known or instruction.is_jump_target
    return name.startswith(("STORE_SUBSCR", "STORE_ATTR", "STORE_SLICE"))
