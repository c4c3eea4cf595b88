"""Something that listens while a model is called on the data, so that several quantities come from one pass.

What a measurement will ask for is known before it begins: it puts the listeners of these quantities into
`snapshot.listeners` (see `together`), and the pass that gives the logits is heard by all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from diag.snapshot.batch import Batch
from diag.snapshot.inside.names import module_names

PLAIN_CLASSES = (Tensor, nn.Parameter)


def unheard(*tensors: Any) -> AbstractContextManager[Any]:
    """Inside the context no mode of functions hears what a listener computes of these, which would take several
    times as long; a tensor of another class keeps the functions of its own."""
    plain = all(type(t) in PLAIN_CLASSES for t in tensors if isinstance(t, Tensor))
    return torch._C.DisableTorchFunction() if plain else nullcontext()


class PassListener:
    """Hears the calls of a model in evaluation mode, one a batch.

    complete: it has heard the whole pass. enough: it needs no further batch.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.complete = self.enough = False

    def throughout(self) -> AbstractContextManager[Any]:
        """What the whole pass runs inside of."""
        return nullcontext()

    def during(self, batch: Batch) -> AbstractContextManager[Any]:
        """What the call of the model on one batch runs inside of."""
        return nullcontext()

    def called(self, batch: Batch, outputs: Any) -> None:
        """The model gave these on the batch."""


class NamingListener(PassListener):
    """One that asks `self.inside()` for the name of the module that runs."""

    inside: Callable[[], str] = str

    @contextmanager
    def throughout(self) -> Iterator[None]:
        """Modules keep track of which of them runs."""
        with module_names(self.model) as self.inside:
            yield
