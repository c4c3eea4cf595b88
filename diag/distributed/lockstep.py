"""Passes in which the ranks wait for each other several times, as where each layer's weights are gathered in turn.

Before each message of such a pass the ranks tell each other in a few bytes what they are about to do. So a rank on
which the pass fails is heard of at the next message, and ranks that would take different paths through a network,
as where its code branches on the data, stop with that reason; none waits for a message that is not coming.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from diag.distributed.together import Together
from diag.errors import Unsupported

PATHS_PART = (
    "The ranks take different paths through the network (its code branches on the data, or they have other numbers "
    "of batches), so that a layer's weights cannot be gathered by all of them at once; measure a copy that each "
    "rank holds whole."
)
PASS_ENDS, TOTAL = 1, 2  # what is told; a layer's weights are told by numbers above these


class Lockstep:
    """The messages of such passes between the ranks of `together`; `world`, `rank` and `device` are theirs."""

    def __init__(self, together: Together) -> None:
        self.together = together
        self.rank, self.world, self.device = together.rank, together.world, together.device
        self._depth, self._stopped = 0, ""

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """Around one pass, on all ranks; nests. Raises on all where it raises on one: there its own error."""
        if self._depth:
            yield
            return
        self._depth, self._stopped = 1, ""
        try:
            try:
                yield
            except Exception as error:
                if not self._stopped:
                    self.together.say(error)
                    self._tell(-1)
                raise
            self._step(PASS_ENDS)
        finally:
            self._depth = 0

    def gathered(self, own: Tensor, number: int) -> Tensor:
        """(world, n): the ranks' vectors (n,)."""
        self._step(number)
        return self.together.table(own)

    def summed_parts(self, table: Tensor, number: int) -> Tensor:
        """(n,): this rank's row of the sum over ranks of their tables (world, n)."""
        self._step(number)
        return self.together.own_row_of_sum(table)

    def totals(self, numbers: Tensor) -> Tensor:
        """The sums of the ranks' tensors, which have one shape."""
        if self._depth:
            self._step(TOTAL)
        return self.together.totals(numbers)

    def everywhere(self, holds: bool) -> bool:
        """Whether it holds on all ranks."""
        return int(self.totals(torch.tensor([0.0 if holds else 1.0], dtype=torch.float64))[0]) == 0

    def _step(self, number: int) -> None:
        if self._stopped:  # where the network's own code has caught what was raised
            raise Unsupported(self._stopped)
        failed, most, least = self._tell(number)
        if failed:
            self._stopped = self.together.about(failed - 1)
        elif most != -least:
            self._stopped = PATHS_PART
        if self._stopped:
            raise Unsupported(self._stopped)

    def _tell(self, number: int) -> list[int]:
        """The highest number of a rank on which the pass has failed (plus one), and the most and least of what all
        are about to do; -1: it has failed here."""
        failed = 1 + self.rank if number < 0 else 0
        said = torch.tensor([failed, number, -number] if number >= 0 else [failed, 0, 0])
        return self.together.largest(said).tolist()
