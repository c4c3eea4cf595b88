"""What a whole measurement leaves as it was: an instrument's call, one quantity, one look in a watch.

`preserved` is around each pass and restores what every pass moves. This is around all of them: it restores, or
reports, what no pass should move.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from diag.snapshot.state.hooks import silent
from diag.snapshot.state.python import kept_state
from diag.snapshot.state.tensors import own_tensors


@contextmanager
def undisturbed(model: nn.Module, loss_fn: Any = None) -> Iterator[None]:
    """After the context the model's tensors are its own, with their values, and its Python state is what it was.

    Inside, hooks of others are silent. Raises StateLost where something moved that cannot be put back.
    """
    modules = [m for m in (model, loss_fn) if isinstance(m, nn.Module)]
    with own_tensors(model, values=True), silent(*modules), kept_state(model, loss_fn):
        yield
