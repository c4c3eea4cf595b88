"""What a whole measurement leaves as it was: an instrument's call, one quantity, one look in a watch.

`preserved` is around each pass and restores what a pass moves as a matter of course. This is around all of them: it
sees to what no pass should move.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from diag.snapshot.foreign_hooks import silent
from diag.snapshot.own_tensors import own_tensors


@contextmanager
def undisturbed(model: nn.Module, loss_fn: Any = None) -> Iterator[None]:
    """After the context the model's tensors are its own, with their values; inside, hooks of others are silent."""
    modules = [m for m in (model, loss_fn) if isinstance(m, nn.Module)]
    with own_tensors(model, values=True), silent(*modules):
        yield
