"""Whether a model's values are still those that an operator was made for.

Their bits show it; a version counter shows that a tensor was written to with the same ones, since a state dict may
be loaded and put back in between.
"""

from __future__ import annotations

from torch import nn

from diag.errors import InvalidInput
from diag.snapshot.state.bits import TensorBits
from diag.snapshot.state.tensors import version_of


class Values:
    """Notices when the parameters change, so that one operator never mixes two points."""

    def __init__(self, model: nn.Module) -> None:
        self._tensors = [*model.parameters(), *model.buffers()]
        self._moment = TensorBits(model)
        self._versions = self._read()

    @property
    def digest(self) -> str:
        """A hash of the values."""
        return self._moment.digest

    def were_rewritten(self) -> bool:
        """True where tensors were written with the same values. Raises InvalidInput where values changed."""
        if self._moment.changed():
            raise InvalidInput(
                "The model's parameters or buffers have changed since this operator was made; make a new one."
            )
        before, self._versions = self._versions, self._read()
        return before != self._versions

    def _read(self) -> list[int]:
        return [version_of(t) for t in self._tensors]
