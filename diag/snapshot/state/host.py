"""Tensors of diag's own are made on the host, those of the user's model and loss where the program makes them.

After `torch.set_default_device("cuda")`, or inside `with torch.device("cuda")`, a tensor that is made without
device= lies there. What is computed here expects its own on the host, so that is the default while diag works; a
call of the model or of the loss finds the program's default again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch

from diag.snapshot.state.modes import functions_seen

_the_programs: ContextVar[torch.device | None] = ContextVar("diag_default_device", default=None)


def makes_elsewhere() -> bool:
    """Whether the program has tensors made elsewhere than on the host."""
    # A default device is a mode of torch functions: without any nothing need be asked.
    return functions_seen() > 0 and torch.get_default_device().type != "cpu"


@contextmanager
def on_host() -> Iterator[None]:
    """Inside the context tensors are made on the host; without any cost where they are in any case."""
    if not makes_elsewhere():
        yield
        return
    token = _the_programs.set(torch.get_default_device())
    try:
        with torch.device("cpu"):
            yield
    finally:
        _the_programs.reset(token)


def as_the_program() -> AbstractContextManager[object]:
    """Inside the context tensors are made where the program makes them: for calls of the user's model and loss."""
    device = _the_programs.get()
    return nullcontext() if device is None else device
