"""Something that listens while a model is called on the data, so that several quantities come from one pass.

What a measurement will ask for is known before it begins: it puts the listeners of these quantities into
`snapshot.listeners` (see `together`), and the pass that gives the logits is heard by all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn

from diag.snapshot.batch import Batch
from diag.snapshot.inside.names import module_names


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
