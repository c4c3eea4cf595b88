"""Whether a model's values are still those that an operator was made for.

A version counter tells cheaply that a tensor was written to; a checksum tells whether its values changed, since
a state dict may be loaded and put back in between.
"""

from __future__ import annotations

import torch
from torch import nn

from diag.errors import InvalidInput


class Values:
    """Notices when the parameters are written to, so that one operator never mixes two points."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = [*model.parameters(), *model.buffers()]
        self.versions = self._versions()
        self.checksum = self._checksum()

    def were_rewritten(self) -> bool:
        """True where tensors were written with the same values. Raises InvalidInput where values changed."""
        versions = self._versions()
        if versions == self.versions:
            return False
        if self._checksum() != self.checksum:
            raise InvalidInput(
                "The model's parameters or buffers have changed since this operator was made; make a new one."
            )
        self.versions = versions
        return True

    def _versions(self) -> list[int]:
        return [t._version for t in self.tensors if not t.is_inference()]

    def _checksum(self) -> list[float]:
        real = [t.detach() if t.is_floating_point() else t.detach().double() for t in self.tensors]
        sums = [t.sum(dtype=torch.float64) for t in real]
        norms = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in real]
        return [float(x) for x in torch.stack([x.cpu() for x in (*sums, *norms)])]
